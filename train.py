"""Fine-tuning CLIP on videos (section 3.1 of the paper): both encoders, plain cross entropy, nothing else.

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames), encode_text("a photo of a {class}."))
    loss   = cross entropy(logits, class), with label smoothing

The frame embeddings are averaged before the comparison. So a model of single images learns from videos: the gradient of
one video's loss reaches all its frames together. The recipe is that of the original code: AdamW, a linear warm-up, a
cosine down to a hundredth of the learning rate, and mixup or CutMix. The word embeddings are not trained.

    python train.py                                       the toy: a minute and a half on two CPU cores
    python train.py --data ucf101 --gpus 1
    python train.py --resume runs/ucf101                  continue an interrupted run
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script at once while PyTorch is imported

import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import clip
import data
import evaluate
from data import UserError, rank, say

# The settings of the paper's zero-shot experiment, and those that suit a model of a hundredth of the size. The flags of
# `main` have the same names and explain them.
PAPER = dict(
    data=None, root=None, split=1, classes="all", train_list=None, val_list=None, labels=None,
    model=None, weights=None, activation=None, template="a photo of a {}.", tune="both", fusion="embedding",
    frames=32, shots=None, augment="mix", seed=1024,
    batch_size=256, epochs=10, warmup_epochs=5, lr=8e-6,
    gpus=None, workers=min(evaluate.CORES, 8), amp=None, micro_batch=8, checkpoint_activations=False, compile=False,
    out=None, resume=None, save_minutes=15,
)
TINY = PAPER | dict(frames=8, augment="crop", batch_size=32, warmup_epochs=1, lr=8e-4, micro_batch=32)

WEIGHT_DECAY = 1e-3  # in all experiments
LABEL_SMOOTHING = 0.1
MAX_LOGIT_SCALE = math.log(100)  # OpenAI's bound: exp(logit_scale) <= 100
MAX_UNREADABLE = 0.05  # of the videos
BAR = "{percentage:3.0f}% {bar:20} {elapsed} < {remaining} left{postfix}"


# ---- Training -------------------------------------------------------------------------------------------------------

def learning_rate(step, steps, warmup_steps, peak):
    """The learning rate of step 0, 1, ... of `steps`:

        warm-up   peak * step / warmup_steps
        then      floor + (peak - floor) * (1 + cos(pi * step / steps)) / 2,    floor = peak / 100

    The cosine counts from step 0 too, as in the original code (timm's schedule without `warmup_prefix`), so
    it starts below the peak. Step 0 of a warm-up changes nothing."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    floor = peak / 100
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def train(args, model, state, samples, val_loader):
    """Trains the parameters of a CLIP that require a gradient on `samples`, (path, label). Validates after every epoch.
    Updates the `state` of `open_run`. Leaves log.jsonl, curves.png, last.pt and best.pt in the folder args.out."""
    device = model.logit_scale.device
    steps_per_epoch = len(samples) // args.batch_size
    steps = args.epochs * steps_per_epoch
    warmup_steps = args.warmup_epochs * steps_per_epoch
    micro_steps = args.batch_size // args.world // args.micro_batch  # forward and backward passes of an optimizer step

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if state.step:  # a resumed run
        last = torch.load(args.out / "last.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
    network = DistributedDataParallel(model) if args.world > 1 else model

    dataset = data.VideoDataset(samples, args.frames, model.image_size, train=True, seed=args.seed,
                                classes=state.classes, augment=args.augment)
    batches = data.training_batches(
        len(samples), args.batch_size, args.epochs, args.seed, rank(), args.world, args.micro_batch)
    batches = itertools.islice(batches, state.step * micro_steps, None)  # a resumed run has read the first ones
    loader = iter(data.Loader(dataset, batches, args.workers))
    tokens = evaluate.class_tokens(model, state.classes)  # [C, L]
    bar = tqdm(total=steps, initial=state.step, bar_format=BAR, disable=rank() > 0 or None)  # None: on terminals only
    saved = time.perf_counter()

    while state.step < steps:
        begin = time.perf_counter()
        wait = 0.0
        loss_sum = 0.0
        errors = []
        lr = learning_rate(state.step, steps, warmup_steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        torch.manual_seed(args.seed + state.step)  # for dropout that is added: a resumed run draws the same

        for i in range(micro_steps):
            # Load uint8 videos [B, T, 3, S, S] and their labels [B]
            waiting = time.perf_counter()
            video, label, index, unreadable = next(loader)
            wait += time.perf_counter() - waiting
            for lines in unreadable:
                errors += lines.splitlines()
            video = video.to(device, non_blocking=True)
            label = label.to(device, non_blocking=True)

            # Augment and normalise on the device; the target [B, C] has a probability for each class
            if args.augment in ("color", "mix"):
                video = data.change_colors(video, args.seed, state.step // steps_per_epoch, index.tolist())
            video = model.normalize(video)
            target = F.one_hot(label, len(state.classes)).float()
            if args.augment == "mix":  # groups are numbered in the whole batch, however it is divided
                first_group = (rank() * micro_steps + i) * args.micro_batch // data.GROUP
                video, target = data.mix(video, target, args.seed, state.step, first_group)
            if model.fusion == "image":  # every frame is an example
                target = target.repeat_interleave(args.frames, dim=0)

            # Forward, loss, backward. Gradients add up; DDP averages them over the processes in the last pass
            network.require_backward_grad_sync = i == micro_steps - 1  # ignored without DDP
            with evaluate.autocast(args.amp, device):
                logits = network(video, tokens)  # [B, C], or [B * T, C] with fusion "image"
                loss = F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING) / micro_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()  # .item() would synchronise

        # Step, unless the gradient is not finite: fp16 may overflow until the scaler has found its scale
        scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None]).item()
        losses = evaluate.gather([loss_sum.item()])  # of all processes
        errors = evaluate.gather(errors)
        loss = sum(losses) / args.world
        finite = math.isfinite(loss) and math.isfinite(norm)
        may_skip = scaler.is_enabled() and scaler.get_scale() >= 1
        if not finite and not may_skip:
            raise UserError(f"the loss is {loss:g} and its gradient {norm:g} at step {state.step + 1}; try a lower "
                            f"--lr or --amp off. What was saved before is in {args.out}")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

        # Log
        seconds = time.perf_counter() - begin
        speed = args.batch_size / seconds
        wait = wait / seconds
        state.step += 1
        state.seconds += seconds
        state.losses.append(loss)
        log(args.out, step=state.step, epoch=state.step / steps_per_epoch, loss=loss, lr=lr, gradient_norm=norm,
            skipped=not finite, videos_per_second=speed, data_wait=wait, unreadable=sorted(errors))
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:.2f} videos/s, data wait {wait:.0%}")
        bar.update()
        tell_unreadable(errors, state, samples, args.batch_size)

        # Validate after each epoch; save then, and every few minutes
        epoch_ends = state.step % steps_per_epoch == 0
        if epoch_ends:
            validate(args, model, state, val_loader)
            if state.validations[-1]["top1"] == max(result["top1"] for result in state.validations[1:]):
                save(args.out / "best.pt", args, model, state)
        if epoch_ends or time.perf_counter() - saved > 60 * args.save_minutes:
            save(args.out / "last.pt", args, model, state, optimizer, scaler)
            saved = time.perf_counter()
        if epoch_ends:
            draw_curves(args.out / "curves.png", state)
    bar.close()


