"""Speed beside the libraries that do the same, and beside what the machine can do.

A row is measured in turns, ours and theirs, models in a process each, and gives the medians and how many times as fast
ours is. Both have the same allocator. `growth` draws tests/benchmark.png; `cuda` needs a GPU. The weights of models are
random, but the same on both sides.

    python tests/benchmark.py [reading augment training towers zero-shot loader prompting memory growth cuda]
"""
import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import decord
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import numbered_frames, write_video  # noqa: E402

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import prompt  # noqa: E402
import train  # noqa: E402

T, S = 32, 224
CORES = sorted(os.sched_getaffinity(0))
NAMES = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming
Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut HammerThrow Hammering
HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow
JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing
SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings
SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars
VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo
"""
UCF101 = [data.words(name) for name in NAMES.split()]


def compare(name, ours, theirs, repeat=11):
    """Prints one row: the median milliseconds of both, called in turns, and how many times as fast ours is. Returns the
    seconds that ours takes."""
    times = {ours: [], theirs: []}
    for _ in range(repeat):
        for function, taken in times.items():
            begin = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - begin))
    a, b = (statistics.median(taken) for taken in times.values())
    print(f"{name:66} {a:9.1f} ms {b:9.1f} ms {b / a:6.2f} x", flush=True)
    return a / 1000


def apart(make, *args):
    """Makes a function, make(*args), in a process of its own, which the settings of our scripts do not reach. Returns
    one that calls it there."""
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(there, make, args), daemon=True).start()

    def call():
        here.send(None)
        here.recv()

    here.recv()  # it is made
    return call


def serve(connection, make, args):
    function = make(*args)
    with contextlib.suppress(EOFError):  # it is not called any more
        while True:
            connection.send(None)
            connection.recv()
            function()


def title(text, ours="ours", theirs="theirs"):
    print(f"\n{text:66} {ours:>12} {theirs:>12}")


def use_cores(number):
    os.sched_setaffinity(0, set(CORES[:number]))
    torch.set_num_threads(number)


def matrix_rate(size, dtype=torch.float32, device="cpu"):
    """The floating-point operations per second of a matrix product, [size[0], size[1]] times [size[1], size[2]]."""
    a, b = torch.randn(*size[:2], dtype=dtype, device=device), torch.randn(*size[1:], dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size[0] * size[1] * size[2] / best


def flops(function):
    """The floating-point operations of its matrix products, those of attention included: fused, they are not counted on
    CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def make_video(path):
    """A clip as UCF101 has them: 131 frames of 320 x 240, MPEG-4 part 2 in AVI, half a megabyte."""
    torch.manual_seed(0)
    scene = resize((torch.rand(1, 3, 30, 60) * 255).byte(), [240, 480])[0]
    frames = [scene[:, :, i : i + 320] for i in range(131)]
    noise = torch.randn(131, 1, 240, 320) * 4
    video = (torch.stack(frames) + noise).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    return write_video(path, video.numpy(), "mpeg4", "yuv420p", b="800k", g="300")


def count_frames(path):
    return len(decord.VideoReader(str(path)))


def reading(path):
    """Decoding and cropping 32 of the frames of one file, with one core."""
    use_cores(1)
    samples = [(path, 0)]
    test = data.VideoDataset(samples, T, S, train=False)
    training = data.VideoDataset(samples, T, S, train=True)
    count = count_frames(path)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    crop = v2.RandomResizedCrop(S)

    def decord_batch():
        return decord_frames(path, data.sample_frames(count, T))

    def decord_and_pillow():
        frames = [crop(jitter(Image.fromarray(frame))) for frame in decord_batch()]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    title(f"reading {path.name}, {T} of {count} frames, one core")
    compare("  test clip, cropped | decord's get_batch alone", lambda: test[0, 0], decord_batch)
    compare("  training clip | decord, ColorJitter and crop by pillow", lambda: training[0, 0], decord_and_pillow, 5)


def decord_frames(path, indices):
    return decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()


