"""Speed beside the libraries that do the same: each row a ratio, measured in turns in one process, medians.

    python tests/benchmark.py [--video FILE]
"""
import argparse
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import decord
import numpy as np
import torch
from conftest import numbered_frames, write_video
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402

T, S = 32, 224


def make_video(path):
    """A clip as UCF101 has them: 131 frames of 320 x 240, MPEG-4 part 2 in AVI, half a megabyte."""
    torch.manual_seed(0)
    scene = resize((torch.rand(1, 3, 30, 60) * 255).byte(), [240, 480])[0]
    frames = [scene[:, :, i : i + 320] for i in range(131)]
    noise = torch.randn(131, 1, 240, 320) * 4
    video = (torch.stack(frames) + noise).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    return write_video(path, video.numpy(), "mpeg4", "yuv420p", b="800k", g="300")


def compare(name, ours, theirs, repeat=11):
    """Prints one row: the median milliseconds of both, called in turns, and how many times as fast ours is."""
    times = {ours: [], theirs: []}
    for _ in range(repeat):
        for function, taken in times.items():
            begin = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - begin))
    a, b = (statistics.median(taken) for taken in times.values())
    print(f"{name:58} {a:8.1f} ms {b:8.1f} ms {b / a:6.2f} x")


def reading(path):
    """Decoding and cropping 32 of the frames of one file, with one core."""
    samples = [(path, 0)]
    test = data.VideoDataset(samples, T, S, train=False)
    training = data.VideoDataset(samples, T, S, train=True)
    count = data.count_frames(path)
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    crop = v2.RandomResizedCrop(S)

    def decord_batch():
        return decord.VideoReader(str(path), num_threads=1).get_batch(data.sample_frames(count, T)).asnumpy()

    def decord_and_pillow():
        frames = [crop(jitter(Image.fromarray(frame))) for frame in decord_batch()]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    print(f"{'reading ' + path.name + f', {T} of {count} frames, one core':58} {'ours':>11} {'theirs':>11}")
    compare("  test clip, cropped | decord's get_batch alone", lambda: test[0, 0], decord_batch)
    compare("  training clip | decord, ColorJitter and crop by pillow", lambda: training[0, 0], decord_and_pillow, 5)


def training_step(tune):
    """A function that takes one training step, of all parameters ("both") or of prompts alone: ViT-B/16, 2 clips of 8
    frames, 101 classes. Two tokens of a text are the class name, four are "a photo of a" or, with prompts, none."""
    sizes = dict(embed_dim=512, image_size=224, patch_size=16, vision_width=768, vision_layers=12, context_length=77,
                 vocab_size=clip.TINY_VOCABULARY, text_width=512, text_layers=12)
    video, label = torch.randint(256, (2, 8, 3, 224, 224), dtype=torch.uint8), torch.tensor([3, 7])
    model, tokens = clip.CLIP(**sizes), torch.randint(512, (101, 5 if tune == "prompts" else 9))
    if tune == "prompts":
        model.add_prompts((10, 12), (10, 12))
    train.choose_parameters(model, tune)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(video, tokens), label).backward()
        optimizer.step()

    return step


def peak(tune):
    """The memory in MiB that training steps take at most, over what the process had before there was a model."""
    before = resident()
    step = training_step(tune)
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the memory of the parent
    return int(re.search(r"VmHWM:\s+([0-9]+) kB", status)[1]) / 2 ** 10 - before


def prompting():
    """A step of prompt learning beside one of full fine-tuning: time and memory."""
    print(f"{'training step, ViT-B/16, 2 clips of 8 frames, one core':58} {'prompts':>11} {'both':>11}")
    prompts, both = training_step("prompts"), training_step("both")
    prompts(), both()
    compare("  prompt learning | full fine-tuning", prompts, both, 5)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        a, b = pool.map(peak, ("prompts", "both"))
    print(f"{'  memory: weights, activations, gradients, optimizer':58} {a:8.0f} MiB{b:8.0f} MiB {a / b:5.2f} x")


def resident():
    """Memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def memory(path, clips=10_000):
    """Whether memory grows with the number of clips read."""
    dataset = data.VideoDataset([(write_video(path, numbered_frames(100)), 0)], 8, S, train=True)
    for i in range(clips):
        dataset[i, 0]
        if i + 1 in (clips // 10, clips):
            print(f"memory after {i + 1:6} training clips {resident():37.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="file to read (default: one made for it, as UCF101 has them)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or make_video(Path(folder) / "video.avi")
        reading(path)
        memory(Path(folder) / "small.mkv")
    prompting()


if __name__ == "__main__":
    main()
