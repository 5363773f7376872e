"""Fine-tuning CLIP on videos (section 3.1): both encoders, plain cross entropy, nothing else.

    logits = exp(logit_scale) * cos(mean over time of encode_image(frames), encode_text("a photo of a {class}."))
    loss   = cross entropy(logits, class), with label smoothing

Because the frame embeddings are averaged before the comparison, a model of single images learns from videos: the
gradient of one video's loss reaches all its frames together. The recipe is that of the original code: AdamW, a linear
warm-up and a cosine to a hundredth of the learning rate, mixup or CutMix, and the word embeddings are not trained.

    python train.py                                       the toy: a minute and a half on two CPU cores
    python train.py --data ucf101 --gpus 1
    python train.py --resume runs/ucf101                  go on with an interrupted run
"""
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

# The zero-shot row of the paper's experiments, and what suits a model of a hundredth of the size
PAPER = dict(frames=32, batch_size=256, epochs=10, warmup_epochs=5, lr=8e-6, augment="mix")
TINY = dict(frames=8, batch_size=32, epochs=10, warmup_epochs=1, lr=8e-4, augment="crop")

WEIGHT_DECAY, LABEL_SMOOTHING = 1e-3, 0.1  # in all experiments
MAX_LOGIT_SCALE = math.log(100)  # OpenAI's bound: exp(logit_scale) <= 100
MAX_UNREADABLE = 0.05  # of the videos seen
BAR = "{percentage:3.0f}% {bar:20} {elapsed} < {remaining} left{postfix}"

# ---- Command line ---------------------------------------------------------------------------------------------------

# Flags that may change when a run is resumed. Others would change the result.
MAY_CHANGE = {"data", "root", "train_list", "val_list", "labels", "workers", "gpus", "micro_batch", "compile",
              "checkpoint_activations", "save_minutes", "out", "resume"}


def make_parser(doc):
    """The flags that training of any kind has."""
    parser = data.Parser(doc)
    parser.set_defaults(script=parser.prog)
    evaluate.add_arguments(parser, training=True)
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=data.at_least(1), metavar="N", help="passes over the data (default: %(default)s)")
    add("--warmup-epochs", type=data.at_least(0, float), metavar="X",
        help="until the learning rate is at its highest (default: %(default)s)")
    add("--lr", type=data.at_least(0, float), metavar="X", help="highest learning rate (default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--micro-batch", type=data.at_least(1), metavar="N", help="videos on a GPU at once, by default 8; of tiny all")
    add("--checkpoint-activations", action="store_true", help="compute them twice: less memory, a third more time")
    add("--compile", action="store_true", help="compile both encoders: slower to start, then faster")
    add("--out", type=Path, metavar="FOLDER", help="for checkpoints and log, by default runs/DATA")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run in FOLDER, with its arguments")
    add("--save-minutes", type=data.at_least(0, float), metavar="X", default=15.0,
        help="save at least this often (default: %(default)s)")
    return parser


