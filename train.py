"""Fine-tuning CLIP on videos (section 3.1): both encoders, plain cross entropy, nothing else.

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames), encode_text("a photo of a {class}."))
    loss   = cross entropy(logits, class), with label smoothing

That the frames' embeddings are averaged before the comparison is what lets a model of single images learn from videos:
the gradient of one video's loss reaches all its frames together. The recipe is the one of the original code: AdamW, a
linear warm-up and a cosine to a hundredth of the learning rate, mixup or CutMix, and the table of word embeddings is
left as it is. A run can be killed at any moment: what it draws at random depends on the seed, the epoch and the step
alone, and `--resume` ends with the same weights.

    python train.py                                       the toy: a minute and a half on two CPU cores
    python train.py --data ucf101 --gpus 1
    python train.py --resume runs/ucf101                  go on where it was interrupted
"""
import contextlib
import importlib.util
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import clip
import data
import evaluate
from data import say

BAR = "{percentage:3.0f}% {bar:20} {elapsed} < {remaining} left{postfix}"
MAX_LOGIT_SCALE = math.log(100)  # OpenAI's bound: exp(logit_scale) <= 100
MAX_UNREADABLE = 0.05  # of the videos seen

# The zero-shot row of the paper's experiments, and what suits a model of a hundredth of the size.
PAPER = dict(frames=32, batch_size=256, epochs=10, warmup_epochs=5.0, lr=8e-6, augment="mix",
             template="a photo of a {}.")
TINY = dict(frames=8, batch_size=32, epochs=10, warmup_epochs=1.0, lr=8e-4, augment="crop",
            template="a photo of a {}.")

# What may be another when a run is resumed: the rest would change the result.
MACHINE = {"root", "workers", "gpus", "micro_batch", "compile", "checkpoint_activations", "save_minutes", "tensorboard",
           "out", "resume"}

# ---------------------------------------------------------------------------------------------------------------------
# Command line and the folder of a run


def make_parser(doc, defaults, tiny_defaults):
    """The flags that training of any kind has; what the help says of their defaults is from the two tables."""
    def default(name):
        return f"(default: {defaults[name]:g}; tiny: {tiny_defaults[name]:g})"

    parser = data.Parser(doc)
    evaluate.add_arguments(parser, batch_size=f"{defaults['batch_size']}; tiny: {tiny_defaults['batch_size']}",
                           training=True)
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=data.at_least(1), metavar="N", help=f"passes over the data {default('epochs')}")
    group.add_argument("--warmup-epochs", type=data.at_least(0, float), metavar="X",
                       help=f"until the learning rate is at its highest {default('warmup_epochs')}")
    group.add_argument("--lr", type=data.at_least(0, float), metavar="X", help=f"highest learning rate {default('lr')}")
    group.add_argument("--weight-decay", type=data.at_least(0, float), metavar="X", default=1e-3,
                       help="of AdamW (default: %(default)s)")
    group.add_argument("--label-smoothing", type=data.at_least(0, float, 1), metavar="X", default=0.1,
                       help="share of the target spread over all classes (default: %(default)s)")
    group.add_argument("--template", type=evaluate.template, metavar="TEXT",
                       help=f'sentence around a class name (default: "{defaults["template"]}")')
    group = parser.add_argument_group("time and memory")
    group.add_argument("--micro-batch", type=data.at_least(1), metavar="N",
                       help="videos that a GPU takes at once (default: its share of --batch-size)")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="compute activations twice: less memory, a third more time")
    group.add_argument("--compile", action="store_true", help="compile both encoders: slower to start, then faster")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="for what the run leaves (default: runs/DATA)")
    group.add_argument("--resume", nargs="?", type=Path, const=Path(), metavar="FOLDER",
                       help="go on with the run in FOLDER, or in --out, with its arguments")
    group.add_argument("--save-minutes", type=data.at_least(0, float), metavar="X", default=15,
                       help="a checkpoint at least this often, and after every epoch (default: %(default)s)")
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    return parser


