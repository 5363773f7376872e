"""Accuracy: which class name lies nearest to each video?

    prediction = argmax over c of cos(encode_video(video), encode_text(template with the name of class c))

A class is nothing but its name, so any model can be asked about any classes: plain CLIP, zero-shot, about videos that
nobody trained it for, and a fine-tuned one about classes that it has never seen. Every video is counted exactly once,
whatever the batch size and the number of processes; one that cannot be read counts as wrong.

    python evaluate.py --zero-shot                        plain CLIP on the toy
    python evaluate.py --weights runs/toy/best.pt         a fine-tuned model, on the data that it was made for
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import clip
import data
from data import say

# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share: flags, processes, precision


def add_arguments(parser, batch_size, training=False):
    """The flags about data, model and machine, the same in every script; `batch_size` is what the help says of its
    default. Defaults that depend on something are None and filled in by `complete`."""
    data.add_arguments(parser, training=training)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=clip.MODELS,
                       help="the CLIP to start from (default: ViT-B/16, for the toy tiny)")
    group.add_argument("--weights", help="weights to take in its place: a file of any CLIP with a ViT, or a name")
    group.add_argument("--resolution", type=data.at_least(1),
                       help="side of the input in pixels (default: as the weights were trained; 224)")
    group = parser.add_argument_group("machine")
    group.add_argument("--workers", type=data.at_least(0), default=min(len(os.sched_getaffinity(0)), 8),
                       help="processes that decode, per GPU (default: one per CPU core, at most 8; here %(default)s)")
    group.add_argument("--gpus", type=data.at_least(0), help="GPUs to use; 0 is the CPU (default: 1 if there is one)")
    group.add_argument("--batch-size", type=data.at_least(1),
                       help=f"videos in a batch, over all GPUs (default: {batch_size})")
    group.add_argument("--amp", choices=("bf16", "fp16", "off"),
                       help="mixed precision (default: bf16, on GPUs without it fp16, on CPUs off)")


def template(text):
    """A type for argparse: a sentence with a place for the class name."""
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no {{}} for the class name")
    return text


def views(text):
    """A type for argparse: "4x3" is (4, 3), clips and crops."""
    match = re.fullmatch(r"([1-9][0-9]*)x([13])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of clips x 1 or 3 crops, such as 4x3")
    return int(match[1]), int(match[2])


def complete(parser, args, defaults, tiny_defaults):
    """Fills in what depends on the data set, the model or the machine, and ends wrong calls with exit status 2."""
    args.data = args.data or (None if args.val_list else "toy")
    args.split, args.root = args.split or 1, args.root and Path(args.root).absolute()
    args.model = args.model or ("tiny" if args.data == "toy" else "ViT-B/16")
    for name, value in (tiny_defaults if args.model == "tiny" else defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    data.check_lists(parser, args)
    found = torch.cuda.device_count()
    if args.gpus is None:
        args.gpus = min(found, 1)
    if args.gpus > max(found, 1):
        parser.error(f"--gpus {args.gpus}: this machine has {found}")
    if args.gpus > found:
        say(f"warning: --gpus {args.gpus}, but there is no GPU here: running on the CPU")
        args.gpus = 0
    if args.amp is None:
        args.amp = "off" if args.gpus == 0 else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    world = world_size(args)
    if args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of the {world} processes that share it")


def world_size(args):
    """How many processes there are, or will be when `start` has called torchrun."""
    return int(os.environ.get("WORLD_SIZE", max(args.gpus, 1)))


def start(args):
    """Joins this process to the others that torchrun started, if it did; with --gpus above 1 torchrun is called here.

    Returns the device that this process computes on.
    """
    if args.gpus > 1 and "WORLD_SIZE" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}"]
        os.execv(sys.executable, torchrun + sys.argv)
    device = torch.device("cpu")
    if args.gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if args.gpus else "gloo")
    return device


def finish():
    """Leaves the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def plain(args):
    """The arguments as a dict that JSON and `torch.load(weights_only=True)` can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def make_folder(path):
    """Makes the folder of --out, before any work is done for it. Raises ValueError that names the flag."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: {error.strerror}") from error


def rank_and_world():
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(rows):
    """The lists of all processes, joined."""
    parts = [rows] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def hide_bars():
    """For tqdm's `disable`: bars are shown by the main process, and (None) on a terminal only."""
    return True if rank_and_world()[0] else None


