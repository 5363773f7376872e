"""Accuracy: which class name lies nearest to each video?

    prediction = argmax over c of cos(encode_video(video), encode_text(template with the name of class c))

A class is nothing but its name, so any model can be asked about any classes: plain CLIP, zero-shot, about videos that
nobody trained it for, and a fine-tuned one about classes that it has never seen. Every video is counted exactly once,
whatever the batch size and the number of processes; one that cannot be read counts as wrong. Flags that are left out
are as they were when the weights were trained.

    python evaluate.py --zero-shot                        plain CLIP on the toy
    python evaluate.py --weights runs/toy/best.pt         a fine-tuned model, on the data that it was made for
    python evaluate.py --weights runs/base/best.pt --classes base novel --blend 0 0.25 0.5 0.75 1
    python evaluate.py --video clip.mp4 --labels "archery, bowling, juggling balls"
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import importlib.util
import itertools
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
    group.add_argument("--model", choices=clip.MODELS, metavar="NAME",
                       help=f"the CLIP to start from: {', '.join(clip.MODELS)} (default: ViT-B/16; toy: tiny)")
    group.add_argument("--weights", metavar="FILE", help="weights to take in its place, of any CLIP with a ViT")
    group.add_argument("--resolution", type=data.at_least(1), metavar="N",
                       help="pixels a side (default: as the weights were trained, 224)")
    group = parser.add_argument_group("machine")
    group.add_argument("--gpus", type=data.at_least(0), metavar="N", help="0 is the CPU (default: 1 if there is one)")
    group.add_argument("--workers", type=data.at_least(0), metavar="N", default=min(len(os.sched_getaffinity(0)), 8),
                       help="processes that decode, per GPU (default: one per core, at most 8)")
    group.add_argument("--batch-size", type=data.at_least(1), metavar="N",
                       help=f"videos in a batch, over all GPUs (default: {batch_size})")
    group.add_argument("--amp", choices=("bf16", "fp16", "off"),
                       help="mixed precision (default: bf16, fp16 where the GPU has no bf16, off on the CPU)")


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


def complete(parser, args, defaults, tiny_defaults, trained):
    """Fills in what depends on the data set, the model or the machine, and ends wrong calls with exit status 2.
    `trained` are the arguments with which --weights were made, as far as they are known."""
    args.data = args.data or (None if args.val_list else "toy")
    args.root = args.root and Path(args.root).absolute()
    args.model = args.model or trained.get("model") or ("tiny" if args.data == "toy" else "ViT-B/16")
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


def keep_memory():
    """Lets freed memory stay with the process for the next step, where the C library is glibc: on CPUs the toy trains
    5 % faster, ViT-B/16 15 %."""
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD: only larger blocks come from the system one by one
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: no more than this is kept


def start(args):
    """Joins this process to the others that torchrun started, if it did; with --gpus above 1 torchrun is called here.

    Returns the device that this process computes on.
    """
    if args.gpus > 1 and "WORLD_SIZE" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}"]
        os.execv(sys.executable, torchrun + sys.argv)
    keep_memory()
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


def as_dict(args):
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

FRAMES_PER_STEP = 256


def class_tokens(model, classes, template):
    """The tokens [C, L] of class names in a template such as "a photo of a {}."."""
    return model.tokenizer([template.replace("{}", name) for name in classes])


class Predictions(NamedTuple):
    """What M models say of n videos: in the order of the data set, of all processes."""

    scores: torch.Tensor  # float32 [M, n, C], the logarithm of the mean probability over the views, up to a constant
    videos: torch.Tensor  # float32 [M, n, D], embeddings
    texts: torch.Tensor  # float32 [M, C, D]
    labels: torch.Tensor  # int64 [n]
    errors: list  # n strings: why a video could not be read, or ""


@torch.inference_mode()
def predict(models, loader, tokens, frames_per_step=FRAMES_PER_STEP):
    """Shows every video of a `data.make_loader` to each of some CLIPs, with the tokens [C, L] of the class names. A
    video is decoded once, and at most `frames_per_step` frames are encoded at a time. Returns `Predictions`."""
    device = models[0].logit_scale.device
    for model in models:
        model.eval()
    texts = [model.encode_text(tokens.to(device)) for model in models]
    rows = []
    for video, label, index, errors in tqdm(loader, "evaluating", leave=False, unit="batch", disable=hide_bars()):
        if video.ndim == 5:
            video = video[:, None]  # one view: [B, V, T, 3, S, S]
        encoded = [[] for _ in models]
        for images in video.flatten(0, 2).split(frames_per_step):
            images = images.to(device, non_blocking=True)
            for model, parts in zip(models, encoded):
                parts.append(model.encode_image(images))
        outputs = []
        for model, text, parts in zip(models, texts, encoded):
            frames = torch.cat(parts).unflatten(0, video.shape[:3])  # [B, V, T, D]
            logits = model.compare(frames.flatten(0, 1), text).unflatten(0, video.shape[:2])  # [B, V, C]
            score = logits.log_softmax(dim=-1).logsumexp(dim=1)
            outputs.append(torch.cat([score, frames.float().mean(dim=(1, 2))], dim=1).cpu())  # [B, C + D]
        rows += zip(index.tolist(), label.tolist(), errors, torch.stack(outputs, dim=1))
    rows = sorted(gather(rows), key=lambda row: row[0])
    _, labels, errors, outputs = zip(*rows)
    scores, videos = torch.stack(outputs, dim=1).split([len(tokens), texts[0].shape[1]], dim=2)
    return Predictions(scores, videos, torch.stack(texts).float().cpu(), torch.tensor(labels), list(errors))


def accuracy(scores, labels, errors):
    """Accuracy of the scores [n, C] of one model: a dict as `evaluate` returns it."""
    # How many other classes do not score less than the right one: a tie and a NaN count as wrong.
    place = (~(scores < scores.gather(1, labels[:, None]))).sum(dim=1) - 1
    place[[bool(error) for error in errors]] = scores.shape[1] + 5  # unreadable: wrong
    return {
        "top1": 100 * (place < 1).double().mean().item(),
        "top5": 100 * (place < 5).double().mean().item(),
        "count": len(labels),
        "unreadable": [error for error in errors if error],
    }


def evaluate(model, loader, tokens, frames_per_step=FRAMES_PER_STEP):
    """How well a CLIP tells the videos of a `data.make_loader` apart by the tokens [C, L] of their class names.

    Returns a dict: `top1` and `top5`, percent; `count`, the number of videos; `unreadable`, a list of "path: reason" of
    those that could not be read, counted as wrong. With several processes all of them get the figures of the whole.
    """
    found = predict([model], loader, tokens, frames_per_step)
    return accuracy(found.scores[0], found.labels, found.errors)


def confusion(scores, labels, errors):
    """How often videos of one class (row) are taken for another (column), int64 [C, C], without unreadable ones."""
    read = torch.tensor([not error for error in errors])
    matrix = torch.zeros(scores.shape[1], scores.shape[1], dtype=torch.int64)
    ones = torch.ones(int(read.sum()), dtype=torch.int64)
    return matrix.index_put_((labels[read], scores[read].argmax(dim=1)), ones, accumulate=True)


def worst_classes(matrix, scores, labels, errors, classes):
    """A dict for each class that has videos, the worst first: name, top-1 in percent, number of videos, the class that
    it is most often taken for, "" if for none; `matrix` is the confusion."""
    rows = []
    for label, name in enumerate(classes):
        mine = labels == label
        if mine.any():
            top1 = accuracy(scores[mine], labels[mine], [error for error, of in zip(errors, mine) if of])["top1"]
            others = matrix[label].clone()
            others[label] = 0
            rows.append({"class": name, "top1": top1, "count": int(mine.sum()),
                         "taken_for": classes[others.argmax()] if others.any() else ""})
    return sorted(rows, key=lambda row: row["top1"])


def confused_pairs(matrix, classes):
    """The ten pairs of classes that are most often confused: (how often, class, class that it is taken for)."""
    wrong = [(int(matrix[i, j]), classes[i], classes[j]) for i, j in matrix.nonzero().tolist() if i != j]
    return sorted(wrong, reverse=True)[:10]


def classify(model, video, labels):
    """Which of some labels is it? A video uint8 [T, 3, h, w] of `data.read_video` to a list of (label, probability),
    the best first."""
    device = model.logit_scale.device
    video = data.center_crop(video, model.image_size)[None].to(device)
    model.eval()
    with torch.inference_mode():
        probabilities = model(video, class_tokens(model, labels, model.template).to(device))[0].softmax(dim=-1)
    return sorted(zip(labels, probabilities.tolist()), key=lambda pair: -pair[1])


@torch.no_grad()
def blend(plain, tuned, share):
    """A model with (1 - share) of the weights of one and `share` of those of the other (WiSE-FT, arXiv 2109.01903;
    for videos Open-VCLIP, 2302.00624). Raises ValueError if they are no models of the same kind."""
    blended, weights = copy.deepcopy(tuned), plain.state_dict()
    for name, parameter in blended.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            why = "learned prompts cannot be blended" if name in clip.PROMPTS else "is --model right?"
            raise ValueError(f"--blend: {name} is not in both models in the same shape; {why}")
        parameter.lerp_(weights[name], 1 - share)
    return blended


def make_loader(args, model, samples):
    """The loader that gives this process its share of the videos, in test order."""
    dataset = data.VideoDataset(samples, args.frames, model.image_size, train=False,
                                views=getattr(args, "views", (1, 1)))
    rank, world = rank_and_world()
    return data.make_loader(dataset, data.Batches(len(samples), args.batch_size, None, rank, world), args.workers)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b8a800")
MARKERS = "os^DvP*X"
MAX_NAMES = 64  # classes that a picture has room for by name


@contextlib.contextmanager
def figure(path, *args, **options):
    """Axes of matplotlib to draw on; what is drawn is saved to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(*args, layout="constrained", **options)
    yield axes
    picture.savefig(path, dpi=120)
    plt.close(picture)


