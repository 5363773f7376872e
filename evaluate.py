"""Accuracy: which class name is most similar to each video?

    prediction = argmax over c of cos(encode_video(video), encode_text(template with the name of class c))

A class is only its name, so any model can be evaluated on any classes: plain CLIP zero-shot, and a fine-tuned model on
classes that it was not trained on. Every video counts exactly once, with any batch size and any number of GPUs.

    python evaluate.py --zero-shot                        plain CLIP on the toy
    python evaluate.py --weights runs/toy/best.pt         a fine-tuned model, on the data that it was trained on
    python evaluate.py --weights runs/base/best.pt --classes base novel --blend 0 0.25 0.5 0.75 1
    python evaluate.py --video clip.mp4 --labels "archery, bowling, juggling balls" --model ViT-B/16
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script at once while PyTorch is imported

import copy
import csv
import logging
import math
import os
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import clip
import data
from data import UserError, rank, say

CORES = getattr(os, "process_cpu_count", os.cpu_count)()  # those that this process may use, from Python 3.13 on

# The settings, for models of the paper's size and for tiny. The flags have the same names and explain them.
PAPER = dict(
    data=None, root=None, split=[1], classes=["all"], val_list=None, labels=None,
    model=None, weights=None, activation=None, template=None, zero_shot=False, blend=None,
    frames=32, views="1x1", batch_size=32,
    video=None, attention=False, embeddings=False, out=None,
    gpus=None, workers=min(CORES, 8), amp=None,
)
TINY = PAPER | dict(frames=8)


# ---- Predictions and accuracy ---------------------------------------------------------------------------------------

def class_tokens(model, classes):
    """The tokens [C, L] of class names in the template of a model, such as "a photo of a {}.", on its device."""
    if isinstance(classes, str) or len(classes) < 2:
        raise UserError(f"expected a list of at least two classes, got {classes!r}")
    if "{}" not in model.template:
        raise UserError(f"the template {model.template!r} has no {{}} for the class name")
    texts = [model.template.replace("{}", name) for name in classes]
    return model.tokenizer(texts).to(model.logit_scale.device)


@torch.inference_mode()
def predict(model, loader, tokens, max_unreadable=1.0):
    """The scores of the n videos of an `evaluation_loader`, [n, C], given the tokens [C, L] of the class names: the log
    of the mean probability over the views, up to a constant. Also the labels and errors, as in `collect`."""
    model.eval()
    text = model.encode_text(tokens)  # [C, D]

    def score(video):
        logits = model.compare(video.flatten(0, 1), text)  # [B * V, C]
        logits = logits.unflatten(0, video.shape[:2])
        return logits.log_softmax(dim=-1).logsumexp(dim=1)  # [B, C]

    return collect(loader, tokens.device, score, max_unreadable)


def collect(loader, device, compute, max_unreadable=1.0):
    """Applies `compute` to videos [B, V, T, 3, S, S] on the device. Returns what all processes computed in the order of
    the data set, [n, ...], the labels, int64 [n], and n error messages, "" for videos that were read. Raises UserError
    as soon as too large a share cannot be read."""
    batches = []
    seen = 0
    unreadable = []
    bar = tqdm(loader, "evaluating", leave=False, unit="batch", disable=rank() > 0 or None)  # None: on terminals only
    for video, label, index, error in bar:
        output = compute(video.to(device, non_blocking=True)).float().cpu()
        batches.append((index.tolist(), output, label.tolist(), error))
        seen += len(error)
        unreadable += filter(None, error)
        check_unreadable(unreadable, seen, max_unreadable)
    rows = []
    for batch in gather(batches):  # pickling a row of a tensor would send the storage of its whole batch
        rows += zip(*batch)
    _, outputs, labels, errors = zip(*sorted(rows, key=lambda row: row[0]))
    return torch.stack(outputs), torch.tensor(labels), list(errors)


def check_unreadable(errors, seen, limit):
    """Raises UserError if more than limit * max(seen, 200) videos could not be read."""
    if len(errors) > limit * max(seen, 200):
        raise UserError(f"over {limit:.0%} of the videos cannot be read, such as {errors[-1]}")


def accuracy(scores, labels, errors, classes=None):
    """The result of `evaluate` for scores [n, C]. With the names of the `classes`, also "per_class": name, top-1 and
    number of videos of each class that has videos, and what the wrong ones were "taken_for", {name: number of videos}.
    The worst class comes first."""
    right = scores.gather(1, labels[:, None])
    better = (scores >= right).sum(dim=1) - 1  # classes that score at least as much: a tie counts as wrong
    unreadable = torch.tensor(list(map(bool, errors)))
    better[unreadable | scores.isnan().any(dim=1)] = 5  # wrong, even among fewer than five classes
    top1, top5 = (better < 1).double(), (better < 5).double()
    results = {
        "top1": 100 * top1.mean().item(),
        "top5": 100 * top5.mean().item(),
        "count": len(labels),
        "unreadable": list(filter(None, errors)),
    }
    if classes:
        results["per_class"] = per_class(top1, scores, labels, errors, classes)
    return results


def per_class(top1, scores, labels, errors, classes):
    """A row for each class that has videos, the worst first, as `accuracy` describes."""
    best_wrong = scores.scatter(1, labels[:, None], -math.inf).argmax(dim=1).tolist()
    rows = []
    for label in labels.unique().tolist():
        of_class = labels == label
        taken_for = Counter()
        for i in (of_class & (top1 == 0)).nonzero().flatten().tolist():
            taken_for["unreadable" if errors[i] else classes[best_wrong[i]]] += 1
        rows.append({
            "class": classes[label],
            "top1": 100 * top1[of_class].mean().item(),
            "count": int(of_class.sum()),
            "taken_for": dict(taken_for.most_common()),
        })
    return sorted(rows, key=lambda row: row["top1"])


def evaluate(model, loader, tokens, max_unreadable=1.0):
    """Accuracy of a CLIP on the videos of an `evaluation_loader`, given the tokens [C, L] of their class names: a dict
    of `top1` and `top5`, percent; `count`, the number of videos; and `unreadable`, a list of "path: reason" of those
    that could not be read and count as wrong. With several processes, each gets the result of all."""
    scores, labels, errors = predict(model, loader, tokens, max_unreadable)
    return accuracy(scores, labels, errors)


def evaluation_loader(samples, frames, image_size, batch_size, workers, num_clips=1, num_crops=1):
    """The batches of this process, videos [B, V, T, 3, S, S] in test order: over all processes, every video once."""
    dataset = data.VideoDataset(samples, frames, image_size, train=False, num_clips=num_clips, num_crops=num_crops)
    share = [(0, index) for index in range(rank(), len(samples), data.process("WORLD_SIZE", 1))]
    batches = torch.utils.data.BatchSampler(share, batch_size, drop_last=False)
    return data.Loader(dataset, batches, workers)


@torch.inference_mode()
def encode_labels(model, labels):
    """The embeddings of class names in the template of the model: {label: [D]}."""
    model.eval()
    return dict(zip(labels, model.encode_text(class_tokens(model, labels))))


@torch.inference_mode()
def classify(model, video, labels):
    """A video uint8 [T, 3, h, w] of `data.read_video` to a list of (label, probability), the best first. `labels` is a
    list of class names, or the result of `encode_labels`, which saves encoding them for each video."""
    if video.dtype != torch.uint8:
        raise ValueError("classify takes a uint8 tensor, as data.read_video returns it")
    model.eval()
    if not isinstance(labels, dict):
        labels = encode_labels(model, labels)
    text = torch.stack(list(labels.values()))
    video = data.center_crop(video, model.image_size)[None].to(text.device)
    probabilities = model.compare(video, text)[0].softmax(dim=-1).tolist()
    return sorted(zip(labels, probabilities), key=lambda pair: -pair[1])


@torch.no_grad()
def blend(plain, tuned, share):
    """A model of the weights (1 - share) * plain + share * tuned (WiSE-FT, 2109.01903; Open-VCLIP, 2302.00624)."""
    blended = copy.deepcopy(tuned)
    weights = plain.state_dict()
    for name, parameter in blended.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"--blend: {name} is not in both models in the same shape")
        parameter.lerp_(weights[name], 1 - share)
    return blended


# ---- Pictures of what a model sees ----------------------------------------------------------------------------------

@torch.inference_mode()
def attention(model, images):
    """The attention of the class token of images [N, 3, S, S] to their g x g patches in the last layer: [N, g, g], the
    mean over the heads, relative to the largest."""
    block = model.visual.transformer.resblocks[-1]
    inputs = []
    with block.ln_1.register_forward_hook(lambda module, _, output: inputs.append(output)):
        model.encode_image(images)
    q, k, _ = block.attn.project(inputs[0])  # [N, heads, L, 64]
    weights = q[:, :, :1] @ k.mT / 64 ** 0.5  # of the class token, [N, heads, 1, L]
    weights = weights.softmax(dim=-1).mean(dim=1)
    grid = images.shape[-1] // model.visual.conv1.stride[0]
    patches = weights[:, 0, 1 : 1 + grid ** 2]
    patches = patches / patches.amax(dim=-1, keepdim=True)
    return patches.unflatten(-1, (grid, grid)).float().cpu()


def draw_attention(models, scores, errors, classes, clips, path):
    """Draws three videos of the data set `clips`, and once more for each of {name: CLIP}, dark where the model does not
    look: `path`-1-FILE.png and so on."""
    readable = [i for i, error in enumerate(errors) if not error]
    for number, i in enumerate(readable[:: max(1, len(readable) // 3)][:3], 1):
        file, label = clips.samples[i]
        title = classes[label if label >= 0 else scores[i].argmax()]
        [video], *_ = clips[0, i]  # one view, uint8 [T, 3, S, S]
        rows = [(title, video)]
        for name, model in models.items():
            light = attention(model, video.to(model.logit_scale.device))[:, None]
            light = F.interpolate(light, video.shape[-2:], mode="bicubic").clamp(0, 1)
            rows.append((name, (video * (0.15 + 0.85 * light)).byte()))
        data.save_grid(rows, path.with_name(f"{path.name}-{number}-{file.stem[:50]}.png"))


def draw_mistakes(scores, errors, classes, clips, path):
    """Draws the ten most confident mistakes in the data set `clips`, if there are any: the file and its folder, its
    class, the one that it was taken for, and its frames."""
    probabilities, predictions = scores.softmax(dim=-1).max(dim=-1)
    path.unlink(missing_ok=True)  # of an earlier evaluation
    rows = []
    for i in probabilities.argsort(descending=True).tolist():
        file, label = clips.samples[i]
        if predictions[i] != label and not errors[i] and len(rows) < 10:
            [video], *_ = clips[0, i]
            taken_for = f"{classes[predictions[i]]}, {probabilities[i]:.1%}"
            rows.append((f"{Path(*file.parts[-2:])}: {classes[label]} taken for {taken_for}", video))
    if rows:
        data.save_grid(rows, path)


@torch.inference_mode()
def embed(model, loader, tokens):
    """The embeddings of the videos [n, D], the mean over their views, and of the class names [C, D]."""
    def compute(video):
        embeddings = model.encode_video(video.flatten(0, 1))  # [B * V, D]
        return embeddings.unflatten(0, video.shape[:2]).mean(dim=1)

    videos, _, _ = collect(loader, tokens.device, compute)
    return videos, model.encode_text(tokens).float().cpu()


def save_embeddings(videos, texts, samples, errors, classes, path):
    """Saves embeddings of videos {model: [n, D]} and of class names {model: [C, D]} as `path`.npz, in arrays [M, n, D]
    and [M, C, D]. Draws two principal components of the videos that were read, coloured by class, as `path`.png."""
    from matplotlib.figure import Figure

    paths, labels = zip(*samples)
    with data.writing(path.with_suffix(".npz")) as temporary:
        np.savez(temporary, models=list(videos), videos=torch.stack(list(videos.values())),
                 texts=torch.stack(list(texts.values())), paths=list(map(str, paths)), labels=labels, classes=classes)
    kept = ~torch.tensor(list(map(bool, errors)))
    labels = torch.tensor(labels)[kept]
    figure = Figure(figsize=(6 * len(videos) + 3, 5), layout="constrained")
    grid = figure.subplots(1, len(videos), squeeze=False)[0]
    for axes, (model, embeddings) in zip(grid, videos.items()):
        points = F.normalize(embeddings[kept], dim=-1)
        points = points - points.mean(dim=0)
        points = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, [-1, -2]]  # of the largest variance
        for i, name in enumerate(classes[:70]):  # as many as there are pairs of a colour and a marker
            x, y = points[labels == i].T
            axes.scatter(x, y, s=22, color=f"C{i % 10}", marker="os^DvPX"[i % 7], label=name.replace("$", r"\$"))
        axes.set(xticks=[], yticks=[], xlabel=f"principal component 1\n{model}", ylabel="principal component 2")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", ncols=2, fontsize=8)
    with data.writing(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=120)


# ---- Settings, devices and precision, for all scripts ---------------------------------------------------------------

def add_flags(parser, training, several=None):
    """Adds the flags about data, model and machine."""
    data.add_data_flags(parser, training, several)
    parser.flag("--model", "CLIP of OpenAI, or tiny; by default tiny for the toy, else ViT-B/16", tuple(clip.MODELS))
    parser.flag("--weights", "load this file instead of --model: a checkpoint, or the weights of any CLIP with a ViT",
                data.name_or(os.path.isfile, clip.MODELS))
    parser.flag("--activation", "activation of --weights; by default what the file or a configuration beside it says",
                tuple(clip.ACTIVATIONS))
    parser.flag("--template", "sentence in which a class name replaces {}; evaluate.py: by default that of --weights")
    parser.flag("--gpus", "number of GPUs, 0 for the CPU; by default 1 if there is one", data.at_least(0))
    parser.flag("--workers", "processes per GPU that read videos", data.at_least(0))
    parser.flag("--batch-size", "videos in a batch, of all GPUs together", data.at_least(1))
    parser.flag("--amp", "mixed precision; by default bf16 if the GPU has it, else fp16; off on CPU and MPS",
                ("bf16", "fp16", "off"))


def trained_with(weights):
    """The settings that a checkpoint of this project was trained with; {} for other files."""
    if weights is None:
        return {}
    return clip.read(weights).get("args", {})


def choose_settings(typed, saved, paper, tiny):
    """The settings of a script. Later wins: the block at its top, what a run or checkpoint saved, what was typed.
    `choose_device` completes gpus and amp, `train.parse_args` micro_batch, and `data.load_samples` root."""
    chosen = saved | typed
    if not any(chosen.get(name) for name in ("data", "val_list", "video")):
        chosen["data"] = "toy"
    if chosen.get("weights") in clip.MODELS:
        chosen.setdefault("model", chosen["weights"])
    if chosen.get("val_list") and not chosen.get("data"):
        chosen["root"] = chosen.get("root") or os.getcwd()
    if not chosen.get("model"):
        chosen["model"] = "tiny" if chosen.get("data") == "toy" else "ViT-B/16"
    block = tiny if chosen["model"] == "tiny" else paper
    return SimpleNamespace(**block | chosen)


def choose_device(parser, args):
    """Completes --gpus and --amp by what this machine has, and sets args.world, the number of processes."""
    found = torch.accelerator.device_count()
    if args.gpus is None:
        args.gpus = min(found, 1)
    if args.gpus > max(found, 1):
        parser.error(f"--gpus {args.gpus}: this machine has {found}")
    if args.gpus > found:
        say(f"warning: --gpus {args.gpus}, but there is no GPU here: running on the CPU")
        args.gpus = 0
    if args.amp is None:
        args.amp = default_precision(args.gpus)
    args.world = data.process("WORLD_SIZE", max(args.gpus, 1))


def default_precision(gpus):
    """bf16 if the GPU has it, fp16 on other CUDA GPUs, "off" elsewhere."""
    if gpus == 0:
        return "off"
    kind = torch.accelerator.current_accelerator().type
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"  # Tesla T4 and older: bf16 is emulated, which is slow
    return "bf16" if kind in ("cuda", "xpu") else "off"


def start(args):
    """Joins the processes that torchrun started, or starts torchrun if --gpus is above 1. Returns the device."""
    launched = dist.is_torchelastic_launched()
    if args.gpus > 1 and not launched:
        weights = args.weights or args.model
        resumed = Path(args.out or "", "last.pt").exists()  # needs no other weights
        if weights in clip.MODELS and weights != "tiny" and not resumed:
            clip.fetch(clip.MODELS[weights])  # once, before all processes need it
            clip.fetch(clip.VOCABULARY)
        sys.exit(run_torchrun(args.gpus))
    device = torch.device("cpu")
    backends = "cpu:gloo"
    if args.gpus:
        device = torch.device(torch.accelerator.current_accelerator().type, data.process("LOCAL_RANK"))
        torch.accelerator.set_device_index(device.index)
        backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    if launched:
        dist.init_process_group(backends)
    return device


def run_torchrun(processes):
    """Runs this command in several processes. Returns their exit status; they have told the reason. Raises UserError if
    a signal ended one of them."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # torchrun's own report
    try:
        flags = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}"]
        run.run(run.parse_args([*flags, *sys.argv]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        status = min(codes - {-signal.SIGTERM}, default=1)  # torchrun ends the others by SIGTERM
        if status < 0:
            name = signal.Signals(-status).name
            raise UserError(f"a process was ended by {name}; the system sends SIGKILL if memory runs out") from error
        return status
    except SignalException:
        return 130
    return 0


def gather(rows):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return rows
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows)
    return sum(lists, [])


def autocast(amp, device):
    """A context of mixed precision: "bf16", "fp16" or "off"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype, enabled=amp != "off")


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_args():
    """The settings of an evaluation. Exits with status 2 if the flags are wrong."""
    parser = data.Parser(__doc__, PAPER, TINY)
    add_flags(parser, training=False, several="+")
    parser.flag("--zero-shot", "evaluate CLIP without fine-tuning, as without --weights", bool)
    parser.flag("--views", "clips x crops of each video whose probabilities are averaged, such as 4x3; 1 or 3 crops")
    parser.flag("--blend", "evaluate weights between those before training (0; or --model) and --weights (1)",
                data.at_least(0, float, 1), nargs="+")
    parser.flag("--video", "label these videos, or folders of videos, with --labels (a file, or names separated by "
                "commas) or with the classes of the checkpoint", Path, nargs="+")
    parser.flag("--attention", "with --out: draw where the class token looks, attention*.png", bool)
    parser.flag("--embeddings", "with --out: save and draw the video embeddings, embeddings*.npz and .png", bool)
    parser.flag("--out", "write results.json, predictions.csv, mistakes.png and other pictures to this folder", Path)
    typed = vars(parser.parse_args())
    trained = trained_with(typed.get("weights"))
    args = choose_settings(typed, saved_settings(trained, typed), PAPER, TINY)
    if (args.attention or args.embeddings) and not args.out:
        parser.error("--attention and --embeddings need --out, the folder for their files")
    args.before = None  # the model that the training of --weights started from
    args.before_activation = None
    if args.weights:
        if "model" not in typed:
            args.before_activation = trained.get("activation")
        args.before = typed.get("model") or trained.get("weights") or trained.get("model")
    choose_device(parser, args)
    views = re.fullmatch("([1-9][0-9]*)x([13])", args.views)
    if not views:
        parser.error(f"--views: {args.views!r} is not a number of clips x 1 or 3 crops, such as 4x3")
    args.views = int(views[1]), int(views[2])
    if args.zero_shot and args.weights:
        parser.error("--zero-shot evaluates plain CLIP: give --model, not --weights")
    if args.blend and not args.before:
        parser.error("--blend needs --weights; if that file does not say what its training started from, also --model")
    if args.video:
        if not args.labels and not args.weights:
            parser.error("--video needs --labels")
        if args.embeddings:
            parser.error("--video cannot be combined with --embeddings")
        return args
    data.check_lists(parser, args)
    if args.val_list and args.labels and len(args.labels) not in (1, len(args.val_list)):
        parser.error("--labels: give one file, or one for each of the lists")
    return args


def saved_settings(trained, typed):
    """What an evaluation takes from the settings of a training run: model and frames and, unless others are asked for,
    the data. The videos of another list are looked for in the folder of the training list."""
    saved = {name: trained[name] for name in ("model", "frames") if name in trained}
    if not trained or "video" in typed or typed.get("data", trained["data"]) != trained["data"]:
        return saved
    if "val_list" not in typed:
        for name in ("split", "classes", "val_list", "labels"):
            if trained.get(name):
                saved[name] = [trained[name]]
    elif not trained.get("val_list") or not os.path.exists(trained.get("root") or "."):
        return saved
    saved |= {"data": trained["data"], "root": trained.get("root")}
    for name, flag in (("data", "root"), ("root", "root"), ("val_list", "val-list")):
        path = trained.get(name)
        moved = path and path not in data.DATASETS and not os.path.exists(path)
        if moved and not {"root", name} & typed.keys():
            raise UserError(f"{typed['weights']} was trained on {path}, which is not here: give --{flag}")
    return saved


def load_models(args, device):
    """The models to evaluate, {name: CLIP}: the blends, or the model, after the one before training if both are to be
    looked at."""
    models = {}
    if args.before and (args.blend or args.attention or args.embeddings):
        models[relative(args.before)] = clip.load(args.before, device, activation=args.before_activation)
    name = args.weights or args.model
    models[relative(name)] = clip.load(name, device, activation=args.activation)
    if args.template:
        for model in models.values():
            model.template = args.template
    if not args.blend:
        if len({(model.image_size, model.text_projection.shape[1]) for model in models.values()}) > 1:
            raise UserError(f"{' and '.join(models)} differ in size: give the --model that training started from")
        return models
    plain, tuned = models[relative(args.before)], models[relative(name)]
    return {f"blend {share:g}": blend(plain, tuned, share) for share in args.blend}


def relative(path):
    """A path, or the name of a model, as it is shown: relative if it is below the current folder."""
    return path.removeprefix(os.getcwd() + os.sep)


def read_labels(labels):
    """Class names, from a file or separated by commas. `labels` is a list of str, the values of --labels."""
    text = ",".join(labels)
    if os.path.isfile(text):
        names = data.read_names(text).values()
    else:
        names = re.split(r"\s*[,\n]\s*", text.strip())
    different = {data.as_read(name): name for name in names if name}
    return list(different.values())


def find_videos(args):
    """What to evaluate: tuples (split or list, kind of classes, samples, class names). Without known classes, for
    --video, the samples have the label -1."""
    if args.video:
        paths = []
        for path in args.video:
            if not path.exists():
                raise UserError(f"{path}: there is no such file")
            paths += data.find_videos(path)
        classes = args.labels and read_labels(args.labels)
        return [(None, None, [(path, -1) for path in paths], classes)]
    parts = []
    for i, split in enumerate(args.val_list or args.split):
        labels = args.labels and args.labels[i % len(args.labels)]
        for kind in args.classes:
            video_list = args.val_list and split
            samples, classes = data.load_samples(args.data, args.root, split, False, kind, video_list=video_list,
                                                 labels=labels)
            parts.append((split, kind, samples, classes))
    return parts


def show_predictions(samples, scores, errors, classes):
    """Prints the class of each video, or the five best of a single one."""
    shown = 5 if len(samples) == 1 else 1
    for (path, _), row, error in zip(samples, scores.softmax(dim=-1).tolist(), errors):
        if error:
            say(f"unreadable  {error}")
        else:
            for probability, name in sorted(zip(row, classes), reverse=True)[:shown]:
                say(f"{100 * probability:5.1f} %  {name:24}  {path}")
    if all(errors):
        raise UserError("none of the videos can be read")


def write_predictions(samples, scores, errors, classes, path):
    """Writes a table of videos: class, if it is known, prediction, probabilities and error."""
    # File names may not be valid text: "surrogateescape" writes their bytes unchanged.
    with data.writing(path) as temporary, temporary.open(
            "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "class", "prediction", "probability", "error", *classes])
        for (video, label), row, error in zip(samples, scores.softmax(dim=-1).tolist(), errors):
            name = classes[label] if label >= 0 else ""
            best = max(row)
            if error:
                writer.writerow([video, name, "", "", error])
            else:
                writer.writerow([video, name, classes[row.index(best)], best, "", *row])


def report(runs):
    """Prints the accuracy of each model, over several splits as mean and standard deviation; of base and novel classes
    also the harmonic mean, 2 b n / (b + n); and the worst classes of the last run."""
    groups = {}
    for run in runs:
        groups.setdefault((run["model"], run["classes"]), []).append(run)
    width = max(len(run["model"]) for run in runs)
    columns = {"top1": "top-1, %", "top5": "top-5, %"}
    if max(run["num_classes"] for run in runs) <= 5:
        del columns["top5"]
    say(f"\n{'':{width}}  {'classes':13}" + "".join(f"  {title:>12}" for title in columns.values()))
    for (model, kind), group in groups.items():
        values = [mean_and_deviation([run[column] for run in group]) for column in columns]
        say(f"{model:{width}}  {kind:13}" + "".join(f"  {value:>12}" for value in values))
        if kind == "novel" and (model, "base") in groups:
            pairs = zip(groups[model, "base"], group)
            means = [statistics.harmonic_mean([base["top1"], novel["top1"]]) for base, novel in pairs]
            say(f"{model:{width}}  {'harmonic mean':13}  {mean_and_deviation(means):>12}")
    last = runs[-1]
    split = relative(str(last["split"]))
    say(f"\nworst of {last['classes']} classes, {last['model']}, split {split}: top-1, number of videos, taken for")
    for row in last["per_class"][:10]:
        mistakes = ", ".join(f"{count} {name}" for name, count in row["taken_for"].items())
        say(f"{row['top1']:5.1f} %  {row['count']:4}  {row['class']}: {mistakes or 'all right'}")
    errors = [error for run in runs for error in run["unreadable"]]
    for error in dict.fromkeys(errors):
        say(f"unreadable, counted as wrong: {error}")


def mean_and_deviation(values):
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def main():
    """Evaluates models on data sets, or labels videos; then the files of --out and the tables."""
    args = parse_args()
    device = start(args)
    if args.out:
        with data.disk_errors(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    parts = find_videos(args)  # before weights are downloaded
    models = load_models(args, device)
    *_, model = models.values()
    if args.video and not args.labels and not model.classes:
        raise UserError(f"--video needs --labels: {args.weights} does not store its classes")
    say(f"{relative(args.weights or args.model)}, {args.frames} frames, prompt {model.template!r}")
    batch_size = math.ceil(args.batch_size / args.world / math.prod(args.views))
    own = args.data not in data.DATASETS and not (args.val_list and args.labels)  # a folder, or a table of names
    runs = []
    for number, (split, kind, samples, classes) in enumerate(parts, 1):
        suffix = f"-{number}" if len(parts) > 1 else ""
        if not classes:
            classes = model.classes
        elif own and kind == "all" and model.classes:
            new = {*map(data.as_read, classes)} - {*map(data.as_read, model.classes)}
            if new:
                say(f"the model was not trained on {len(new)} of the classes, such as {min(new)!r}")
            else:  # some may have no validation video
                samples, classes = data.relabel(samples, classes, model.classes), model.classes
        loader = evaluation_loader(samples, args.frames, model.image_size, batch_size, args.workers, *args.views)
        videos, texts = {}, {}
        for name, model in models.items():
            with autocast(args.amp, device):
                tokens = class_tokens(model, classes)
                scores, labels, errors = predict(model, loader, tokens)
                if args.embeddings:
                    videos[name], texts[name] = embed(model, loader, tokens)
            if args.video:
                if len(models) > 1:
                    say(f"{name}:")
                show_predictions(samples, scores, errors, classes)
            else:
                result = accuracy(scores, labels, errors, classes)
                runs.append({"model": name, "split": split, "classes": kind, "num_classes": len(classes), **result})
        if args.out and rank() == 0:
            clips = data.VideoDataset(samples, min(args.frames, 8), model.image_size, train=False)  # for pictures
            write_predictions(samples, scores, errors, classes, args.out / f"predictions{suffix}.csv")
            if not args.video:
                draw_mistakes(scores, errors, classes, clips, args.out / f"mistakes{suffix}.png")
            if args.embeddings:
                save_embeddings(videos, texts, samples, errors, classes, args.out / f"embeddings{suffix}")
            if args.attention:
                draw_attention(models, scores, errors, classes, clips, args.out / f"attention{suffix}")
    if runs:
        report(runs)
        if args.out and rank() == 0:
            data.write_json(args.out / "results.json", {"runs": runs, "command": sys.argv, "arguments": vars(args)})


if __name__ == "__main__":
    data.run(main, clip.InputError)