def tell_unreadable(errors, state, samples, batch_size):
    """Names the unreadable videos of a step, each once in a run. Raises UserError if they are too many, or all."""
    new = sorted({*errors} - {*state.unreadable})
    for error in new:
        say(f"unreadable, replaced by another video: {error}")
    state.unreadable += new
    evaluate.check_unreadable(state.unreadable, min(state.step * batch_size, len(samples)), MAX_UNREADABLE)
    if new and len(state.unreadable) == len(dict(samples)):  # a list may have a video twice
        raise UserError("none of the training videos can be read")


def validate(args, model, state, loader):
    """Measures the accuracy on the validation videos with the template of the model; prints, logs and stores it."""
    with evaluate.autocast(args.amp, model.logit_scale.device):
        results = evaluate.evaluate(model, loader, evaluate.class_tokens(model, state.classes), MAX_UNREADABLE)
    epoch = len(state.validations)
    note = f"   prompt {model.template!r}"
    if epoch:
        losses = state.losses[-(state.step // epoch) :]
        note = f"   training loss {sum(losses) / len(losses):.3f}"
    say_accuracy(f"epoch {epoch:2} of {args.epochs}", results, state.classes, note)
    log(args.out, step=state.step, epoch=epoch, **results)
    state.validations.append(results)


def say_accuracy(title, result, classes, note=""):
    top5 = f"   top-5 {result['top5']:5.1f} %" if len(classes) > 5 else ""
    say(f"{title:15}   top-1 {result['top1']:5.1f} %{top5}{note}")


# ---- What a run leaves ----------------------------------------------------------------------------------------------

def open_run(args, device, samples, classes):
    """Loads the model and the state of a run: of a new one, for which it makes a folder, or of the one in args.out.
    Writes args.json. Raises UserError if the data are not those of the run."""
    if len(samples) < args.batch_size:
        raise UserError(f"{len(samples)} training videos are fewer than --batch-size {args.batch_size}")
    state = SimpleNamespace(
        step=0, losses=[], validations=[], unreadable=[], seconds=0.0, videos=len(samples), classes=classes)
    weights = args.weights or args.model
    last = Path(args.out or "", "last.pt")
    resumed = args.out and last.exists()
    if resumed:
        weights = last
        content = torch.load(last, map_location="cpu", weights_only=True)
        if content["videos"] != state.videos or content["classes"] != classes:
            raise UserError(f"{last} was trained on other data: {content['videos']} videos of "
                            f"{len(content['classes'])} classes, not these {state.videos} of {len(classes)}; to go on "
                            f"with these, {new_run(args.out, vars(args))}")
        for name in vars(state):
            setattr(state, name, content[name])
    torch.manual_seed(args.seed)  # for layers that are added to the model
    model = clip.load(weights, device, activation=args.activation)
    if resumed and model.state_dict().keys() != content["model"].keys():
        raise UserError(f"{last} was trained before these parameters were added to the code: start a new run")
    model.visual.transformer.checkpointing = args.checkpoint_activations
    model.transformer.checkpointing = args.checkpoint_activations
    if args.compile:
        model.visual.compile()
        model.transformer.compile()

    [args.out] = evaluate.gather([make_folder(args)] if rank() == 0 else [])
    if rank() == 0:
        data.write_json(args.out / "args.json", vars(args))
        if not resumed:  # what is there belongs to a run that failed before its first checkpoint
            (args.out / "log.jsonl").unlink(missing_ok=True)
    if resumed:
        log(args.out, resumed=state.step)  # ends a line that was cut off
        say(f"resuming after step {state.step}")
        if len(state.validations) > args.epochs:
            say(f"this run is finished; to train further, {new_run(args.out, vars(args))}")
    return model, state


def new_run(folder, settings):
    """How to go on where a run cannot be resumed. Prompts are learned for the weights that they started from."""
    weights = folder / "best.pt"
    if settings["tune"] == "prompts":
        weights = settings["weights"] or settings["model"]
    return f"start a new run with --weights {weights}"


def make_folder(args):
    """Makes args.out, by default runs/DATA, or runs/DATA-2 and so on if another run has it."""
    name = Path(args.data or args.train_list).stem
    folder = args.out or Path("runs", name)
    number = 1
    with data.disk_errors(folder):
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=folder == args.out)
                return folder
            except FileExistsError:  # another run was faster
                if args.out:  # a file
                    raise
                number += 1
                folder = Path("runs", f"{name}-{number}")


def save(path, args, model, state, optimizer=None, scaler=None):
    """Saves the model and its settings, with an optimizer also what resuming needs; in the main process."""
    if rank() > 0:
        return
    content = {
        "model": model.state_dict(),
        "mean": model.mean,
        "std": model.std,
        "template": model.template,
        "fusion": model.fusion,
        "activation": model.activation,
        "args": vars(args) | {"out": str(args.out)},
        **vars(state),
    }
    if optimizer:
        content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    try:
        with data.writing(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # torch raises it for what the disk reports
        if "DataLoader worker" in str(error):  # a worker was killed meanwhile
            raise
        raise UserError(f"cannot write {path}; is the disk full? {error}") from error


def log(folder, **record):
    """Appends a record to log.jsonl, in the main process. Of a step that a resumed run repeats, the last one counts."""
    path = folder / "log.jsonl"
    if rank() == 0:
        with data.disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def draw_curves(path, state):
    """Draws the loss of each step, and the accuracy before training and after each epoch; in the main process."""
    from matplotlib.figure import Figure

    if rank() > 0:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(state.losses, linewidth=1)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.plot([result["top1"] for result in state.validations], "o-", label="top-1")
    if len(state.classes) > 5:
        right.plot([result["top5"] for result in state.validations], "o-", label="top-5")
    right.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 102))
    right.legend(loc="lower right")
    with data.writing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def describe(args, model, state):
    """Prints what the run will do."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    weights = evaluate.relative(args.weights or args.model)
    videos = evaluate.relative(args.train_list or args.data)
    steps, left_out = divmod(state.videos, args.batch_size)
    split = f", split {args.split}" if args.split > 1 else ""
    prompt = f"prompt {model.template!r}"
    if model.activation != "quick_gelu":
        prompt += f", activation {model.activation}"
    say(f"""\