def parse_args(parser, defaults, tiny_defaults):
    """The arguments of a run, new or resumed, complete and consistent; ends wrong calls with exit status 2."""
    args = parser.parse_args()
    if args.resume:
        args = arguments_of_run(parser, args.out if args.resume == Path() else args.resume)
    elif args.out and (args.out / "args.json").exists():
        parser.error(f"--out {args.out} holds a run already; go on with it by --resume")
    trained = clip.read(args.weights).get("args", {}) if args.weights and not args.model else {}
    evaluate.complete(parser, args, defaults, tiny_defaults, trained)
    if args.warmup_epochs >= args.epochs:
        say(f"warning: a warm-up of {args.warmup_epochs:g} epochs is not over before the end of --epochs {args.epochs}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard: it is not installed (pip install tensorboard)")
    share = args.batch_size // evaluate.world_size(args)
    args.micro_batch = min(args.micro_batch or share, share)
    if share % args.micro_batch:
        parser.error(f"--micro-batch {args.micro_batch} does not divide the {share} videos of a batch on each GPU")
    if args.augment == "mix" and args.micro_batch % 2:
        parser.error(f"--augment mix takes clips in pairs, but {args.micro_batch} are computed at once: choose an even "
                     "--micro-batch, or --augment color")
    return args


def arguments_of_run(parser, folder):
    """The arguments of the run in `folder` with what the call says of the machine. Refuses anything else."""
    if folder is None or not (folder / "args.json").is_file():
        parser.error(f"--resume: there is no run in {folder}" if folder else "--resume needs a folder, or --out")
    try:
        saved = dict(json.loads((folder / "args.json").read_text()))
    except (ValueError, TypeError):
        parser.error(f"--resume: {folder / 'args.json'} is damaged")
    parser.set_defaults(**saved)
    args = parser.parse_args()
    given = evaluate.as_dict(args)
    for name in sorted(set(saved) - MACHINE):
        if given[name] != saved[name]:
            parser.error(f"--{name.replace('_', '-')} is {saved[name]!r} in {folder} and cannot become {given[name]!r}")
    args.out, args.resume = folder, folder
    return args


