"""Bridge and prompt (section 3.2 of the paper): with little data, the model stays as it is and prompts are learned.

The bridge is CLIP fine-tuned on many videos (train.py). It is frozen, and learned tokens are added to the sequences of
both encoders, P_v and P_t, n_ctx of each. They take part in attention like all other tokens:

    image encoder, layer i    [class | patches of a frame | P_v,i]
    text encoder, layer i     [start | P_t,i | class name | end]

Each of the first `depth` layers has its own; in deeper layers they are processed like the other tokens. Nothing else is
trained, and the loss is that of train.py:

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames, P_v), encode_text("{class}.", P_t))

So few parameters need few videos. The prompts belong to no class, so classes without videos benefit too.

    python prompt.py --shots 2                                                the toy, prompts for the tiny CLIP
    python prompt.py --data hmdb51 --shots 4 --weights runs/k400/best.pt      few shots, the default recipe
    python prompt.py --data hmdb51 --classes base --shots 16 --ctx 16 16 --depth 9 9 --lr 4e-2 --epochs 11 \\
      --weights runs/k400/best.pt                                             base to novel
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script at once while PyTorch is imported

import torch

import clip
import data
import evaluate
import train
from data import UserError

# The paper's few-shot experiment. ctx and depth: number of tokens and of layers, of the image and the text encoder.
PAPER = train.PAPER | dict(
    tune="prompts", template="{}.", ctx=[10, 10], depth=[12, 12],
    batch_size=64, epochs=50, warmup_epochs=5, lr=8e-3,
)
# The tiny model sees a frame as 17 tokens, not 197. It reads letters: nine text prompts can be "a photo of a".
TINY = PAPER | dict(
    ctx=[1, 9], depth=[3, 3], frames=8, augment="crop",
    batch_size=8, epochs=20, warmup_epochs=2, micro_batch=32,
)


def make_prompts(model, ctx, depth, seed):
    """New prompts for both encoders, tensors [depth, n_ctx, width], or None for n_ctx 0; ctx and depth are (vision,
    text). Normal, std 0.02. If there are no more text prompts than tokens in "a photo of a", they start as these."""
    generator = torch.Generator().manual_seed(seed)
    device = model.logit_scale.device
    visual = text = None
    if ctx[0]:
        visual = torch.randn(depth[0], ctx[0], len(model.visual.proj), generator=generator).to(device) * 0.02
    if ctx[1]:
        text = torch.randn(depth[1], ctx[1], len(model.text_projection), generator=generator).to(device) * 0.02
        words = model.tokenizer("a photo of a")[0, 1:-1].to(device)
        if ctx[1] <= len(words):
            text[0] = model.token_embedding(words[: ctx[1]])
    return visual, text


def add_prompts(model, args):
    """Gives a model new prompts. Raises UserError if it has some, or too few layers."""
    if model.visual_prompts is not None or model.text_prompts is not None:
        raise UserError(f"{args.weights} has prompts already: give the weights that they were learned for")
    layers = [len(model.visual.transformer.resblocks), len(model.transformer.resblocks)]
    if args.depth[0] > layers[0] or args.depth[1] > layers[1]:
        raise UserError(f"--depth {args.depth}: the encoders have {layers} layers")
    model.set_prompts(*make_prompts(model, args.ctx, args.depth, args.seed))


def main():
    """Learns prompts for a frozen model on a data set."""
    parser = train.make_parser(__doc__, PAPER, TINY)
    parser.flag("--ctx", "number of learned tokens in the image and in the text encoder; 0 for none", data.at_least(0),
                nargs=2)
    parser.flag("--depth", "number of first layers with learned tokens of their own, in the same order",
                data.at_least(1), nargs=2)
    args = train.parse_args(parser)
    if args.ctx == [0, 0]:
        parser.error("nothing to train: --ctx 0 0")
    device = evaluate.start(args)
    samples, val_samples, classes = data.load_train_val(args)
    model, state = train.open_run(args, device, samples, classes)
    val_loader = evaluate.evaluation_loader(val_samples, args.frames, model.image_size, args.micro_batch, args.workers)
    if not state.validations:
        train.validate(args, model, state, val_loader)  # before training
        add_prompts(model, args)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("visual_prompts", "text_prompts"))
    model.template = args.template
    train.describe(args, model, state)
    with train.resumable(args):
        train.train(args, model, state, samples, val_loader)
    train.report(args, state)


if __name__ == "__main__":
    data.run(main, clip.InputError)