def decoding(path):
    """Decoding a few frames of longer H.264 clips with one core; the middle ones of T segments, not cropped."""
    use_cores(1)
    scene = torch.rand(1, 3, 45, 540) * 255
    scene = (resize(scene, [360, 4320])[0] + torch.randn(3, 360, 4320) * 4).clamp(0, 255).byte().permute(1, 2, 0)
    for name, frames, height, width in (("ten seconds", 300, 256, 340), ("two minutes", 3600, 360, 640)):
        windows = np.lib.stride_tricks.sliding_window_view(scene.numpy()[:height], width, axis=1)  # one for each frame
        windows = windows[:, :frames].transpose(1, 0, 3, 2)  # [T, h, w, 3]
        clip = write_video(path.with_name("long.mp4"), windows, "libx264", "yuv420p", g="250")
        title(f"decoding {name} of {width} x {height} pixels, one core")
        for samples in (8, 32):
            compare(f"  {samples} of {frames} frames | decord's get_batch", partial(data.read_video, clip, samples),
                    partial(decord_frames, clip, data.sample_frames(frames, samples)), 5)


def loader(path):
    """How much a second worker brings."""
    use_cores(len(CORES))
    dataset = data.VideoDataset([(path, 0)] * 160, T, S, train=True)

    def epoch_with(workers):
        batches = iter(data.Loader(dataset, data.training_batches(160, 4, 1, seed=0), workers))
        next(batches)  # the workers have started
        return lambda: [next(batches) for _ in range(9)]

    title(f"36 training clips of {T} frames through the loader, {len(CORES)} cores", "2 workers", "1 worker")
    one, two = epoch_with(1), epoch_with(2)
    compare("  two workers | one", two, one, 3)


def augment(path):
    """Colours and mixing of 8 clips, on the device of training."""
    use_cores(len(CORES))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    video = torch.randint(256, (8, 8, 3, S, S), dtype=torch.uint8, device=device)
    target = torch.eye(8, device=device)
    mixing = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=8), v2.CutMix(alpha=1.0, num_classes=8)])
    step = itertools.count()

    def done(function):
        def call():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return call

    title(f"8 clips of 8 frames, {device.type}")
    compare("  colours, once for each clip | anew for each frame, as in the original code",
            done(lambda: data.change_colors(video, 0, 0, range(8))),
            done(lambda: [data.COLOR(frame) for frame in video.flatten(0, 1)]), 5)
    pixels = video.float()
    compare("  mixing, a coefficient for each group of four | torchvision's, one for all",
            done(lambda: data.mix(pixels, target, 0, next(step))),
            done(lambda: mixing(pixels.flatten(1, 2), torch.arange(8, device=device))), 21)


def memory(path):
    """Whether memory grows with the number of clips read."""
    dataset = data.VideoDataset([(write_video(path.with_name("small.mkv"), numbered_frames(100)), 0)], 8, S, train=True)
    print()
    for i in range(10_000):
        dataset[i, 0]
        if i + 1 in (1_000, 10_000):
            print(f"memory after {i + 1:6} training clips {resident():46.0f} MiB", flush=True)


def resident():
    """Memory of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) / 2 ** 10


# ---------------------------------------------------------------------------------------------------------------------
# Models


def both(name):
    """open_clip's model of a name such as "ViT-B/32", with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name.replace("/", "-") + "-quickgelu")
    state = theirs.state_dict()
    ours = clip.CLIP(**clip.dimensions(state))
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return ours, theirs


