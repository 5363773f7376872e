"""Bridge and prompt (section 3.2): where there is little data, the model stays as it is and prompts are learned.

The bridge is CLIP fine-tuned on many videos (train.py). It is frozen, and the sequences of both encoders get learned
tokens, P_v and P_t, n_ctx of each, that take part in attention like all others:

    image encoder, layer i    [class | patches of a frame | P_v,i]
    text encoder, layer i     [start | P_t,i | class name | end]

Each of the first `depth` layers has its own; deeper layers treat them like all other tokens. They are the only trained
parameters, and the loss is that of train.py:

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames, P_v), encode_text("{class}.", P_t))

A few videos are enough for so few parameters, and as these belong to no class, classes without videos profit too.

    python prompt.py                                                          the toy, prompts for the tiny CLIP
    python prompt.py --data hmdb51 --shots 4 --weights runs/k400/best.pt      few shots, the default recipe
    python prompt.py --data hmdb51 --classes base --shots 16 --ctx 16 16 --depth 9 9 --lr 4e-2 --epochs 11 \\
      --weights runs/k400/best.pt                                             base to novel
"""
import torch

import clip
import data
import train
from data import UserError

# The paper's few-shot row
PAPER = dict(frames=32, batch_size=64, epochs=50, warmup_epochs=5, lr=8e-3, augment="mix", ctx=[10, 10], depth=[12, 12])
# The tiny model sees a frame as 17 tokens, not 197. It reads letters: nine text prompts can be "a photo of a".
TINY = dict(frames=8, batch_size=8, epochs=20, warmup_epochs=2, lr=8e-3, augment="crop", ctx=[1, 9], depth=[3, 3],
            shots=2)


def make_prompts(model, ctx, depth, seed):
    """New prompts for both encoders, tensors [depth, n_ctx, width] or None for n_ctx 0; ctx and depth are (vision,
    text). Normal, std 0.02; text prompts as few as the tokens of "a photo of a" start as these in the first layer."""
    generator = torch.Generator().manual_seed(seed)
    words = model.token_embedding(model.tokenizer(["a photo of a"]).to(model.logit_scale.device))[0, 1:-1].detach()
    prompts = []
    for n_ctx, layers, width in zip(ctx, depth, (len(model.visual.proj), len(model.text_projection))):
        prompt = torch.randn(layers, n_ctx, width, generator=generator) * 0.02
        prompts.append(prompt.to(words) if n_ctx else None)
    if 0 < ctx[1] <= len(words):
        prompts[1][0] = words[: ctx[1]]
    return prompts


def prepare(model, args, new):
    """Gives a model prompts, unless it is that of an interrupted run and has them, and freezes all else."""
    if new:
        if model.visual_prompts is not None or model.text_prompts is not None:
            raise UserError(f"{args.weights} has prompts already: give the weights that they were learned for")
        if args.ctx[1] > len(model.positional_embedding) // 2:
            raise UserError(f"--ctx {args.ctx[1]}: too many text prompts, over half of the text encoder's positions")
        vision, text = len(model.visual.transformer.resblocks), len(model.transformer.resblocks)
        if args.depth[0] > vision or args.depth[1] > text:
            raise UserError(f"--depth {args.depth[0]} {args.depth[1]}: the encoders have {vision} and {text} layers")
        model.set_prompts(*make_prompts(model, args.ctx, args.depth, args.seed))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("visual_prompts", "text_prompts"))
    args.fusion = model.fusion


def main():
    parser = train.make_parser(__doc__)
    parser.set_defaults(tune="prompts", template="{}.")
    add = parser.add_argument_group("prompts").add_argument
    add("--ctx", type=data.at_least(0), nargs=2, metavar=("VISION", "TEXT"), help="tokens, or 0 (default: %(default)s)")
    add("--depth", type=data.at_least(1), nargs=2, metavar=("VISION", "TEXT"), help="layers (default: %(default)s)")
    args = train.parse_args(parser, PAPER, TINY)
    if not any(args.ctx):
        parser.error("no prompts are left to be learned: --ctx 0 0")
    train.run(args, prepare)


if __name__ == "__main__":
    data.run(main, clip.InputError)