def parse_args(parser, paper, tiny):
    """The arguments of a run; the defaults of a resumed one are its own. Ends wrong calls with exit status 2."""
    given, *_ = evaluate.first_look(parser, paper, tiny)
    saved = {}
    if given.resume:
        try:
            saved = dict(json.loads(Path(given.resume, "args.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"--resume: there is no run in {given.resume}, its args.json cannot be read ({error})")
        if saved.get("script") != parser.prog:
            parser.error(f"--resume: {given.resume} is a run of {saved.get('script')}")
        parser.set_defaults(**saved)
    args = parser.parse_args()
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {value!r} in {args.resume} and cannot become {getattr(args, name)!r}")
    data.check_lists(parser, args)
    if not args.resume and args.out and (args.out / "last.pt").exists():
        parser.error(f"--out {args.out} holds a run already; go on with it by --resume, or choose another folder")
    args.out = args.resume or args.out
    if not args.out:
        name = Path(args.data or args.train_list).stem
        folders = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
        args.out = next(folder for folder in folders if not folder.exists())
    evaluate.choose_device(parser, args)
    share, rest = divmod(args.batch_size, args.world)
    args.micro_batch = min(args.micro_batch or (share if args.model == "tiny" else math.gcd(share, 8)), share)
    if rest or share % args.micro_batch:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of the processes times --micro-batch")
    if args.augment == "mix" and args.micro_batch % data.GROUP:
        parser.error(f"--augment mix takes clips in groups of {data.GROUP}, not of {args.micro_batch}: "
                     "choose another --batch-size or --micro-batch, or --augment color")
    if args.warmup_epochs >= args.epochs:
        say(f"warning: the learning rate never reaches --lr in {args.epochs} epochs: lower --warmup-epochs")
    return args


# ---- What a run leaves ----------------------------------------------------------------------------------------------

def save(path, model, args, state, optimizer=None, scaler=None):
    """Saves the model, what it takes to use it and, with an optimizer, to resume the run; in the main process. The file
    is written beside its place and then renamed: a kill or a full disk leaves the old one whole."""
    content = {"model": model.state_dict(), "mean": model.mean, "std": model.std, "template": model.template,
               "fusion": model.fusion, "args": vars(args) | {"out": str(args.out), "resume": None}, **vars(state)}
    if optimizer:
        content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    if rank() == 0:
        temporary = path.with_suffix(".tmp")
        try:
            torch.save(content, temporary)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for what the disk reports
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}, is the disk full? A previous one is intact. ({error})") from error


def log(args, **record):
    """Appends a record to log.jsonl, in the main process; of a step that a resumed run repeats, the last counts."""
    if rank() == 0:
        with open(args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def draw_curves(folder, state):
    """Draws curves.png: the loss of each step, and the accuracy before training and after each epoch."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    left.plot(state.losses, linewidth=1)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.plot([(result["top1"], result["top5"]) for result in state.validations], "o-", label=["top-1", "top-5"])
    right.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 102))
    right.legend(loc="lower right")
    picture.savefig(folder / "curves.png", dpi=120)


def describe(args, model, state):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = state.validations[0]
    say(f"""\
model      {args.weights or args.model}, {trained:,} parameters to train ({args.tune}), prompt {args.template!r}
data       {args.train_list or args.data}, split {args.split}, {args.classes} classes: {len(state.classes)}
videos     {state.videos} to train, {before["count"]} to validate; {args.frames} frames, {model.image_size} pixels
training   {args.epochs} epochs, {args.batch_size} videos a batch, learning rate {args.lr:g}, --augment {args.augment}
machine    {args.world} x {model.logit_scale.device.type}, {args.micro_batch} videos at once, --amp {args.amp}
results    {args.out}""")


# ---- Training -------------------------------------------------------------------------------------------------------

def learning_rate(step, steps, warmup_steps, peak):
    """The learning rate of step 0, 1, ... of `steps`:

        warm-up   peak * step / warmup_steps
        then      floor + (peak - floor) * (1 + cos(pi * step / steps)) / 2,    floor = peak / 100

    The cosine counts from step 0 too, as in the original code (timm's schedule without `warmup_prefix`)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    floor = peak / 100
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def choose_parameters(model, args, new):
    """Freezes the word embeddings and, where one encoder alone is tuned, the other and logit_scale."""
    for name, parameter in model.named_parameters():
        encoder = "both" if name == "logit_scale" else "image" if name.startswith("visual") else "text"
        parameter.requires_grad_(args.tune in ("both", encoder) and name != "token_embedding.weight")


def validate(args, model, loader, state):
    """Measures accuracy on the validation videos with the template of the model, prints, logs and stores it."""
    with evaluate.autocast(args, model.logit_scale.device):
        results = evaluate.evaluate(model, loader, evaluate.class_tokens(model, state.classes))
    epoch = len(state.validations)
    say(f"epoch {epoch:2} of {args.epochs}   top-1 {results['top1']:5.1f} %   top-5 {results['top5']:5.1f} %"
        + (f"   (prompt {model.template!r})" if epoch == 0 else ""))
    log(args, step=state.step, epoch=epoch, **results)
    check_unreadable(results["unreadable"], results["count"])
    state.validations.append(results)


def check_unreadable(errors, seen):
    """Raises UserError if too many of the videos that were `seen` could not be read."""
    if len(errors) > MAX_UNREADABLE * max(seen, 200):
        raise UserError(f"over {MAX_UNREADABLE:.0%} of the videos cannot be read, such as {errors[-1]}")


def set_up(args, model, prepare, val_loader, last, state):
    """Prepares a model for training, and makes its optimizer and the scaler of fp16. A new run gets its folder, and its
    model is validated before training; a resumed run continues from the state in `last`, the path of its last.pt."""
    if rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        temporary = args.out / "args.tmp"  # renamed when it is whole: the disk may be full
        temporary.write_text(json.dumps(vars(args), indent=1, default=str) + "\n", encoding="utf-8")
        temporary.replace(args.out / "args.json")
        if not last:  # what is there is of a run that failed before its first checkpoint
            (args.out / "log.jsonl").unlink(missing_ok=True)
    if not last:
        validate(args, model, val_loader, state)
    prepare(model, args, new=not last)
    model.template, model.fusion = args.template, args.fusion
    model.visual.transformer.checkpointing = model.transformer.checkpointing = args.checkpoint_activations
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.98),
                                  eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(model.logit_scale.device.type, enabled=args.amp == "fp16")
    if last:
        content = torch.load(last, map_location="cpu", weights_only=True)
        if (content["videos"], content["classes"]) != (state.videos, state.classes):
            raise UserError(f"{last} is of a run on {content['videos']} videos of {len(content['classes'])} classes, "
                            f"not these {state.videos} of {len(state.classes)}")
        vars(state).update({name: content[name] for name in vars(state)})
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        log(args, resumed=state.step)  # ends a line that was cut off
        say(f"resumes after step {state.step}")
    if args.compile:
        model.visual.compile()
        model.transformer.compile()
    return optimizer, scaler


def train(args, prepare):
    """Trains a CLIP, with validation before the first and after every epoch. Returns the state at the end.
    `prepare(model, args, new)` says which parameters of the loaded model require a gradient, and in prompt.py it adds
    prompts if the run is new. Leaves args.json, log.jsonl, curves.png, last.pt and best.pt in the folder `args.out`."""
    device = evaluate.start(args)

    # The videos and their classes, the model, and the state of the run
    train_samples, classes = data.load_samples(args, train=True)
    val_samples, val_classes = data.load_samples(args, train=False)
    if val_classes != classes:
        raise UserError(f"training has the classes {', '.join(classes)[:80]}, validation {', '.join(val_classes)[:80]}")
    steps_per_epoch = len(train_samples) // args.batch_size
    if not steps_per_epoch:
        raise UserError(f"{len(train_samples)} training videos are fewer than --batch-size {args.batch_size}")
    last = args.out / "last.pt" if (args.out / "last.pt").exists() else None  # only if the run is resumed
    model = clip.load(last or args.weights or args.model, device, image_size=args.resolution)
    val_loader = evaluate.make_loader(args, model.image_size, val_samples, args.micro_batch)
    state = SimpleNamespace(step=0, losses=[], validations=[], unreadable=[], seconds=0.0, videos=len(train_samples),
                            classes=classes)
    optimizer, scaler = set_up(args, model, prepare, val_loader, last, state)
    network = DistributedDataParallel(model) if args.world > 1 else model

    # The order in which the videos are read, the workers that read them, and the class names
    clips = data.VideoDataset(train_samples, args.frames, model.image_size, train=True, seed=args.seed,
                              classes=classes, augment=args.augment)
    batches = data.training_batches(len(clips), args.batch_size, args.epochs, args.seed, rank(), args.world,
                                    args.micro_batch)
    steps, micro_steps = args.epochs * steps_per_epoch, args.batch_size // args.world // args.micro_batch
    batches = itertools.islice(batches, state.step * micro_steps, None)  # a resumed run has read those before
    loader = iter(data.make_loader(clips, batches, args.workers))
    tokens = evaluate.class_tokens(model, classes)  # [C, L]
    describe(args, model, state)
    bar = tqdm(total=steps, initial=state.step, disable=rank() > 0 or None, bar_format=BAR)  # None: on terminals only
    saved = time.perf_counter()

    while state.step < steps:
        begin, wait, loss_sum, errors = time.perf_counter(), 0.0, 0.0, []
        lr = learning_rate(state.step, steps, args.warmup_epochs * steps_per_epoch, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        model.train()

        for i in range(micro_steps):
            # Load uint8 videos [B, T, 3, S, S] and their labels [B]
            waiting = time.perf_counter()
            video, label, index, unreadable = next(loader)
            wait += time.perf_counter() - waiting
            errors += [line for lines in unreadable for line in lines.splitlines()]
            video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)

            # Augment and normalise on the device; the target [B, C] has a probability for each class
            if args.augment in ("color", "mix"):
                video = data.change_colors(video, args.seed, state.step // steps_per_epoch, index.tolist())
            video, target = model.normalize(video), F.one_hot(label, len(classes)).float()
            if args.augment == "mix":  # by the numbers of the groups in the batch, however it is divided
                first_group = (rank() * micro_steps + i) * args.micro_batch // data.GROUP
                video, target = data.mix(video, target, args.seed, state.step, first_group)

            # Forward, loss, backward: gradients add up, and DDP averages them over the processes in the last one
            more_follow = args.world > 1 and i < micro_steps - 1
            with network.no_sync() if more_follow else contextlib.nullcontext():
                with evaluate.autocast(args, device):
                    logits = network(video, tokens)  # [B, C]; with --fusion image [B * T, C]
                    target = target.repeat_interleave(len(logits) // len(target), dim=0)
                    loss = F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING) / micro_steps
                scaler.scale(loss).backward()
            loss_sum += loss.detach()  # on the device: a number here would wait for it

        # Step, unless the gradient is not finite; fp16 may overflow until the scaler has found its scale
        scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        loss, errors = sum(evaluate.gather([loss_sum.item()])) / args.world, evaluate.gather(errors)  # of all
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and not (scaler.is_enabled() and scaler.get_scale() >= 1):
            raise UserError(f"the loss is {loss:g} and its gradient {norm:g} at step {state.step + 1}; try a lower "
                            f"--lr or --amp off. What was saved before is in {args.out}")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

        # Log
        seconds = time.perf_counter() - begin
        speed, wait = args.batch_size / seconds, wait / seconds
        state.step, state.seconds = state.step + 1, state.seconds + seconds
        state.losses.append(loss)
        log(args, step=state.step, epoch=state.step / steps_per_epoch, loss=loss, lr=lr, gradient_norm=norm,
            skipped=not finite, videos_per_second=speed, data_wait=wait, unreadable=sorted(errors))
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:.0f} videos/s, data wait {wait:.0%}")
        bar.update()
        state.unreadable += errors
        check_unreadable(state.unreadable, state.step * args.batch_size)

        # Validate after each epoch; save then, and every few minutes
        epoch_ends = state.step % steps_per_epoch == 0
        if epoch_ends:
            validate(args, model, val_loader, state)
            if state.validations[-1]["top1"] == max(result["top1"] for result in state.validations[1:]):
                save(args.out / "best.pt", model, args, state)
        if epoch_ends or time.perf_counter() - saved > 60 * args.save_minutes:
            save(args.out / "last.pt", model, args, state, optimizer, scaler)
            saved = time.perf_counter()
        if epoch_ends and rank() == 0:
            draw_curves(args.out, state)
    bar.close()
    return state


def run(args, prepare):
    """Trains, and prints what came out of it, or after Ctrl-C how to go on."""
    try:
        state = train(args, prepare)
    except KeyboardInterrupt:
        say(f"to go on: python {args.script} --resume {args.out}")
        raise
    before, best = state.validations[0], max(reversed(state.validations[1:]), key=lambda result: result["top1"])
    for error in sorted({*state.unreadable, *best["unreadable"]}):
        say(f"unreadable {error}")
    minutes, seconds = divmod(round(state.seconds), 60)
    say(f"""
              top-1    top-5
before       {before["top1"]:6.1f}   {before["top5"]:6.1f}   %
{"prompts" if args.tune == "prompts" else "fine-tuned":10}   {best["top1"]:6.1f}   {best["top5"]:6.1f}   %
{minutes} min {seconds} s of training, {state.step * args.batch_size / state.seconds:.0f} videos/s
the best model is {args.out / "best.pt"}""")


def main():
    parser = make_parser(__doc__)
    parser.set_defaults(template="a photo of a {}.")
    add = parser.add_argument_group("what is trained, and what is averaged over time").add_argument
    add("--tune", choices=("both", "image", "text"), default="both", help="encoders to train (default: %(default)s)")
    add("--fusion", choices=("embedding", "decision", "image"), default="embedding", metavar="WHAT",
        help="embedding: those of frames; decision: their logits; image: trains on frames, averages probabilities")
    run(parse_args(parser, PAPER, TINY), choose_parameters)


if __name__ == "__main__":
    data.run(main, clip.InputError)