model      {weights}, {trained:,} parameters to train ({args.tune}), {prompt}
frozen     {', '.join(sorted(frozen))}
data       {videos}{split}, {args.classes} classes: {len(state.classes)}
videos     {state.videos} to train, {state.validations[0]["count"]} to validate; {args.frames} frames, \
{model.image_size} pixels
training   {args.epochs} epochs of {steps} steps of {args.batch_size} videos, {left_out} left out of each; learning \
rate {args.lr:g}, --augment {args.augment}
machine    {args.world} x {model.logit_scale.device.type}, {args.micro_batch} videos at once, --amp {args.amp}
results    {args.out}""")


@contextlib.contextmanager
def resumable(args):
    """Tells how to continue after Ctrl-C, if there is a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if not (args.out / "last.pt").exists():
            raise
        raise KeyboardInterrupt(f"to go on: python {args.script} --resume {args.out}") from None


def report(args, state):
    """Prints the accuracy before training, after the best epoch and after the last one."""
    epochs = len(state.validations) - 1  # the first validation is that before training
    best_epoch = max(range(epochs, 0, -1), key=lambda epoch: state.validations[epoch]["top1"])  # of equals the last
    before, best, last = state.validations[0], state.validations[best_epoch], state.validations[-1]
    for error in best["unreadable"]:
        say(f"unreadable, counted as wrong: {error}")
    say()
    say_accuracy("before training", before, state.classes)
    say_accuracy(f"best: epoch {best_epoch}", best, state.classes)
    say_accuracy(f"last: epoch {epochs}", last, state.classes)
    minutes, seconds = divmod(round(state.seconds), 60)
    speed = state.step * args.batch_size / state.seconds
    say(f"{minutes} min {seconds} s of training, validation not counted; {speed:.2f} videos/s")
    model = args.out / "best.pt"
    if best["top1"] <= before["top1"]:
        model = evaluate.relative(args.weights or args.model)
        say("no epoch is better than before training")
    say(f"the best model is {model}")