def draw_confusion(matrix, classes, path):
    """Draws a confusion matrix [C, C] in percent of each row."""
    side = 3 + 0.2 * min(len(classes), MAX_NAMES)
    with figure(path, figsize=(side + 1, side)) as axes:
        shares = 100 * matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
        bar = axes.figure.colorbar(axes.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100), shrink=0.8)
        bar.set_label("% of the videos of the class")
        axes.set(xlabel="taken for", ylabel="class")
        if len(classes) <= MAX_NAMES:
            axes.set_xticks(range(len(classes)), classes, rotation=90)
            axes.set_yticks(range(len(classes)), classes)
    say(f"drawn: {path}")


def draw_blend(shares, averages, path):
    """Draws accuracy over the shares of the fine-tuned weights, in whose order the models are in `averages`."""
    with figure(path, figsize=(6, 4)) as axes:
        for i, classes in enumerate(dict.fromkeys(row["classes"] for row in averages)):
            rows = (row for row in averages if row["classes"] == classes)
            x, top1, deviations = zip(*sorted((share, *row["top1"]) for share, row in zip(shares, rows)))
            axes.errorbar(x, top1, None if None in deviations else deviations, color=COLORS[i], marker=MARKERS[i],
                          capsize=3, label=classes)
        axes.set(xlabel="share of the fine-tuned weights; 0 is plain CLIP", ylabel="top-1, %", xlim=(-0.03, 1.03))
        axes.legend()
    say(f"drawn: {path}")


