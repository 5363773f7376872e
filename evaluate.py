"""Accuracy: which class name is nearest to each video?

    prediction = argmax over c of cos(encode_video(video), encode_text(template with the name of class c))

A class is nothing but its name, so any model can be asked about any classes: plain CLIP zero-shot, and a fine-tuned
one about classes that it has never seen. Every video counts exactly once, in batches of any size on any number of GPUs.

    python evaluate.py --zero-shot                        plain CLIP on the toy
    python evaluate.py --weights runs/toy/best.pt         a fine-tuned model, as it was trained
    python evaluate.py --weights runs/base/best.pt --classes base novel --blend 0 0.25 0.5 0.75 1
    python evaluate.py --video clip.mp4 --labels "archery, bowling, juggling balls" --model ViT-B/16
"""
import copy
import csv
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import clip
import data
from data import UserError, rank, say

# ---- Flags, processes and precision, for all scripts ----------------------------------------------------------------

def add_arguments(parser, training=False):
    """The flags about data, model and machine, the same in every script."""
    data.add_arguments(parser, training=training)
    parser.epilog = "Defaults depend on --data, --model and --weights: give these before --help to see theirs."
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=clip.MODELS, metavar="NAME", help=f"{', '.join(clip.MODELS)} (default: %(default)s)")
    add("--weights", metavar="FILE", help="use this file of weights, of any CLIP with a ViT, in its place")
    add("--template", metavar="TEXT", help="sentence around a class name, which {} stands for")
    add("--resolution", type=data.at_least(1), metavar="N", help="pixels a side, if not the model's")
    add = parser.add_argument_group("machine").add_argument
    cores = min(getattr(os, "process_cpu_count", os.cpu_count)(), 8)
    add("--gpus", type=data.at_least(0), metavar="N", help="0 is the CPU; by default 1 if there is one")
    add("--workers", type=data.at_least(0), metavar="N", default=cores, help="processes per GPU (default: %(default)s)")
    add("--batch-size", type=data.at_least(1), metavar="N", help="videos in a batch of all GPUs (default: %(default)s)")
    add("--amp", choices=("bf16", "fp16", "off"), help="mixed precision; by default on where the GPU has it")


def first_look(parser, paper, tiny):
    """Sets the defaults, from the table `tiny` for that model and `paper` for others. Returns the flags as given, the
    content of --weights and, of a checkpoint of this project, the arguments that it was trained with."""
    first = data.Parser(None, add_help=False)
    first.add_argument("--data", type=data.name_or_folder)
    for flag in ("--model", "--weights", "--val-list", "--video", "--resume"):
        first.add_argument(flag)
    given = first.parse_known_args()[0]
    content = clip.read(given.weights) if given.weights else {}
    trained = content["args"] if {"args", "classes", "template"} <= content.keys() else {}
    name = given.data or (None if given.val_list or given.video else "toy")
    model = given.model or trained.get("model") or ("tiny" if name == "toy" else "ViT-B/16")
    parser.set_defaults(data=name, model=model, **(tiny if model == "tiny" else paper))
    return given, content, trained