def trainer(model, loss):
    """A function that takes one training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def training_loss(whose, name):
    """A model and the loss of a step of full fine-tuning, 2 clips of 8 frames and the 101 classes of UCF101; "theirs"
    is open_clip, which reads all 77 tokens."""
    ours, theirs = both(name)
    texts = [f"a photo of a {name}." for name in UCF101]
    video, label = torch.randn(2, 8, 3, S, S), torch.tensor([3, 70])
    if whose == "ours":
        train.freeze(ours, "both")
        tokens = ours.tokenizer(texts)
        return ours, lambda: F.cross_entropy(ours(video, tokens), label, label_smoothing=0.1)
    padded = open_clip.tokenize(texts)

    def loss():
        images = theirs.encode_image(video.flatten(0, 1)).unflatten(0, (2, 8)).mean(dim=1)
        cosines = F.normalize(images, dim=-1) @ F.normalize(theirs.encode_text(padded), dim=-1).T
        return F.cross_entropy(theirs.logit_scale.exp() * cosines, label, label_smoothing=0.1)

    return theirs, loss


def training_step(whose, name):
    return trainer(*training_loss(whose, name))


def training(path):
    """A step of full fine-tuning beside open_clip's towers with the same loss."""
    use_cores(len(CORES))
    rate = matrix_rate((3152, 768, 3072))
    title(f"training step, 2 clips of 8 frames, 101 classes, {len(CORES)} cores")
    for name in ("ViT-B/32", "ViT-B/16"):
        with torch.no_grad():
            (_, our_loss), (_, their_loss) = (training_loss(whose, name) for whose in ("ours", "theirs"))
            torch.testing.assert_close(our_loss(), their_loss(), atol=1e-4, rtol=1e-4)
            more = flops(their_loss) / flops(our_loss)
        step = training_step("ours", name)
        seconds = compare(f"  {name} | open_clip, 77 tokens", step, apart(training_step, "theirs", name), 5)
        print(f"    {flops(step) / seconds / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a matrix product in fp32; "
              f"theirs are {more:.1f} times as many operations", flush=True)


def tower(whose, name):
    """A function that takes 16 images through an image encoder, forwards and backwards."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, S, S)
    if whose == "transformers":
        config = transformers.CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                               num_attention_heads=12, patch_size=int(name[-2:]))
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        model = both(name)[whose == "open_clip"].visual

    def step():
        model.zero_grad()
        output = model(images)
        (output if torch.is_tensor(output) else output.image_embeds).sum().backward()

    return step


def towers(path):
    """The image encoders alone."""
    use_cores(len(CORES))
    rate = matrix_rate((3152, 768, 3072))
    title(f"image encoder, forwards and backwards, 16 images, {len(CORES)} cores")
    for name in ("ViT-B/32", "ViT-B/16"):
        ours = tower("ours", name)
        for whose in ("open_clip", "transformers"):
            seconds = compare(f"  {name} | {whose}", ours, apart(tower, whose, name), 7)
        print(f"    {flops(ours) / seconds / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a matrix product")


def zero_shot_loop(path):
    """A function that evaluates 100 clips in a plain loop."""
    model = both("ViT-B/32")[1]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = v2.Compose([v2.Resize(S, v2.InterpolationMode.BICUBIC), v2.CenterCrop(S), v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    indices = data.sample_frames(count_frames(path), 8)

    @torch.inference_mode()
    def loop():
        text = F.normalize(model.encode_text(open_clip.tokenize(UCF101)), dim=-1)
        right = 0
        for i in range(100):
            frames = decord.VideoReader(str(path)).get_batch(indices).asnumpy()
            images = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
            right += int((model.encode_image(images).mean(dim=0) @ text.T).argmax() == i % 101)
        return right

    return loop


def zero_shot(path):
    """Evaluation of 100 clips from the files on, beside a plain loop."""
    use_cores(len(CORES))
    model = both("ViT-B/32")[0]
    samples = [(path, i % 101) for i in range(100)]

    def evaluation():
        loader = evaluate.evaluation_loader(samples, 8, S, batch_size=32, workers=len(CORES))
        return evaluate.evaluate(model, loader, model.tokenizer(UCF101))

    title(f"zero-shot evaluation of 100 clips of 8 frames, ViT-B/32, {len(CORES)} cores")
    compare("  evaluate.evaluate | a loop of decord, pillow and open_clip", evaluation, apart(zero_shot_loop, path), 3)


def prompting(path):
    """A step of prompt learning beside one of full fine-tuning: time and memory."""
    use_cores(len(CORES))
    title(f"training step, ViT-B/16, 2 clips of 8 frames, {len(CORES)} cores", "prompts", "both")
    steps, sizes = [], []
    for tune, template in (("prompts", "{}."), ("both", "a photo of a {}.")):
        model, _ = both("ViT-B/16")
        if tune == "prompts":
            prompt.add_prompts(model, SimpleNamespace(weights=None, ctx=(10, 10), depth=(12, 12), seed=0))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("prompts" in name)
        else:
            train.freeze(model, tune)
        model.template = template
        tokens, video = evaluate.class_tokens(model, UCF101), torch.randn(2, 8, 3, S, S)

        def loss(model=model, video=video, tokens=tokens):
            return F.cross_entropy(model(video, tokens), torch.tensor([3, 70]))

        steps.append(trainer(model, loss))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        sizes.append(activations(model, loss) + 3 * 4 * trained / 2 ** 20)  # gradient and two moments in float32
    compare("  prompt learning | full fine-tuning", *steps, 5)
    a, b = sizes
    print(f"{'  activations, gradients, optimizer':66} {a:8.0f} MiB {b:8.0f} MiB {b / a:6.2f} x")


def activations(model, loss):
    """The memory in MiB of what is kept for the way back, without the weights."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a circle that is never freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = loss()  # as long as it lives, so do they
        return sum(kept.values()) / 2 ** 20