def free_folder(name):
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is not there yet."""
    taken = {path.name for path in Path("runs").glob("*")}
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return Path("runs") / next(name for name in names if name not in taken)


def make_folder(args):
    """Makes the folder of the run, --out or a free one, and leaves the arguments in it."""
    args.out = args.out or free_folder(Path(args.data or args.train_list.stem).name)
    evaluate.make_folder(args.out)
    with replacing(args.out / "args.json") as file:
        file.write(json.dumps(evaluate.as_dict(args), indent=1).encode() + b"\n")


@contextlib.contextmanager
def replacing(path):
    """A file to write that takes the place of `path` when all of it is on the disk: a kill or a full disk leaves the
    old one whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Log:
    """log.jsonl, one object for each step and each validation; with --tensorboard also as TensorBoard reads it."""

    def __init__(self, folder, step, epoch, tensorboard):
        """Leaves out what a killed run has written behind its last checkpoint, of `step` and `epoch`."""
        self.path, self.writer = folder / "log.jsonl", None
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        with replacing(self.path) as file:
            for line in lines:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # the last line may have been cut
                    record = json.loads(line)
                    if record["epoch"] <= epoch if "top1" in record else record["step"] <= step:
                        file.write(line.encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, **record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()


def draw_curves(folder):
    """Draws curves.png from log.jsonl: loss, learning rate and accuracy against epochs."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, validations = [r for r in log if "loss" in r], [r for r in log if "top1" in r]
    with evaluate.figure(folder / "curves.png", 1, 2, figsize=(10, 3.6)) as (left, right):
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
        right.legend()
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training


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


def choose_parameters(model, tune):
    """Freezes what is not trained: the word embeddings, with `tune` "image" or "text" the other encoder, and with
    "prompts" all but these."""
    for name, parameter in model.named_parameters():
        encoder = "image" if name.startswith("visual.") else "text"
        if tune == "prompts":
            parameter.requires_grad_(name in clip.PROMPTS)
        else:
            trained = tune in ("both", encoder) and name != "token_embedding.weight"
            parameter.requires_grad_(trained or name == "logit_scale")


def compute_gradient(args, network, tokens, micro_batches, scaler, epoch, step):
    """Computes the gradient of one batch, the next of the iterator `micro_batches`, for optimizer step `step`, from 0.

    The texts are encoded once. The micro-batches before the last one leave the gradient with respect to the text
    embeddings there, and the last one takes it on into the text encoder; with it DDP adds up the gradients of all
    processes. Returns the loss, the seconds spent waiting for data, and what could not be read, of this process.
    """
    model = getattr(network, "module", network)  # without the wrapper of DDP
    device = tokens.device
    pieces = args.batch_size // evaluate.rank_and_world()[1] // args.micro_batch
    losses, wait, errors = 0.0, 0.0, []
    with evaluate.autocast(args, device):
        text = model.encode_text(tokens).float()  # [C, D]
    detached = text.detach().requires_grad_(text.requires_grad)
    for piece in range(pieces):
        begin = time.perf_counter()
        video, label, index, unreadable = next(micro_batches)
        wait += time.perf_counter() - begin
        errors += [line for lines in unreadable for line in lines.splitlines()]

        video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
        target = F.one_hot(label, len(tokens)).float()  # [B, C]
        if args.augment in ("color", "mix"):
            video = data.change_colors(video, data.draw_colors(args.seed, epoch, index.tolist()).to(device))
        if args.augment == "mix":
            video, target = data.mix(video, target, (args.seed, step))

        last = piece == pieces - 1
        with contextlib.nullcontext() if last or network is model else network.no_sync():
            with evaluate.autocast(args, device):
                logits = network(model.normalize(video), text if last else detached)  # [B, C]; image fusion: [B * T, C]
                target = target.repeat_interleave(len(logits) // len(target), dim=0)
                loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing) / pieces
            losses += loss.detach()
            loss = scaler.scale(loss)
            if last and detached.grad is not None:
                loss = loss + (text * detached.grad).sum()
            loss.backward()

    return losses.item(), wait, errors


def total(values, device):
    """The sums over all processes of a list of numbers."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def optimizer_step(args, network, tokens, micro_batches, optimizer, scaler, epoch, step, per_epoch):
    """One step of AdamW, from 0 on the number `step` of the run; see `compute_gradient`.

    Returns what the log says of it, and what this process could not read. Raises ValueError if the loss or its gradient
    is not finite, unless the scaler of fp16 can do something about it.
    """
    started = time.perf_counter()
    rate = learning_rate(step, args.epochs * per_epoch, args.warmup_epochs * per_epoch, args.lr)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss, wait, errors = compute_gradient(args, network, tokens, micro_batches, scaler, epoch, step)
    world = evaluate.rank_and_world()[1]
    loss, wait = total([loss / world, wait / world], tokens.device)

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite and not (scaler.is_enabled() and scaler.get_scale() >= 1):
        raise ValueError(f"the loss is {loss:g} and its gradient {norm:g} at step {step + 1}; try a lower --lr "
                         f"or --amp off. What was saved before is in {args.out}")
    scaler.step(optimizer)  # not where fp16 overflowed
    scaler.update()
    with torch.no_grad():
        getattr(network, "module", network).logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    took = time.perf_counter() - started
    record = dict(step=step + 1, epoch=(step + 1) / per_epoch, loss=loss, lr=rate, gradient_norm=norm,
                  videos_per_second=args.batch_size / took, data_wait=wait / took)
    return record if finite else record | {"skipped": True}, errors


def checkpoint(model, args, classes, **more):
    """All that it takes to use the model: the weights, how they are fed, the class names, the arguments. Of a model
    with a `backbone` only the prompts, and where to find the rest."""
    state = model.state_dict()
    if model.backbone:
        state = {name: value for name, value in state.items() if name in clip.PROMPTS}
        more["backbone"] = model.backbone
    return {"model": state, "mean": model.mean, "std": model.std, "template": model.template,
            "fusion": model.fusion, "classes": classes, "args": evaluate.as_dict(args), **more}


def save(path, content):
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # it hides what the disk said
            raise (error.__context__ or error) from None


def describe(args, model, parameters, classes, training, validation, world):
    """Prints what will be run."""
    steps, rest = divmod(training, args.batch_size)
    left_out = f" ({rest} left out of each epoch, others each time)" if 10 * rest > training else ""
    machine = torch.cuda.get_device_name() if args.gpus else "CPU"
    say(f"""\
model      {args.weights or args.model}, {sum(p.numel() for p in parameters):,} parameters to train ({args.tune})
data       {args.train_list or args.data}, split {args.split}, {args.classes} classes: {len(classes)}
videos     {training} for training{left_out}, {validation} for validation
input      {args.frames} frames of {model.image_size} x {model.image_size}, prompt {args.template!r}
training   {args.epochs} epochs of {steps} steps of {args.batch_size} videos, learning rate {args.lr:g}
augmented  {args.augment}, seed {args.seed}
machine    {world} x {machine}, {args.micro_batch} videos at once, mixed precision {args.amp}, {args.workers} workers
results    {args.out}""")


def catch_signals():
    """The list to which every SIGTERM and Ctrl-C is added from now on, so that a run can save before it ends; only the
    second Ctrl-C interrupts."""
    signals = []

    def stop_soon(number, _):
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)

    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    return signals