def choose_device(parser, args):
    """Completes --gpus and --amp by what this machine has, and the number of processes, args.world."""
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    asked = min(found, 1) if args.gpus is None else args.gpus
    if asked > max(found, 1):
        parser.error(f"--gpus {asked}: this machine has {found}")
    if asked > found:
        say(f"warning: --gpus {asked}, but there is no GPU here: running on the CPU")
    args.gpus = min(asked, found)
    if args.amp is None:
        kind = torch.accelerator.current_accelerator().type if args.gpus else "cpu"
        # Older GPUs, such as the Tesla T4, emulate bf16, which is slow.
        bf16 = kind == "xpu" or (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        args.amp = "bf16" if bf16 else "fp16" if kind == "cuda" else "off"
    args.world = int(os.environ.get("WORLD_SIZE", max(args.gpus, 1)))


def start(args):
    """Joins the processes that torchrun has started, or starts torchrun for --gpus above 1. Returns the device."""
    if args.gpus > 1 and "WORLD_SIZE" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", f"--nproc-per-node={args.gpus}", *sys.argv])
        sys.exit()
    device = torch.device("cpu")
    if args.gpus:
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group()
    return device


def gather(rows):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def autocast(args, device):
    """Mixed precision as --amp asks for it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


# ---- Accuracy -------------------------------------------------------------------------------------------------------

def class_tokens(model, classes):
    """The tokens [C, L] of class names in the template of a model, such as "a photo of a {}.", on its device."""
    if "{}" not in model.template:
        raise UserError(f"the template {model.template!r} has no {{}} for the class name")
    return model.tokenizer([model.template.replace("{}", name) for name in classes]).to(model.logit_scale.device)


def make_loader(args, image_size, samples, batch_size=None):
    """The loader that gives this process its share of the videos, [B, V, T, 3, S, S], in test order."""
    views = getattr(args, "views", (1, 1))
    batch_size = batch_size or math.ceil(args.batch_size / args.world / math.prod(views))  # views are videos, too
    clips = data.VideoDataset(samples, args.frames, image_size, train=False, views=views)
    share = [(0, index) for index in range(rank(), len(samples), args.world)]  # in all processes each index once
    batches = torch.utils.data.BatchSampler(share, batch_size, drop_last=False)
    return data.make_loader(clips, batches, args.workers)


@torch.inference_mode()
def collect(loader, device, compute):
    """What `compute` gives for videos [B, V, T, 3, S, S] on the device, of all processes in the order of the data set:
    the outputs [n, ...], the labels, int64 [n], and the errors, n strings, "" for videos that could be read."""
    rows = []
    for video, label, index, error in tqdm(loader, "evaluating", leave=False, unit="batch", disable=rank() > 0 or None):
        output = compute(video.to(device, non_blocking=True)).float().cpu()
        rows += zip(index.tolist(), output, label.tolist(), error)
    _, outputs, labels, errors = zip(*sorted(gather(rows), key=lambda row: row[0]))
    return torch.stack(outputs), torch.tensor(labels), list(errors)


def predict(models, loader, tokens):
    """What M CLIPs say of all n videos of a `make_loader`, each given the tokens [C, L] of the class names: scores
    [n, M, C], the log of the mean probability over the views, up to a constant; labels and errors as in `collect`."""
    def scores(video):
        views = video.flatten(0, 1)  # [B * V, T, 3, S, S]
        logits = [model(views, text).unflatten(0, video.shape[:2]) for model, text in zip(models, tokens)]
        return torch.stack(logits, dim=1).log_softmax(dim=-1).logsumexp(dim=2)  # [B, M, V, C] to [B, M, C]

    for model in models:
        model.eval()
    return collect(loader, tokens[0].device, scores)


def accuracy(scores, labels, errors, classes=None):
    """Accuracy of the scores [n, C] of one model: a dict as `evaluate` returns it; with the names of the classes also
    `per_class`, the name, top-1 and number of videos of each class that has videos, the worst first."""
    # How many other classes do not score less than the right one: a tie and a NaN count as wrong.
    before = (~(scores < scores.gather(1, labels[:, None]))).sum(dim=1) - 1
    before[[bool(error) for error in errors]] = 5  # unreadable: wrong
    top1, top5 = (before < 1).double(), (before < 5).double()
    results = {"top1": 100 * top1.mean().item(), "top5": 100 * top5.mean().item(), "count": len(labels),
               "unreadable": [error for error in errors if error]}
    if classes:
        rows = [{"class": classes[label], "top1": 100 * top1[labels == label].mean().item(),
                 "count": (labels == label).sum().item()} for label in labels.unique().tolist()]
        results["per_class"] = sorted(rows, key=lambda row: row["top1"])
    return results


def evaluate(model, loader, tokens):
    """Accuracy of a CLIP on the videos of a `make_loader`, given the tokens [C, L] of their class names: a dict of
    `top1` and `top5`, percent; `count`, the number of videos; and `unreadable`, a list of "path: reason" of those that
    could not be read and count as wrong. Each of several processes gets the figures of all."""
    scores, labels, errors = predict([model], loader, [tokens])
    return accuracy(scores[:, 0], labels, errors)


def classify(model, video, labels):
    """A video uint8 [T, 3, h, w] of `data.read_video` to a list of (label, probability), the best first."""
    tokens = class_tokens(model, labels)
    model.eval()
    with torch.inference_mode():
        video = data.center_crop(video, model.image_size)[None].to(tokens.device)
        probabilities = model(video, tokens)[0].softmax(dim=-1)
    return sorted(zip(labels, probabilities.tolist()), key=lambda pair: -pair[1])


@torch.no_grad()
def blend(plain, tuned, share):
    """A model of the weights (1 - share) * plain + share * tuned (WiSE-FT, 2109.01903; Open-VCLIP, 2302.00624)."""
    blended, weights = copy.deepcopy(tuned), plain.state_dict()
    for name, parameter in blended.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"--blend: {name} is not in both models in the same shape")
        parameter.lerp_(weights[name], 1 - share)
    return blended


# ---- Pictures -------------------------------------------------------------------------------------------------------

def draw_embeddings(embeddings, labels, classes, path):
    """Draws two principal components of embeddings {model: [n, D]}, coloured by class, of at most 70 classes."""
    from matplotlib.figure import Figure

    kept, names = (labels >= 0) & (labels < 70), classes[:70]  # as many as there are pairs of a colour and a marker
    columns = math.ceil(len(names) / 26)
    picture = Figure(figsize=(5 * len(embeddings) + 2 * columns, 5), layout="constrained")
    for axes, (model, videos) in zip(picture.subplots(1, len(embeddings), squeeze=False)[0], embeddings.items()):
        points = torch.nn.functional.normalize(videos[kept], dim=-1)
        points = points - points.mean(dim=0)
        points = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, [-1, -2]]  # of the largest variance
        for i, name in enumerate(names):
            axes.scatter(*points[labels[kept] == i].T, s=22, color=f"C{i % 10}", marker="os^DvPX"[i % 7], label=name)
        axes.set(xticks=[], yticks=[], xlabel=f"principal component 1\n{model}", ylabel="principal component 2")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right upper", ncols=columns, fontsize=8)
    picture.savefig(path, dpi=120)
    say(f"drawn: {path}")


@torch.inference_mode()
def attention(model, images):
    """The attention of the class token of images [N, 3, S, S] to their g x g patches in the last layer: [N, g, g]."""
    block, stored = model.visual.transformer.resblocks[-1], []
    with block.ln_1.register_forward_hook(lambda module, inputs, output: stored.append(output)):
        model.encode_image(images)
    q, k, _ = block.attn.project(stored[0])  # [N, heads, L, 64]
    weights = (q[:, :, 0:1] @ k.mT / 64 ** 0.5).softmax(dim=-1).mean(dim=1)  # [N, 1, L]
    grid = images.shape[-1] // model.visual.conv1.stride[0]
    patches = weights[:, 0, 1 : 1 + grid ** 2].unflatten(-1, (grid, grid))
    return (patches / patches.amax(dim=(-1, -2), keepdim=True)).float().cpu()


def draw_attention(models, video, path):
    """Draws 8 frames of a video uint8 [T, 3, S, S], and once for each of {name: CLIP}, dark where it does not look."""
    video = video[data.sample_frames(len(video), min(len(video), 8))]
    rows = [("frame", video)]
    for name, model in models.items():
        light = attention(model, video.to(model.logit_scale.device))[:, None]
        light = torch.nn.functional.interpolate(light, video.shape[-2:], mode="bicubic").clamp(0, 1)
        rows.append((name, (video * (0.15 + 0.85 * light)).byte()))
    data.picture_grid(rows).save(path)
    say(f"drawn: {path}")


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_args():
    """The arguments, complete and consistent, and the content of --weights; ends wrong calls with exit status 2."""
    parser = data.Parser(__doc__)
    add_arguments(parser)
    add = parser.add_argument_group("evaluation, and a look at the model").add_argument
    add("--zero-shot", action="store_true", help="plain CLIP, as without --weights")
    add("--views", default="1x1", metavar="VxK", help="V clips of a video, K crops (default: %(default)s)")
    add("--blend", type=data.at_least(0, float, 1), nargs="+", metavar="SHARE",
        help="mix the weights of --model, 0, with --weights, 1")
    add("--video", nargs="+", type=Path, metavar="PATH",
        help="label your own videos, or folders of them: by --labels, names or a file, or the classes of --weights")
    add("--attention", action="store_true", help="draw where the class token looks, attention*.png")
    add("--embeddings", action="store_true", help="save and draw them, embeddings*.npz and .png")
    add("--out", type=Path, metavar="FOLDER", help="for these files, results.json and predictions.csv")

    given, content, trained = first_look(parser, dict(frames=32, batch_size=32), dict(frames=8, batch_size=32))
    if trained:
        parser.set_defaults(frames=trained["frames"], resolution=trained.get("resolution"))
    if trained and given.data in (None, trained["data"]) and not given.val_list and not given.video:
        several = {name: [trained[name]] for name in ("split", "classes", "val_list", "labels") if trained.get(name)}
        parser.set_defaults(data=trained["data"], root=trained.get("root"), **several)
    args = parser.parse_args()
    choose_device(parser, args)
    views = re.fullmatch("([1-9][0-9]*)x([13])", args.views)
    if not views:
        parser.error(f"--views: {args.views!r} is not a number of clips x 1 or 3 crops, such as 4x3")
    args.views = int(views[1]), int(views[2])
    if args.zero_shot and args.weights:
        parser.error("--zero-shot is about plain CLIP: give --model, not --weights")
    if args.blend and not args.weights:
        parser.error("--blend needs --weights beside plain CLIP")
    if args.video:
        if args.labels is None and not content.get("classes"):
            parser.error("--video needs --labels")
        if args.embeddings or len(args.blend or ()) > 1:
            parser.error("--video does not go with --embeddings or several --blend")
        return args, content
    data.check_lists(parser, args)
    if args.val_list and args.split != [1]:
        parser.error("--split does not go with --val-list: give several lists")
    if len(args.labels or [""]) not in (1, len(args.val_list or [""])):
        parser.error("--labels: give one file, or one for each of the lists")
    return args, content


def load_models(args, device):
    """The models to be looked at, {name: CLIP}: plain and fine-tuned to be compared in pictures, or all the blends."""
    two = args.weights and (args.blend or args.attention or args.embeddings)
    names = [args.model, args.weights] if two else [args.weights or args.model]
    models = [clip.load(name, device, image_size=args.resolution) for name in names]
    for model in models:
        model.template = args.template or model.template
    if args.blend:
        return {f"blend {share:g}": blend(*models, share) for share in args.blend}
    return dict(zip(names, models))


def read_labels(labels):
    """Class names: those in a file, or what the commas separate; `labels` is a list of str, the values of --labels."""
    text = ",".join(labels)
    if os.path.isfile(text) or re.search(r"\.(txt|csv|tsv|json)$", text):
        names = data.read_names(text).values()
    else:
        names = filter(None, map(str.strip, re.split(r"[,\n]", text)))
    names = list({" ".join(name.lower().split()): name for name in names}.values())  # as the tokenizer sees them
    if len(names) < 2:
        raise UserError(f"--labels {text!r} names fewer than two classes")
    return names


def label_videos(args, paths, model, classes):
    """Prints the class of each video, or the five best of a single one; writes those of several. Returns those read."""
    loader = make_loader(args, model.image_size, [(path, 0) for path in paths])
    scores, _, errors = predict([model], loader, [class_tokens(model, classes)])
    table, shown = [], 5 if len(paths) == 1 else 1
    for path, row, error in zip(paths, scores[:, 0].softmax(dim=-1), errors):  # [C]
        if error:
            say(f"unreadable  {error}")
            table.append((path, "", "", error.removeprefix(f"{path}: ")))
            continue
        ranking = sorted(zip(row.tolist(), classes), reverse=True)
        for probability, name in ranking[:shown]:
            say(f"{100 * probability:5.1f} %  {name:24}  {path}")
        table.append((path, ranking[0][1], round(ranking[0][0], 4), ""))
    if all(errors):
        raise UserError("none of the videos can be read")
    if rank() == 0 and (len(paths) > 1 or args.out):
        file = (args.out or Path()) / "predictions.csv"
        # Names of files need not be valid text: "surrogateescape" writes their bytes as they are.
        with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            csv.writer(stream).writerows([("video", "label", "probability", "error"), *table])
        say(f"written: {file}")
    return [path for path, error in zip(paths, errors) if not error]


def load_parts(args, known_classes):
    """The videos of all splits or lists and kinds of classes that are asked for: tuples (split, kind, samples, names).
    Own videos without train/ are classified among the `known_classes` of a checkpoint, if theirs are some of them."""
    parts = []
    for i, split in enumerate(args.val_list or args.split):
        for kind in args.classes:
            part = copy.copy(args)
            part.split, part.val_list = (1, split) if args.val_list else (split, None)
            part.classes, part.labels = kind, args.labels and args.labels[i % len(args.labels)]
            samples, names = data.load_samples(part, train=False)
            own = args.data not in (None, *data.DATASETS)
            if own and set(names) < set(known_classes) and not Path(args.root or args.data, "train").is_dir():
                samples = [(path, known_classes.index(names[label])) for path, label in samples]
                names = known_classes
            parts.append((split, kind, samples, names))
    return parts


def measure(args, models, parts):
    """Accuracy of all models on the `parts` of `load_parts`, a list of dicts, and the paths of the videos read."""
    runs, paths = [], []
    for number, (split, kind, samples, names) in enumerate(parts, 1):
        loader = make_loader(args, next(iter(models.values())).image_size, samples)
        tokens = [class_tokens(model, names) for model in models.values()]
        scores, labels, errors = predict(list(models.values()), loader, tokens)
        paths += [path for (path, _), error in zip(samples, errors) if not error]
        for name, score in zip(models, scores.unbind(dim=1)):
            runs.append({"model": name, "split": split, "classes": kind, **accuracy(score, labels, errors, names)})
        if args.embeddings:
            path = (args.out or Path()) / (f"embeddings-{number}" if len(parts) > 1 else "embeddings")
            save_embeddings(models, loader, tokens, names, path)
    return runs, paths


@torch.inference_mode()
def save_embeddings(models, loader, tokens, classes, path):
    """Saves the embeddings of the videos of a loader and of the class names as `path`.npz, and draws the videos'."""
    def embed(video):
        embeddings = [model.encode_video(video.flatten(0, 1)) for model in models.values()]  # [B * V, D]
        return torch.stack(embeddings, dim=1).unflatten(0, video.shape[:2]).mean(dim=1)  # over the views: [B, M, D]

    videos, labels, errors = collect(loader, tokens[0].device, embed)
    texts = torch.stack([model.encode_text(text) for model, text in zip(models.values(), tokens)]).float().cpu()
    videos = videos.transpose(0, 1)  # [M, n, D]
    if rank() == 0:
        np.savez(path.with_suffix(".npz"), models=list(models), videos=videos, texts=texts, labels=labels,
                 classes=classes, paths=loader.dataset.paths)
        labels[[bool(error) for error in errors]] = -1  # not drawn
        draw_embeddings(dict(zip(models, videos)), labels, classes, path.with_suffix(".png"))


def report(args, runs):
    """Prints the accuracy of each model, over several splits as mean and standard deviation; of base and novel classes
    also the harmonic mean, 2 b n / (b + n); and the worst classes of the last run. With --out writes results.json."""
    rows, width = {}, max(len(run["model"]) for run in runs)
    for run in runs:
        rows.setdefault((run["model"], run["classes"]), []).append((run["top1"], run["top5"]))
    for name, classes in [*rows]:
        if classes == "base" and (name, "novel") in rows:
            pairs = [(base[0], novel[0]) for base, novel in zip(rows[name, "base"], rows[name, "novel"])]  # top-1
            rows[name, "harmonic mean"] = [(statistics.harmonic_mean(pair),) for pair in pairs]
    say(f"\n{sum(run['count'] for run in runs if run['model'] == runs[0]['model'])} videos")
    say(f"{'':{width}}  {'classes':13}  {'top-1, %':>12}  {'top-5, %':>12}")
    for (name, classes), figures in rows.items():
        cells = [f"{statistics.mean(c):.1f}" + (f" ± {statistics.stdev(c):.1f}" if len(c) > 1 else "")
                 for c in zip(*figures)]
        say(f"{name:{width}}  {classes:13}" + "".join(f"  {cell:>12}" for cell in cells))
    last = runs[-1]
    say(f"\nworst of {last['classes']} classes, {last['model']}, split {last['split']}: top-1, % and number of videos")
    for row in last["per_class"][:10]:
        say(f"{row['top1']:5.1f}  {row['count']:4}  {row['class']}")
    for error in dict.fromkeys(error for run in runs for error in run["unreadable"]):
        say(f"unreadable, counted as wrong: {error}")
    if rank() == 0 and args.out:
        results = {"runs": runs, "command": sys.argv, "arguments": vars(args)}
        (args.out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def main():
    args, content = parse_args()
    device, out = start(args), args.out or Path()
    out.mkdir(parents=True, exist_ok=True)
    paths = [video for path in args.video or () for video in data.find_videos(path)]
    parts = [] if args.video else load_parts(args, content.get("classes", []))  # before weights are downloaded
    models = load_models(args, device)
    model = list(models.values())[-1]
    what = " ".join(args.val_list or [f"{args.data}, split", *map(str, args.split)])
    say(f"{args.weights or args.model} on {'your videos' if args.video else what}, "
        f"{args.frames} frames, {args.views[0]} x {args.views[1]} views, "
        f"prompt {' and '.join(dict.fromkeys(repr(model.template) for model in models.values()))}")
    with autocast(args, device):
        if args.video:
            paths = label_videos(args, paths, model, read_labels(args.labels) if args.labels else content["classes"])
        else:
            runs, paths = measure(args, models, parts)
            report(args, runs)
            paths = paths[:: max(1, len(paths) // 3)][:3]  # for pictures of attention
    if rank() == 0 and args.attention:
        for number, path in enumerate(paths, 1):
            video = data.read_video(path, args.frames, short_side=round(model.image_size * data.SHORT_SIDE))
            name = f"attention-{number}-{path.stem}.png" if len(paths) > 1 else "attention.png"
            draw_attention(models, data.center_crop(video, model.image_size), out / name)


if __name__ == "__main__":
    data.run(main, clip.InputError)
