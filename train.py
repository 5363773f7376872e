"""Fine-tuning CLIP on videos (section 3.1): both encoders, plain cross entropy, nothing else.

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames), encode_text("a photo of a {class}."))
    loss   = cross entropy(logits, class), with label smoothing

That the frames' embeddings are averaged before the comparison is what lets a model of single images learn from videos:
the gradient of one video's loss reaches all its frames together. The recipe is the one of the original code: AdamW, a
linear warm-up and a cosine to a hundredth of the learning rate, and the table of word embeddings is left as it is.

    python train.py                                       the toy: a minute and a half on two CPU cores
    python train.py --data ucf101 --gpus 1
"""
import itertools
import json
import math
import os
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clip
import data
import evaluate
from data import say

BAR = "{percentage:3.0f}% {bar:20} {elapsed} < {remaining} left{postfix}"
MAX_LOGIT_SCALE = math.log(100)  # OpenAI's bound: exp(logit_scale) <= 100
MAX_UNREADABLE = 0.05  # of the videos seen

# The zero-shot row of the paper's experiments, and what suits a model of a hundredth of the size.
PAPER = dict(frames=32, batch_size=256, epochs=10, warmup_epochs=5.0, lr=8e-6, augment="mix")
TINY = dict(frames=8, batch_size=32, epochs=10, warmup_epochs=1.0, lr=8e-4, augment="crop")


def parse_args():
    parser = data.Parser(__doc__)
    evaluate.add_arguments(parser, batch_size="256, for tiny 32", training=True)
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=data.at_least(1), help="passes through the data (default: 10)")
    group.add_argument("--warmup-epochs", type=data.at_least(0, float),
                       help="epochs in which the learning rate rises from 0 (default: 5, for tiny 1)")
    group.add_argument("--lr", type=data.at_least(0, float),
                       help="highest learning rate (default: 8e-6, for tiny 8e-4)")
    group.add_argument("--weight-decay", type=data.at_least(0, float), default=1e-3,
                       help="weight decay of AdamW (default: %(default)s)")
    group.add_argument("--label-smoothing", type=data.at_least(0, float, 1), default=0.1,
                       help="share of the target spread over all classes (default: %(default)s)")
    group.add_argument("--template", type=evaluate.template, default="a photo of a {}.",
                       help='sentence around a class name (default: "%(default)s")')
    group.add_argument("--out", type=Path, help="folder of the run, a new one (default: runs/NAME)")
    args = parser.parse_args()
    evaluate.complete(parser, args, PAPER, TINY)
    if args.warmup_epochs > args.epochs:
        say(f"warning: a warm-up of {args.warmup_epochs:g} epochs is not over after --epochs {args.epochs}")
    if args.out and (args.out / "args.json").exists():
        parser.error(f"--out {args.out} holds a run already")
    return args


def make_folder(args):
    """Makes the folder of the run: --out, or runs/NAME, or the first of runs/NAME-2, -3, ... that is not there yet."""
    if args.out is None:
        taken = {path.name for path in Path("runs").glob("*")}
        run = Path(args.data).name
        names = itertools.chain([run], (f"{run}-{number}" for number in itertools.count(2)))
        args.out = Path("runs") / next(name for name in names if name not in taken)
    evaluate.make_folder(args.out)


def learning_rate(step, steps, warmup_steps, peak):
    """The learning rate of step 0, 1, ... of `steps`: linear from 0, then on a cosine from `peak` to its hundredth.

    The cosine runs from step 0 on, as in the original code (timm's schedule without `warmup_prefix`); the warm-up hides
    its beginning.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    floor = peak / 100
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def memory(device):
    """The most memory that this process has used: of the GPU, or of the machine. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux gives KiB


def save(path, checkpoint):
    """Writes a checkpoint to a temporary file first, so that a kill or a full disk leaves the old one whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def checkpoint(model, args, classes, **more):
    """All that it takes to use the model: the weights, how they are fed, the class names, the arguments."""
    return {"model": model.state_dict(), "mean": model.mean, "std": model.std, "template": model.template,
            "classes": classes, "args": evaluate.plain(args), **more}


def draw_curves(folder):
    """Draws curves.png from log.jsonl: loss, learning rate and accuracy against epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, validations = [r for r in log if "loss" in r], [r for r in log if "top1" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [r["epoch"] for r in steps]
    left.plot(epochs, [r["loss"] for r in steps], color="#0072b2", linewidth=1)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    left.yaxis.label.set_color("#0072b2")
    rate = left.twinx()
    rate.plot(epochs, [r["lr"] for r in steps], color="#d55e00", linewidth=1, linestyle="--")
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.yaxis.label.set_color("#d55e00")
    epochs = [r["epoch"] for r in validations]
    right.plot(epochs, [r["top1"] for r in validations], color="#0072b2", marker="o", label="top-1")
    right.plot(epochs, [r["top5"] for r in validations], color="#009e73", marker="s", label="top-5")
    right.axhline(validations[0]["top1"], color="#555555", linestyle=":", label="top-1 before training")
    right.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 102))
    right.legend(loc="center right")
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def train_epoch(args, network, tokens, loader, epoch, optimizer, scaler, log, bar):
    """One pass through the loader, one optimizer step a batch. Returns a list of the videos that could not be read."""
    model = getattr(network, "module", network)  # without the wrapper of DDP
    device = tokens.device
    per_epoch = len(loader)
    unreadable = []
    begin = time.perf_counter()
    for i, (video, label, index, errors) in enumerate(loader):
        wait = time.perf_counter() - begin  # the time in which nothing was computed because no data was there
        step = epoch * per_epoch + i
        rate = learning_rate(step, args.epochs * per_epoch, args.warmup_epochs * per_epoch, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
        target = F.one_hot(label, len(tokens)).float()  # [B, C]
        if args.augment in ("color", "mix"):
            video = data.change_colors(video, data.draw_colors(args.seed, epoch, index.tolist()).to(device))
        if args.augment == "mix":
            video, target = data.mix(video, target, (args.seed, step))
        with evaluate.autocast(args, device):
            logits = network(model.normalize(video), tokens)  # [B, C]
            loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}; try a lower --lr, or --amp off")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

        unreadable += [line for error in errors for line in error.splitlines()]
        if len(unreadable) > MAX_UNREADABLE * max((i + 1) * len(label), 200):
            raise ValueError(f"{len(unreadable)} videos cannot be read, over {MAX_UNREADABLE:.0%}: {unreadable[0]}")
        took, begin = time.perf_counter() - begin, time.perf_counter()
        log(step=step + 1, epoch=(step + 1) / per_epoch, loss=loss.item(), lr=rate,
            videos_per_second=args.batch_size / took, data_wait=wait / took)
        bar.set_postfix_str(f"loss {loss.item():.3f}, lr {rate:.1e}, {args.batch_size / took:.0f} videos/s, "
                            f"data wait {wait / took:.0%}")
        bar.update()
    return unreadable