def refuse(unreadable, seen, failures=None):
    """Raises ValueError if too many videos cannot be read: of `seen` so many, or `failures` where some count twice."""
    if (failures or len(unreadable)) > MAX_UNREADABLE * max(seen, 200):
        raise ValueError(f"{len(unreadable)} videos cannot be read, over {MAX_UNREADABLE:.0%}: {unreadable[0]}")


def fit(args, model, train_samples, val_samples, classes, device, last=None):
    """Trains the parameters of `model` that require a gradient, with validation before the first and after every epoch.

    Leaves args.json, log.jsonl, curves.png, last.pt and best.pt in the folder `args.out`; `last`, the path of last.pt,
    is where an interrupted run goes on. Returns what is known at the end: a dict with the results of
    `evaluate.evaluate` "before" training and of the "best" epoch, the "unreadable" videos and the "seconds" it took.
    SIGTERM saves and exits with status 0, Ctrl-C with 130.
    """
    rank, world = evaluate.rank_and_world()
    per_epoch = len(train_samples) // args.batch_size
    if not per_epoch:
        raise ValueError(f"{len(train_samples)} training videos do not fill a batch of {args.batch_size}: choose a "
                         "--batch-size of at most their number")
    pieces = args.batch_size // world // args.micro_batch
    dataset = data.VideoDataset(train_samples, args.frames, model.image_size, train=True, seed=args.seed,
                                flip=args.data != "ssv2",  # there left and right make different classes
                                augment=args.augment)
    batches = data.Batches(len(dataset), args.batch_size, args.seed, rank, world, args.micro_batch)
    loader = data.make_loader(dataset, batches, args.workers)
    val_loader = evaluate.make_loader(args, model, val_samples)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=args.weight_decay,
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    progress = dict(step=0, epoch=0, before=None, best=None, failures=0, unreadable=[], seconds=0.0,
                    training_seconds=0.0)
    if last:
        state = torch.load(last, map_location=device, weights_only=True)
        then, now = (state.get("videos"), state["classes"]), (len(train_samples), classes)
        if then != now:
            raise ValueError(f"{last} is of a run on {then[0]} videos of {len(then[1])} classes, not these {now[0]} of "
                             f"{len(now[1])}")
        progress.update({name: state[name] for name in progress})
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if args.checkpoint_activations:
        model.visual.transformer.checkpointing = model.transformer.checkpointing = True
    if args.compile:
        model.visual.compile()
        model.transformer.compile()
    network = DistributedDataParallel(model) if world > 1 else model

    tokens = evaluate.class_tokens(model, classes, args.template).to(device)
    if rank == 0:
        if not args.resume:
            make_folder(args)
        log = Log(args.out, progress["step"], progress["epoch"] if last else -1, args.tensorboard)
    describe(args, model, parameters, classes, len(train_samples), len(val_samples), world)
    signals = catch_signals()
    begin = saved = time.perf_counter()
    earlier = progress["seconds"]  # of the processes before this one

    def save_last():
        if rank == 0:
            progress["seconds"] = earlier + time.perf_counter() - begin
            save(args.out / "last.pt", checkpoint(model, args, classes, optimizer=optimizer.state_dict(),
                                                  scaler=scaler.state_dict(), videos=len(train_samples), **progress))

    def stop():
        say(f"stopped after step {progress['step']}; to go on: python {Path(sys.argv[0]).name} --resume {args.out}")
        evaluate.finish()
        sys.exit(130 if signal.SIGINT in signals else 0)

    def validate(epoch):
        """Accuracy on the validation videos, logged and printed."""
        tokens = evaluate.class_tokens(model, classes, model.template)
        with evaluate.autocast(args, device):
            results = evaluate.evaluate(model, val_loader, tokens)
        if rank == 0:
            log.write(step=progress["step"], epoch=epoch, **results)
        say(f"epoch {epoch:2} of {args.epochs}   top-1 {results['top1']:5.1f} %   top-5 {results['top5']:5.1f} %"
            + (f"   (prompt {model.template!r})" if epoch == 0 else ""))
        refuse(results["unreadable"], results["count"])
        return results

    if progress["before"] is None:
        new = {name: getattr(model, name) for name in clip.PROMPTS if args.tune == "prompts"}
        for name in new:  # before them
            setattr(model, name, None)
        progress["before"] = validate(0)
        for name, prompts in new.items():
            setattr(model, name, prompts)
    else:
        say(f"goes on after step {progress['step']} of {args.epochs * per_epoch}")
    model.template, model.fusion = args.template, args.fusion
    bar = tqdm(total=args.epochs * per_epoch, initial=progress["step"], disable=evaluate.hide_bars(), bar_format=BAR)
    for epoch in range(progress["epoch"], args.epochs):
        model.train()
        batches.epoch, batches.skip = epoch, (progress["step"] - epoch * per_epoch) * pieces
        micro_batches = iter(loader)
        while progress["step"] < (epoch + 1) * per_epoch:
            record, errors = optimizer_step(args, network, tokens, micro_batches, optimizer, scaler, epoch,
                                            progress["step"], per_epoch)
            failures, stopping = total([len(errors), len(signals)], device)
            progress["step"] += 1
            progress["training_seconds"] += args.batch_size / record["videos_per_second"]
            if failures:
                record["unreadable"] = sorted(evaluate.gather(errors))
                progress["unreadable"] = sorted({*progress["unreadable"], *record["unreadable"]})
                progress["failures"] += int(failures)
                refuse(progress["unreadable"], progress["step"] * args.batch_size, progress["failures"])
            if rank == 0:
                log.write(**record)
            bar.set_postfix_str(f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, "
                                f"{record['videos_per_second']:.0f} videos/s, data wait {record['data_wait']:.0%}")
            bar.update()
            if stopping or time.perf_counter() - saved > 60 * args.save_minutes:
                save_last()
                saved = time.perf_counter()
            if stopping:
                stop()

        results = validate(epoch + 1)
        progress["epoch"] = epoch + 1
        if progress["best"] is None or results["top1"] >= progress["best"]["top1"]:
            progress["best"] = results
            if rank == 0:
                save(args.out / "best.pt", checkpoint(model, args, classes, epoch=epoch + 1, top1=results["top1"]))
        save_last()
        saved = time.perf_counter()
        if rank == 0:
            draw_curves(args.out)
        if total([len(signals)], device)[0] and epoch + 1 < args.epochs:
            stop()
    bar.close()
    return progress