def growth(path):
    """Draws the time of a training step of ViT-B/32, and the memory of its activations, against T, B, C and S."""
    use_cores(len(CORES))
    model, _ = both("ViT-B/32")
    state = model.state_dict()
    picture = Path(__file__).with_suffix(".png")
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    rows = (("T", "frames of a video, T", (4, 16, 32, 64)), ("B", "videos, B", (1, 4, 8, 16)),
            ("C", "classes, C", (10, 250, 500, 1000)), ("S", "side of the input, S", (64, 128, 224, 448)))
    for axes, (key, name, values) in zip(figure.subplots(1, 4), rows):
        seconds, mebibytes = [], []
        for value in values:
            size = {"T": 4, "B": 1, "C": 10, "S": 224} | {key: value}
            model = clip.CLIP(**clip.dimensions(state) | {"image_size": size["S"]})
            train.freeze(model, "both")
            tokens = torch.randint(1, 40_000, (size["C"], 9))
            video = torch.randn(size["B"], size["T"], 3, size["S"], size["S"])

            def loss(model=model, video=video, tokens=tokens):
                return F.cross_entropy(model(video, tokens), torch.zeros(len(video), dtype=torch.int64))

            mebibytes.append(activations(model, loss))
            step, times = trainer(model, loss), []
            step()
            for _ in range(2):
                begin = time.perf_counter()
                step()
                times.append(time.perf_counter() - begin)
            seconds.append(min(times))
        axes.plot(values, seconds, color="#0072b2", marker="o")
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axes.yaxis.label.set_color("#0072b2")
        other = axes.twinx()
        other.plot(values, mebibytes, color="#d55e00", marker="s", linestyle="--")
        other.set(ylabel="MiB of activations", ylim=(0, None))
        other.yaxis.label.set_color("#d55e00")
    figure.savefig(picture, dpi=120)
    print(f"\ngrowth of a training step of ViT-B/32: {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


def steps_of_training(model, name, arguments, batches=None, steps=5):
    """Videos per second and share of the time spent waiting for data, the medians of `steps` steps of train.py's own
    loop, and the peak of memory in GiB, of CUDA or 0. `batches` replaces what the loader reads."""
    classes = [f"class {i}" for i in range(400)]
    samples = [(name, i % 400) for i in range(64 * (steps + 3))]  # one epoch; three steps to warm up
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        replace = {(data, "load_samples"): lambda *_, **__: (samples, classes), (clip, "load"): lambda *_, **__: model,
                   (train, "validate"): lambda args, model, state, loader: state.validations.append(
                       {"top1": 0.0, "top5": 0.0, "unreadable": [], "count": 1}),
                   (train, "save"): lambda *_: None, (train, "draw_curves"): lambda *_: None}
        if batches:
            replace[data, "Loader"] = lambda *_: batches
        for (module, attribute), function in replace.items():
            stack.enter_context(mock.patch.object(module, attribute, function))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        command = ["train.py", "--data", "k400", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "64"]
        stack.enter_context(mock.patch.object(sys, "argv", [*command, *arguments, "--out", f"{folder}/run"]))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        train.main()
        lines = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[3:]]
    used = torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0.0
    return *(statistics.median(record[key] for record in records) for key in ("videos_per_second", "data_wait")), used