def fit(args, model, train_samples, val_samples, classes, device):
    """Trains the parameters of `model` that require a gradient, with validation before the first and after every epoch.

    Leaves args.json, log.jsonl, curves.png, last.pt and best.pt in the folder `args.out`. Returns the results of
    `evaluate.evaluate` before training and of the best epoch.
    """
    rank, world = evaluate.rank_and_world()
    if len(train_samples) < args.batch_size:
        raise ValueError(f"{len(train_samples)} training videos do not fill a --batch-size of {args.batch_size}")
    dataset = data.VideoDataset(train_samples, args.frames, model.image_size, train=True, seed=args.seed,
                                flip=args.data != "ssv2",  # there left and right make different classes
                                augment=args.augment)
    batches = data.Batches(len(dataset), args.batch_size, args.seed, rank, world)
    loader = data.make_loader(dataset, batches, args.workers)
    val_loader = evaluate.make_loader(args, model, val_samples)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    network = DistributedDataParallel(model) if world > 1 else model

    tokens = evaluate.class_tokens(model, classes, args.template).to(device)
    if rank == 0:
        make_folder(args)
        (args.out / "args.json").write_text(json.dumps(evaluate.plain(args), indent=1) + "\n")
    machine = torch.cuda.get_device_name() if args.gpus else "CPU"
    say(f"""\
model      {args.weights or args.model}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters to train
data       {args.train_list or args.data}, split {args.split}, {args.classes} classes: {len(classes)}
videos     {len(train_samples)} for training, {len(val_samples)} for validation
input      {args.frames} frames of {model.image_size} x {model.image_size}, prompt {args.template!r}
training   {args.epochs} epochs of {len(batches)} steps of {args.batch_size} videos, learning rate {args.lr:g}
machine    {world} x {machine}, mixed precision {args.amp}, {args.workers} workers
results    {args.out}""")

    def log(**record):
        if rank == 0:
            with open(args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def validate(epoch):
        tokens = evaluate.class_tokens(model, classes, model.template)
        with evaluate.autocast(args, device):
            results = evaluate.evaluate(model, val_loader, tokens)
        log(epoch=epoch, **results)
        say(f"epoch {epoch:2} of {args.epochs}   top-1 {results['top1']:5.1f} %   top-5 {results['top5']:5.1f} %")
        return results

    before, best, unreadable = validate(0), None, set()
    model.template = args.template
    bar = tqdm(total=args.epochs * len(batches), disable=evaluate.hide_bars(), bar_format=BAR)
    for epoch in range(args.epochs):
        batches.epoch = epoch
        errors = set(evaluate.gather(train_epoch(args, network, tokens, loader, epoch, optimizer, scaler, log, bar)))
        if errors:
            log(epoch=epoch + 1, unreadable_in_training=sorted(errors))
        unreadable |= errors
        results = validate(epoch + 1)
        if best is None or results["top1"] >= best["top1"]:
            best = results
        if rank == 0:
            content = checkpoint(model, args, classes, epoch=epoch + 1, top1=results["top1"])
            save(args.out / "last.pt", content)
            if best is results:
                save(args.out / "best.pt", content)
            draw_curves(args.out)
    bar.close()
    for error in sorted(unreadable | set(best["unreadable"])):
        say(f"unreadable {error}")
    return before, best


def main():
    args = parse_args()
    begin = time.perf_counter()
    device = evaluate.start(args)
    train_samples, classes = data.load_samples(args, train=True)
    val_samples, _ = data.load_samples(args, train=False)
    model = clip.load(args.weights or args.model, device)
    model.token_embedding.requires_grad_(False)
    before, best = fit(args, model, train_samples, val_samples, classes, device)
    minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
    say(f"""
              top-1    top-5
before       {before["top1"]:6.1f}   {before["top5"]:6.1f}   %
fine-tuned   {best["top1"]:6.1f}   {best["top5"]:6.1f}   %
{minutes} min {seconds} s, {memory(device):.1f} GiB of memory at most; the best model is {args.out / "best.pt"}""")


if __name__ == "__main__":
    data.run(main)