# ---- Command line ---------------------------------------------------------------------------------------------------

# What may change when a run is resumed. Other settings would change its result.
MAY_CHANGE = {"data", "root", "train_list", "val_list", "labels", "workers", "gpus", "micro_batch", "compile",
              "checkpoint_activations", "save_minutes", "out"}


def make_parser(doc, paper, tiny):
    """A parser with the flags that fine-tuning and prompt learning share."""
    parser = data.Parser(doc, paper, tiny)
    evaluate.add_flags(parser, training=True)
    parser.flag("--epochs", "passes over the data", data.at_least(1))
    parser.flag("--warmup-epochs", "length of the linear warm-up", data.at_least(0, float))
    parser.flag("--lr", "peak learning rate", data.at_least(0, float))
    parser.flag("--micro-batch", "most videos in one forward pass on a GPU; the gradient is that of the batch",
                data.at_least(1))
    parser.flag("--checkpoint-activations", "store fewer activations, compute them twice: a third more time", bool)
    parser.flag("--compile", "compile both encoders: slower to start, then faster", bool)
    parser.flag("--out", "folder for checkpoints and log; by default runs/DATA, runs/DATA-2 and so on", Path)
    parser.flag("--resume", "continue the run in this folder; only paths of data and the machine may change", Path)
    parser.flag("--save-minutes", "save every so many minutes, and after each epoch", data.at_least(0, float))
    return parser