def flatten(embeddings):
    """Embeddings [n, D] to points [n, 2]: t-SNE if scikit-learn is installed, else principal components."""
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
    if importlib.util.find_spec("sklearn") and len(embeddings) > 3:
        from sklearn.manifold import TSNE

        return "t-SNE", TSNE(perplexity=min(30, len(embeddings) / 4), random_state=0).fit_transform(embeddings.numpy())
    centered = embeddings - embeddings.mean(dim=0)
    return "principal component", (centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T).numpy()


def draw_embeddings(names, found, classes, path):
    """Draws the video embeddings of each model in two dimensions, side by side, coloured by class (the paper's figure
    1); of more than MAX_NAMES classes those whose numbers are spread over the list."""
    shown = sorted({round(i) for i in torch.linspace(0, len(classes) - 1, MAX_NAMES).tolist()})
    shown = shown if len(classes) > MAX_NAMES else range(len(classes))
    read = torch.tensor([not error for error in found.errors])
    columns = -(-len(shown) // 26)
    with figure(path, 1, len(names), figsize=(5 * len(names) + 2 * columns, 5), squeeze=False) as (row,):
        for axes, name, videos in zip(row, names, found.videos):
            kept = read & torch.isin(found.labels, torch.tensor(shown))
            kind, points = flatten(videos[kept])
            for i, label in enumerate(shown):
                mine = (found.labels[kept] == label).numpy()
                axes.scatter(*points[mine].T, s=22, color=COLORS[i % 8], marker=MARKERS[(i + i // 8) % 8], linewidths=0,
                             label=classes[label])
            axes.set(xticks=[], yticks=[], xlabel=f"{kind} 1\n{name}", ylabel=f"{kind} 2")
        handles, labels = row[-1].get_legend_handles_labels()
        row[-1].figure.legend(handles, labels, loc="outside right upper", ncols=columns, fontsize=8)
    say(f"drawn: {path}")


@torch.inference_mode()
def attention(model, images):
    """Where the class token of each image [N, 3, S, S] looks among the patches, float [2, N, g, g], 1 at most: in the
    last layer, the mean of its heads, and through all layers, by attention rollout (arXiv 2005.00928)."""
    layers, patch = [], model.visual.conv1.stride[0]

    def keep(module, inputs):
        q, k, _ = module.project(inputs[0])  # [N, heads, L, 64]
        layers.append((q @ k.mT / 8).softmax(dim=-1).mean(dim=1))  # [N, L, L]

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.visual.transformer.resblocks]
    model.encode_image(images)
    for hook in hooks:
        hook.remove()
    rollout = identity = torch.eye(layers[0].shape[-1], device=images.device)
    for layer in layers:
        rollout = (layer + identity) / 2 @ rollout  # a block adds what it attends to to what it had
    grid = images.shape[-1] // patch
    maps = torch.stack([layers[-1], rollout])[:, :, 0, 1 : 1 + grid ** 2].unflatten(-1, (grid, grid))
    return (maps / maps.amax(dim=(-1, -2), keepdim=True)).float().cpu()


def draw_attention(models, video, path, tile=144):
    """Draws where each model of {name: CLIP} looks in the frames of a video uint8 [T, 3, S, S]: a row of frames, and
    below it rows of the same frames, dark where nothing is looked at. A GIF shows one frame after the other."""
    def resize(x):
        return torch.nn.functional.interpolate(x, (tile, tile), mode="bicubic", antialias=True).clamp(0, 1)

    frames = resize(video.float() / 255)
    maps = {name: attention(model, video.to(model.logit_scale.device)) for name, model in models.items()}
    rows = [("frame", frames)]
    for place, kind in enumerate(("last layer", "rollout")):
        rows += [(f"{name}\n{kind}", frames * (0.15 + 0.85 * resize(maps[name][place][:, None]))) for name in models]

    def sheet(shown):
        return data.picture_grid([(title, (255 * row[shown]).byte()) for title, row in rows], tile)

    if path.suffix == ".gif":
        first, *others = [sheet([i]) for i in range(len(video))]
        first.save(path, save_all=True, append_images=others, duration=250, loop=0)
    else:
        sheet(data.sample_frames(len(video), min(len(video), 8))).save(path)
    say(f"drawn: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    """The arguments, complete and consistent; ends wrong calls with exit status 2."""
    parser = data.Parser(__doc__)
    add_arguments(parser, batch_size="32")
    parser.set_defaults(split=None, classes=None, batch_size=32)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--zero-shot", action="store_true", help="plain CLIP (the default without --weights)")
    group.add_argument("--template", type=template, metavar="TEXT",
                       help='sentence around a class name (default: as in training; plain CLIP: "{}")')
    group.add_argument("--views", type=views, default=(1, 1), metavar="VxK",
                       help="V clips of each video, K crops of each: 1 or 3 (default: 1x1)")
    group.add_argument("--blend", type=data.at_least(0, float, 1), nargs="+", metavar="SHARE",
                       help="mix the weights of --model, 0, with --weights, 1; of several, a picture is drawn")
    group.add_argument("--frames-per-step", type=data.at_least(1), metavar="N", default=FRAMES_PER_STEP,
                       help="frames that a GPU encodes at once (default: %(default)s)")
    group = parser.add_argument_group("a look at the model")
    group.add_argument("--video", nargs="+", type=Path, metavar="PATH",
                       help="your own videos, or folders of them, to be told apart by --labels: names between commas, "
                            "or a file with one a line (default: the classes of --weights)")
    group.add_argument("--attention", nargs="?", const="attention.png", metavar="NAME",
                       help="draw where the class token looks; .gif moves (default: %(const)s)")
    group.add_argument("--embeddings", action="store_true", help="save them as embeddings.npz, and draw them")
    group.add_argument("--out", type=Path, metavar="FOLDER",
                       help="for all files, also results.json and confusion.png (default: here, without these two)")
    args = parser.parse_args()
    if args.zero_shot and args.weights:
        parser.error("--zero-shot is about plain CLIP: give --model, not --weights")
    if args.blend and not args.weights:
        parser.error("--blend needs --weights beside plain CLIP")
    if args.attention and not re.fullmatch(r"[^/]+\.(png|gif)", args.attention):
        parser.error(f"--attention {args.attention} is no file name that ends in .png or .gif; its folder is --out")
    for name in ("split", "classes", "blend"):
        if len(set(getattr(args, name) or ())) < len(getattr(args, name) or ()):
            parser.error(f"--{name} names something twice")
    # What is not said is as it was when the weights were trained.
    content = clip.read(args.weights) if args.weights else {}
    trained = content.get("args", {})
    if trained.get("data") and args.data in (None, trained["data"]) and set(args.split or ()) - {trained.get("split")}:
        say(f"warning: {args.weights} was trained on split {trained.get('split')}; in other splits are its own videos")
    names = ["frames", "model"]
    if args.video:
        if args.labels is None and not content.get("classes"):
            parser.error("--video needs --labels")
        if args.embeddings or len(args.blend or ()) > 1:
            parser.error("--video does not go with --embeddings or several --blend")
        args.classes = content["classes"] if args.labels is None else read_labels(args.labels)
        args.labels, args.model = None, args.model or trained.get("model", "ViT-B/16")
    elif args.data in (None, trained.get("data")):
        names += ["data", "root", "split", "val_list", "labels"] + ([] if args.val_list else ["classes"])
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name))
    args.split = args.split if isinstance(args.split, list) else [args.split or 1]
    args.classes = args.classes if isinstance(args.classes, list) else [args.classes or "all"]
    complete(parser, args, dict(frames=32), dict(frames=8), trained)
    return args


def read_labels(labels):
    """Class names: the lines of a file, the names of a CSV of id,name, or what the commas separate."""
    if labels.endswith(".csv"):
        with data.told_as(labels):
            names = [row["name"] for row in data.read_csv(labels)]
    elif labels.endswith(".txt") or Path(labels).is_file():
        names = data.lines(Path(labels))
    else:
        names = labels.split(",")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise ValueError(f"--labels {labels!r} names nothing")
    return names


def load_models(args, device):
    """The models to be looked at, {name: CLIP}: plain and fine-tuned to be compared in pictures, or all the blends."""
    model = clip.load(args.weights or args.model, device, image_size=args.resolution)
    both = args.weights and (args.blend or args.attention or args.embeddings)
    plain = clip.load(args.model, device, image_size=args.resolution) if both else None
    if args.blend:
        return {f"blend {share:g}": blend(plain, model, share) for share in args.blend}
    return ({args.model: plain} if both else {}) | {args.weights or args.model: model}


def label_videos(args, models):
    """Prints which of the labels each of the user's videos shows; of several also as predictions.csv."""
    paths = []
    for path in args.video:
        if not path.exists():
            raise FileNotFoundError(f"--video {path}: there is no such file")
        found = [path]
        if path.is_dir() and not data.image_files(path):  # a video may be a folder of its frames
            found = sorted(inside for inside in path.rglob("*") if inside.suffix.lower() in data.VIDEO_FILES
                           or inside.is_dir() and data.image_files(inside))
        if not found:
            raise ValueError(f"--video {path}: no videos lie in this folder")
        paths += found
    model = list(models.values())[-1]
    with autocast(args, model.logit_scale.device):
        found = predict([model], make_loader(args, model, [(path, 0) for path in paths]),
                        class_tokens(model, args.classes, args.template), args.frames_per_step)
    probabilities = found.scores[0].softmax(dim=-1)
    rows = []
    if len(paths) == 1 and not found.errors[0]:
        best = probabilities[0].topk(min(5, len(args.classes)))
        for probability, label in zip(best.values.tolist(), best.indices.tolist()):
            say(f"{100 * probability:5.1f} %  {'█' * round(30 * probability):30}  {args.classes[label]}")
        if not args.out:
            return paths
    for path, row, error in zip(paths, probabilities, found.errors):
        label = "" if error else args.classes[row.argmax()]
        rows.append({"video": str(path), "label": label, "probability": None if error else round(row.max().item(), 4),
                     "error": error.removeprefix(f"{path}: ")})
        if len(paths) > 1 or error:
            say(f"{'unreadable' if error else f'{100 * row.max():5.1f} %'}  {label:24}  {error or path}")
    if all(found.errors):
        raise ValueError("none of the videos can be read")
    if rank_and_world()[0] == 0:
        path = (args.out or Path()) / "predictions.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        say(f"written: {path}")
    return [path for path, error in zip(paths, found.errors) if not error]


def measure(args, models):
    """Accuracy of all models on all splits and classes that are asked for: a list of dicts, the figures of `evaluate`
    and those of each class; and the paths of the videos that could be read. What --embeddings asks for is saved and
    drawn, and with --out the confusion."""
    runs, paths, last = [], [], list(models.values())[-1]
    main_process, out = rank_and_world()[0] == 0, args.out or Path()
    for split, classes in itertools.product(args.split, args.classes):
        part = copy.copy(args)
        part.split, part.classes = split, classes
        samples, names = data.load_samples(part, train=False)
        with autocast(args, last.logit_scale.device):
            found = predict(list(models.values()), make_loader(args, last, samples),
                            class_tokens(last, names, args.template), args.frames_per_step)
        paths += [path for (path, _), error in zip(samples, found.errors) if not error]
        for model, scores in zip(models, found.scores):
            matrix = confusion(scores, found.labels, found.errors)
            runs.append({"model": model, "split": split, "classes": classes,
                         **accuracy(scores, found.labels, found.errors),
                         "per_class": worst_classes(matrix, scores, found.labels, found.errors, names),
                         "confused": confused_pairs(matrix, names)})
        name = (f"-{classes}" if len(args.classes) > 1 else "") + (f"-{split}" if len(args.split) > 1 else "")
        if main_process and args.out:
            draw_confusion(matrix, names, out / f"confusion{name}.png")
        if main_process and args.embeddings:
            np.savez(out / f"embeddings{name}.npz", models=list(models), videos=found.videos, texts=found.texts,
                     labels=found.labels, classes=names, paths=[str(path) for path, _ in samples])
            draw_embeddings(list(models), found, names, out / f"embeddings{name}.png")
    return runs, paths


def average(runs):
    """Mean and standard deviation over the splits, in percent, by model and classes: a list of dicts. Where there are
    base and novel classes, also of their harmonic mean, 2 b n / (b + n)."""
    def row(model, classes, count, **figures):
        return {"model": model, "classes": classes, "count": count} | {
            name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
            for name, values in figures.items()}

    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        top1 = {}
        for classes in dict.fromkeys(run["classes"] for run in runs):
            mine = [run for run in runs if (run["model"], run["classes"]) == (model, classes)]
            top1[classes] = [run["top1"] for run in mine]
            count = sum(run["count"] for run in mine)
            rows.append(row(model, classes, count, top1=top1[classes], top5=[run["top5"] for run in mine]))
        if {"base", "novel"} <= top1.keys():
            rows.append(row(model, "harmonic mean", "",
                            top1=[2 * b * n / max(b + n, 1e-9) for b, n in zip(top1["base"], top1["novel"])]))
    return rows


def report(args, runs, averages):
    """Prints accuracies, the worst classes of the last model, and what could not be read."""
    def percent(row, name):
        value, deviation = row.get(name, (None, None))
        return "" if value is None else f"{value:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")

    width = max(len(row["model"]) for row in averages)
    say(f"\n{'':{width}}  {'classes':13}  {'top-1, %':>12}  {'top-5, %':>12}  videos")
    for row in averages:
        say(f"{row['model']:{width}}  {row['classes']:13}  {percent(row, 'top1'):>12}  {percent(row, 'top5'):>12}  "
            f"{row['count']:6}")
    last = [run for run in runs if (run["model"], run["split"]) == (runs[-1]["model"], runs[0]["split"])]
    worst = sorted((row for run in last for row in run["per_class"] if row["top1"] < 100), key=lambda row: row["top1"])
    width = max(13, *(len(row["class"]) for row in worst[:10])) if worst else 13
    of_split = f" (of split {runs[0]['split']})" if len(args.split) > 1 else ""
    say(f"\n{'worst classes':{width}}  top-1, %  videos  most often taken for{of_split}" if worst else "")
    for row in worst[:10]:
        say(f"{row['class']:{width}}  {row['top1']:8.1f}  {row['count']:6}  {row['taken_for']}")
    for error in dict.fromkeys(error for run in runs for error in run["unreadable"]):
        say(f"counted as wrong: {error}")


def main():
    """Accuracy or labels of own videos, and the pictures that are asked for."""
    args = parse_args()
    device = start(args)
    if args.out:
        make_folder(args.out)
    models = load_models(args, device)
    model, out, main_process = list(models.values())[-1], args.out or Path(), rank_and_world()[0] == 0
    args.template = args.template or model.template
    what = "your videos" if args.video else (
        f"{args.val_list or args.data}, split {' '.join(map(str, args.split))}, {' and '.join(args.classes)} classes")
    say(f"{args.weights or args.model} on {what}, {args.frames} frames a video, {args.views[0]} x {args.views[1]} "
        f"views, prompt {args.template!r}")
    if args.video:
        paths = label_videos(args, models)
    else:
        runs, paths = measure(args, models)
        paths = sorted({paths[i * len(paths) // 3] for i in range(3)} if paths else ())
        averages = average(runs)
        report(args, runs, averages)
        if main_process and len(args.blend or ()) > 1:
            draw_blend(args.blend, averages, out / "blend.png")
        if main_process and args.out:
            results = {"averages": averages, "runs": runs, "command": sys.argv, "arguments": as_dict(args),
                       "sha256": clip.sha256(clip.locate(args.weights or args.model)), "torch": torch.__version__}
            (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    if main_process and args.attention:
        for number, path in enumerate(paths, 1):
            video = data.read_video(path, args.frames, short_side=round(model.image_size * data.SHORT_SIDE))
            name = Path(args.attention)
            name = name.with_stem(f"{name.stem}-{number}-{path.stem}") if len(paths) > 1 else name
            draw_attention(models, data.center_crop(video, model.image_size), out / name)
    finish()


if __name__ == "__main__":
    data.run(main)
