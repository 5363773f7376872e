"""Bridge and prompt (section 3.2): where there is little data, the model stays as it is and prompts are learned.

The bridge is CLIP fine-tuned on many videos (train.py). It is frozen, and both encoders get learned tokens beside those
of their input: n_ctx in front of the class name, n_ctx behind the patches of a frame, anew in each of the first `depth`
layers (`prompts` in clip.py). With P_v and P_t the only parameters, the loss is that of train.py:

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames, P_v), encode_text("{class}.", P_t))

A few videos are enough for so few parameters, and as these belong to no class, classes without videos profit too.

    python prompt.py                                      the toy: bridge, prompts, and what they are compared with
    python prompt.py --data hmdb51 --shots 4 --weights runs/k400/best.pt
    python prompt.py --data hmdb51 --classes base --weights runs/k400/best.pt     the recipe of base to novel
"""
import copy

import torch

import clip
import data
import evaluate
import train
from data import say

# The paper's rows for few shots and for base to novel.
FEW_SHOT = dict(frames=32, batch_size=64, epochs=50, warmup_epochs=5.0, lr=8e-3, augment="mix", template="{}.",
                ctx_vision=10, ctx_text=10, depth_vision=12, depth_text=12)
BASE_TO_NOVEL = FEW_SHOT | dict(epochs=11, lr=4e-2, shots=16, ctx_vision=16, ctx_text=16, depth_vision=9, depth_text=9)
# The tiny model sees a frame as 17 tokens, not 197: one prompt has the same share. It reads letters, and nine text
# prompts are "a photo of a", so that in the first layer they start as what the bridge is used to.
TINY = dict(frames=8, batch_size=8, epochs=20, warmup_epochs=2.0, lr=8e-3, augment="crop", template="{}.",
            ctx_vision=1, ctx_text=9, depth_vision=3, depth_text=3)
TOY_SHOTS = 2


def parse_args():
    """The arguments, complete and consistent; ends wrong calls with exit status 2."""
    parser = train.make_parser(__doc__, FEW_SHOT, TINY)
    parser.set_defaults(tune="prompts")
    group = parser.add_argument_group("prompts")
    group.add_argument("--ctx", type=data.at_least(0), metavar="N", help="prompt tokens of each encoder")
    group.add_argument("--depth", type=data.at_least(1), metavar="N", help="layers with prompts of their own in each")
    for encoder in ("vision", "text"):
        for name, least in (("ctx", 0), ("depth", 1)):
            row = f"{name}_{encoder}"
            group.add_argument(f"--{name}-{encoder}", type=data.at_least(least), metavar="N",
                               help=f"in the {encoder} encoder (default: {FEW_SHOT[row]}, with --classes base "
                                    f"{BASE_TO_NOVEL[row]}; tiny: {TINY[row]})")
    group.add_argument("--merge", action="store_true", help="save the frozen weights too, not the prompts alone")
    given = parser.parse_args()
    for encoder in ("vision", "text"):
        parser.set_defaults(**{f"ctx_{encoder}": given.ctx, f"depth_{encoder}": given.depth})
    args = train.parse_args(parser, BASE_TO_NOVEL if given.classes == "base" else FEW_SHOT, TINY)
    if not args.ctx_vision + args.ctx_text:
        parser.error("no prompts are left to be learned: --ctx 0")
    if not args.ctx_text and given.template is None and not args.resume:
        args.template = train.PAPER["template"]
    return args


def load(args, weights, device):
    """The frozen CLIP of `weights` with new prompts, or that of an interrupted run."""
    last = train.last_checkpoint(args)
    model = clip.load(last or weights, device, image_size=args.resolution)
    if not last:
        if model.visual_prompts is not None or model.text_prompts is not None:
            raise ValueError(f"{weights} has prompts already: give the weights that they were learned for")
        if args.ctx_text > (positions := len(model.positional_embedding)) // 2:
            raise ValueError(f"--ctx-text {args.ctx_text} leaves no room for the class names in {positions} positions")
        for encoder, transformer in (("vision", model.visual.transformer), ("text", model.transformer)):
            depth, layers = getattr(args, f"depth_{encoder}"), len(transformer.resblocks)
            if depth > layers:
                raise ValueError(f"--depth {depth}: the {encoder} encoder of {weights} has {layers} layers")
        torch.manual_seed(args.seed)
        model.add_prompts((args.ctx_vision, args.depth_vision), (args.ctx_text, args.depth_text))
        if not args.merge:
            path = clip.locate(weights)
            model.backbone = {"path": weights if weights in clip.MODELS else str(path.absolute()),
                              "sha256": clip.sha256(path)}
    args.fusion = model.fusion
    train.choose_parameters(model, "prompts")
    return model


def story(args, device):
    """The toy: a bridge from the base classes, then a few videos of each novel class, told in five ways."""
    args.out = args.out or train.free_folder("prompts")
    if (args.out / "bridge").exists():
        raise ValueError(f"--out {args.out} holds a run already")
    args.shots = args.shots or TOY_SHOTS

    def part(name, **changed):
        """The arguments of one of the runs, in a folder of its own."""
        new = copy.copy(args)
        vars(new).update(out=args.out / name, resume=None, **changed)
        return new

    def samples(part):
        return data.load_samples(part, train=True), data.load_samples(part, train=False)[0]

    def run(name, load_model, **changed):
        new = part(name, **changed)
        say(f"\n-- {name}\n")
        (videos, classes), validation = samples(new)
        return train.fit(new, load_model(new), videos, validation, classes, device)["best"]["top1"]

    def full(new):
        model = clip.load(new.model, device)
        train.choose_parameters(model, "both")
        return model

    def accuracy(weights):
        model, new = clip.load(weights, device), part("", classes="novel")
        (_, classes), validation = samples(new)
        tokens = evaluate.class_tokens(model, classes, model.template)
        return evaluate.evaluate(model, evaluate.make_loader(new, model, validation), tokens)["top1"]

    recipe = train.TINY | dict(tune="both", fusion="embedding")
    few = dict(classes="novel")
    bridge = str(args.out / "bridge" / "best.pt")
    run("bridge", full, **recipe, classes="base", shots=None)
    rows = {
        "tiny CLIP as it is": accuracy(args.model),
        "bridge, as it is": accuracy(bridge),
        "prompts without the bridge": run("prompts-alone", lambda new: load(new, new.model, device), **few),
        "full fine-tuning without the bridge": run("full", full, **few, **recipe | dict(
            batch_size=args.batch_size, micro_batch=args.batch_size, epochs=args.epochs)),
        "bridge and prompt": run("bridge-and-prompt", lambda new: load(new, bridge, device), **few, weights=bridge),
    }
    say(f"\ntop-1, %, of the 12 classes that the bridge was not made of; {args.shots} videos of each to learn from\n")
    for name, top1 in rows.items():
        say(f"{name:36} {top1:6.1f}")


def main():
    """The story of the toy, or one run on the data and weights that are asked for."""
    args = parse_args()
    device = evaluate.start(args)
    if args.data == "toy" and not args.weights and not args.resume:
        story(args, device)
    else:
        train_samples, classes = data.load_samples(args, train=True)
        val_samples, _ = data.load_samples(args, train=False)
        model = load(args, args.weights or args.model, device)
        last = train.last_checkpoint(args)
        train.report(args, train.fit(args, model, train_samples, val_samples, classes, device, last), device)
    evaluate.finish()


if __name__ == "__main__":
    data.run(main)