def parse_args(parser):
    """The settings of a run. Exits with status 2 if the flags are wrong."""
    typed = vars(parser.parse_args())
    saved = {}
    folder = typed.pop("resume", None)
    if folder:
        last = folder / "last.pt"
        if not last.exists():
            parser.error(f"--resume: {last} is not there, so there is nothing to continue")
        saved = evaluate.trained_with(last)
        typed["out"] = folder
        if saved.get("script") != parser.prog:
            parser.error(f"--resume: {folder} is not a run of {parser.prog} but of {saved.get('script')}")
        for name in typed.keys() - MAY_CHANGE:
            if typed[name] != saved[name]:
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"--resume cannot change {flag}: {folder} has {saved[name]!r}, not {typed[name]!r}; to go "
                             f"on with other settings, {new_run(folder, saved)}")
    elif trained := evaluate.trained_with(typed.get("weights")):
        saved = {"model": trained.get("model")}
    args = evaluate.choose_settings(typed, saved, parser.paper, parser.tiny)
    args.script = parser.prog
    data.check_lists(parser, args)
    if not folder and args.out and ((args.out / "last.pt").exists() or (args.out / "best.pt").exists()):
        parser.error(f"--out {args.out} holds a run: choose another folder, or --resume it if it has last.pt")
    evaluate.choose_device(parser, args)
    share, rest = divmod(args.batch_size, args.world)
    if rest:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of the {args.world} processes")
    unit = data.GROUP if args.augment == "mix" else 1
    sizes = [size for size in range(unit, args.micro_batch + 1, unit) if share % size == 0]
    if not sizes:
        parser.error(f"--augment mix takes clips in groups of {unit}, not {share} clips with --micro-batch "
                     f"{args.micro_batch}: choose another --batch-size or --micro-batch, or --augment color")
    args.micro_batch = sizes[-1]
    if args.warmup_epochs >= args.epochs:
        say(f"warning: the learning rate never reaches --lr in {args.epochs} epochs: lower --warmup-epochs")
    return args


def freeze(model, tune):
    """Freezes the word embeddings and, if only one encoder is tuned, the other one and logit_scale. Parameters that are
    added to CLIP are trained."""
    text = ("positional_embedding", "transformer", "ln_final", "text_projection", "text_prompts")
    frozen = {"both": (), "image": (*text, "logit_scale"), "text": ("visual", "logit_scale")}[tune]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("token_embedding", *frozen)))


def main():
    """Fine-tunes a CLIP on a data set."""
    parser = make_parser(__doc__, PAPER, TINY)
    parser.flag("--tune", "encoders to train; logit_scale is trained with both", ("both", "image", "text"))
    parser.flag("--fusion", "what is averaged over the frames: their embeddings, their logits (decision), or their "
                "probabilities (image; in training every frame is an example)",
                ("embedding", "decision", "image"))
    args = parse_args(parser)
    device = evaluate.start(args)
    samples, val_samples, classes = data.load_train_val(args)
    model, state = open_run(args, device, samples, classes)
    val_loader = evaluate.evaluation_loader(val_samples, args.frames, model.image_size, args.micro_batch, args.workers)
    if not state.validations:
        validate(args, model, state, val_loader)  # before training
    freeze(model, args.tune)
    model.template = args.template
    model.fusion = args.fusion
    describe(args, model, state)
    with resumable(args):
        train(args, model, state, samples, val_loader)
    report(args, state)


if __name__ == "__main__":
    data.run(main, clip.InputError)