def autocast(args, device):
    """Mixed precision as --amp asks for it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def class_tokens(model, classes, template):
    """The tokens [C, L] of class names in a template such as "a photo of a {}."."""
    return model.tokenizer([template.replace("{}", name) for name in classes])


@torch.inference_mode()
def evaluate(model, loader, tokens):
    """How well a CLIP tells the videos of a `data.make_loader` apart by the tokens [C, L] of their class names.

    Returns a dict: `top1` and `top5`, percent; `count`, the number of videos; `unreadable`, a list of "path: reason" of
    those that could not be read, counted as wrong. With several processes all of them get the figures of the whole.
    """
    model.eval()
    device = model.logit_scale.device
    text = model.encode_text(tokens.to(device))
    rows = []  # of every video its index, the place of the right class (0 is first; None: unreadable) and the error
    for video, label, index, errors in tqdm(loader, "evaluating", leave=False, unit="batch", disable=hide_bars()):
        views = video.unbind(1) if video.ndim == 6 else [video]  # of [B, T, 3, S, S]
        logits = torch.stack([model(view.to(device, non_blocking=True), text) for view in views])
        # The mean over the views of the probabilities, up to a factor and as a logarithm.
        score = logits.log_softmax(dim=-1).logsumexp(dim=0).cpu()  # [B, C]
        # How many other classes do not score less than the right one: a tie and a NaN count as wrong.
        place = (~(score < score.gather(1, label[:, None]))).sum(dim=1) - 1
        rows += [(i, None if error else p, error) for i, p, error in zip(index.tolist(), place.tolist(), errors)]
    rows = sorted(gather(rows))
    places = [place for _, place, _ in rows if place is not None]
    return {
        "top1": 100 * sum(place < 1 for place in places) / len(rows),
        "top5": 100 * sum(place < 5 for place in places) / len(rows),
        "count": len(rows),
        "unreadable": [error for _, _, error in rows if error],
    }


def make_loader(args, model, samples):
    """The loader that gives this process its share of the videos, in test order."""
    dataset = data.VideoDataset(samples, args.frames, model.image_size, train=False,
                                views=getattr(args, "views", (1, 1)))
    rank, world = rank_and_world()
    return data.make_loader(dataset, data.Batches(len(samples), args.batch_size, None, rank, world), args.workers)


def parse_args():
    parser = data.Parser(__doc__)
    add_arguments(parser, batch_size="32")
    parser.set_defaults(split=None, batch_size=32)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--zero-shot", action="store_true",
                       help="plain CLIP: --model as it is (the default without --weights)")
    group.add_argument("--template", type=template,
                       help='sentence around a class name (default: as in training; for CLIP "{}")')
    group.add_argument("--views", type=views, default=(1, 1), metavar="VxK",
                       help="V clips of each video, and K = 3 crops of each or the centre, 1: their probabilities are "
                            "averaged (default: 1x1; the paper's fully supervised rows: 4x3)")
    group.add_argument("--out", type=Path, help="folder to write results.json to (default: none)")
    args = parser.parse_args()
    if args.zero_shot and args.weights:
        parser.error("--zero-shot is about plain CLIP: give --model, not --weights")
    # What is not said is as it was when the weights were trained.
    trained = clip.read(args.weights).get("args", {}) if args.weights else {}
    same_data = args.data in (None, trained.get("data"))
    for name in ("frames", "data", "root", "split", "val_list", "labels") if same_data else ("frames",):
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name))
    complete(parser, args, dict(frames=32), dict(frames=8))
    return args


def main():
    args = parse_args()
    device = start(args)
    samples, classes = data.load_samples(args, train=False)
    model = clip.load(args.weights or args.model, device, image_size=args.resolution)
    args.template = args.template or model.template
    tokens = class_tokens(model, classes, args.template)
    if args.out:
        make_folder(args.out)
    say(f"{args.weights or args.model} on {args.val_list or args.data}, split {args.split}: {len(samples)} videos, "
        f"{len(classes)} classes, {args.frames} frames a video, {args.views[0]} x {args.views[1]} views, "
        f"prompt {args.template!r}")
    with autocast(args, device):
        results = evaluate(model, make_loader(args, model, samples), tokens)
    say(f"top-1 {results['top1']:.1f} %   top-5 {results['top5']:.1f} %   of {results['count']} videos")
    for error in results["unreadable"]:
        say(f"counted as wrong: {error}")
    if args.out and rank_and_world()[0] == 0:
        (args.out / "results.json").write_text(json.dumps(results | {"arguments": plain(args)}, indent=1) + "\n")
    finish()


if __name__ == "__main__":
    data.run(main)