class Synthetic:
    """Clips without end, as the loader gives them."""

    def __init__(self, micro_batch, frames, image_size):
        video = torch.randint(256, (micro_batch, frames, 3, image_size, image_size), dtype=torch.uint8)
        video = video.pin_memory() if torch.cuda.is_available() else video
        self.batch = video, torch.arange(micro_batch), torch.arange(micro_batch), [""] * micro_batch

    def __iter__(self):
        return itertools.repeat(self.batch)


def cuda(path):
    """Training and evaluation on a GPU, from synthetic clips and from files."""
    if not torch.cuda.is_available():
        print("\nCUDA: no GPU here")
        return
    device = torch.device("cuda")
    rate = matrix_rate((8192, 8192, 8192), torch.bfloat16, "cuda")
    print(f"\n{torch.cuda.get_device_name()}, {rate / 1e12:.0f} TFLOP/s in bf16 (8192 x 8192 x 8192)")
    print(f"{'training, 400 classes':66} {'clips/s':>8} {'of rate':>8} {'GiB':>7} {'waiting':>8}")
    rows = [("ViT-B/16", 32, 8, ()), ("ViT-B/16", 32, 16, ()), ("ViT-B/16", 32, 32, ()),
            ("ViT-B/16", 32, 16, ("--compile",)), ("ViT-B/16", 32, 32, ("--compile",)),
            ("ViT-B/16", 32, 32, ("--compile", "--amp", "fp16")), ("ViT-B/16", 16, 64, ("--compile",)),
            ("ViT-L/14", 8, 16, ()), ("ViT-L/14", 8, 16, ("--compile",))]
    for name, frames, micro_batch, more in rows:
        model = both(name)[0].to(device)
        per_clip = 3 * flops(lambda model=model, frames=frames: model.encode_image(
            torch.zeros(frames, 3, S, S, device=device)))  # forwards, and twice that backwards
        arguments = ["--frames", str(frames), "--micro-batch", str(micro_batch), *more]
        row = f"  {name} {' '.join(arguments)}"
        try:
            speed, wait, used = steps_of_training(model, path, arguments, Synthetic(micro_batch, frames, S))
            print(f"{row:66} {speed:8.1f} {speed * per_clip / rate:8.0%} {used:7.1f} {wait:8.0%}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{row:66} out of memory", flush=True)
        torch._dynamo.reset()
    arguments = ["--micro-batch", "32", "--compile", "--workers", str(len(CORES))]
    speed, wait, used = steps_of_training(both("ViT-B/16")[0].to(device), path, arguments, steps=12)
    print(f"{'  the same with --compile, 32 at once, from files':66} {speed:8.1f} {'':8} {used:7.1f} {wait:8.0%}")
    model = both("ViT-B/16")[0].to(device)
    test = evaluate.evaluation_loader([(path, 0)] * 512, 32, S, batch_size=32, workers=len(CORES))
    begin = time.perf_counter()
    with evaluate.autocast("bf16", device):
        evaluate.evaluate(model, test, evaluate.class_tokens(model, UCF101))
    print(f"{'evaluation, ViT-B/16, 32 frames, bf16, from files':66} {512 / (time.perf_counter() - begin):8.1f}")


SECTIONS = {"reading": reading, "decoding": decoding, "augment": augment, "training": training, "towers": towers,
            "zero-shot": zero_shot, "loader": loader, "prompting": prompting, "memory": memory,
            "growth": growth, "cuda": cuda}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--video", type=Path, help="file to read (default: one made for it, as UCF101 has them)")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"{name} is none of {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / ".cache" / "clip"  # a home with OpenAI's vocabulary
        cache.mkdir(parents=True)
        shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", cache)
        os.environ["HOME"] = folder
        for name in args.sections or SECTIONS:
            SECTIONS[name](args.video or make_video(Path(folder) / "video.avi"))


if __name__ == "__main__":
    main()