def last_checkpoint(args):
    """The path of what an interrupted run has saved; None for a new run, or one that had saved nothing."""
    return args.out / "last.pt" if args.resume and (args.out / "last.pt").exists() else None


def report(args, progress, device):
    """Prints what came out of `fit`."""
    before, best = progress["before"], progress["best"]
    for error in sorted({*progress["unreadable"], *best["unreadable"]}):
        say(f"unreadable {error}")
    minutes, seconds = divmod(round(progress["seconds"]), 60)
    speed = progress["step"] * args.batch_size / progress["training_seconds"]
    say(f"""
              top-1    top-5
before       {before["top1"]:6.1f}   {before["top5"]:6.1f}   %
{"prompts" if args.tune == "prompts" else "fine-tuned":10}   {best["top1"]:6.1f}   {best["top5"]:6.1f}   %
{minutes} min {seconds} s, {speed:.0f} videos/s in training, {memory(device):.1f} GiB of memory at most
the best model is {args.out / "best.pt"}""")


def main():
    """Fine-tuning, new or resumed, from the arguments to the figures at the end."""
    parser = make_parser(__doc__, PAPER, TINY)
    group = parser.add_argument_group("what is trained, and what is averaged over time")
    group.add_argument("--tune", choices=("both", "image", "text"), default="both", help="encoders (default: both)")
    group.add_argument("--fusion", choices=("embedding", "decision", "image"), default="embedding", metavar="WHAT",
                       help="embedding: those of the frames; decision: their logits; image: nothing, when testing "
                            "their probabilities (default: %(default)s)")
    args = parse_args(parser, PAPER, TINY)
    device = evaluate.start(args)
    train_samples, classes = data.load_samples(args, train=True)
    val_samples, _ = data.load_samples(args, train=False)
    last = last_checkpoint(args)
    model = clip.load(last or args.weights or args.model, device, image_size=args.resolution)
    choose_parameters(model, args.tune)
    report(args, fit(args, model, train_samples, val_samples, classes, device, last), device)
    evaluate.finish()


if __name__ == "__main__":
    data.run(main)
