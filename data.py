"""From a video file on disk to a batch of uint8 clips.

    file -- read_video --> uint8 [T, 3, h, w] -- crop --> uint8 [T, 3, S, S] -- batch --> uint8 [B, T, 3, S, S]

T of the n frames of a video are used (section 4.1 of the paper; "TSN sampling"). Training takes one random frame from
each of T segments of n // T frames, testing takes the middle frames of T equal segments. Colour jitter, mixing and
normalisation run on the device. A data set is a list of (path, label) and a list of class names: see `ucf101`.

`python data.py NAME` shows what is on disk and draws what training sees of it, before colours and mixing.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script at once while PyTorch is imported

import argparse
import atexit
import contextlib
import csv
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import struct
import sys
import textwrap
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip, resize, resized_crop, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import toy.draw


class UserError(ValueError):
    """A mistake of the user, not of the code: a wrong file, list or value. `run` prints the message, one line."""


# ---- Which frames, and reading them ---------------------------------------------------------------------------------

def sample_frames(num_frames, num_samples, rng=None):
    """The T = num_samples frames to take from a video of n = num_frames: int64 [T].

        training (rng, a numpy Generator):  i * (n // T) + a random number below n // T,  for i = 0 ... T - 1
        training, n < T:                    round(i * n / T) modulo n, all frames with repetitions
        test (no rng):                      floor(i * n / T + n / (2 T)), the middle of segment i

    As in the original code, a short video may end with its first frame. Raises UserError for a video without frames,
    IndexError for a mistake in the rule: frames that are not there."""
    n, t = num_frames, num_samples
    if n < 1:
        raise UserError("a video without frames")
    i = np.arange(t)
    if rng is None:
        indices = np.floor(i * n / t + n / (2 * t))
    elif n < t:
        indices = np.round(i * n / t) % n
    else:
        indices = i * (n // t) + rng.integers(n // t, size=t)
    if indices.min() < 0 or indices.max() >= n:
        raise IndexError(f"frames {indices.tolist()} of a video that has {n}")
    return indices.astype(np.int64)


MAX_PIXELS = 2 ** 26  # of a frame: twice 8K
MAX_BYTES = 2 ** 30  # of a compressed video

# Titles and other metadata may be in any encoding. PyAV 19 does not read them unasked and has no such option.
IGNORE_METADATA = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def read_video(path, num_samples, rng=None, short_side=None):
    """Reads T = num_samples frames, chosen by `sample_frames`: uint8 [T, 3, h, w], RGB, upright.

    `path` is a video file, or a folder of images, which are sorted by the numbers in their names. Frames more than
    twice as large as `short_side` (pixels) are reduced to it. Raises UserError, "path: reason", if no frame can be read
    or the file is too large."""
    path = Path(path)
    reader = read_images if path.is_dir() else decode_video
    try:
        frames, indices = reader(path, num_samples, rng, short_side)
    except (UserError, av.error.FFmpegError, OSError) as error:
        if getattr(error, "filename", None) not in (None, str(path), f"file:{path}"):
            raise  # about another file: a mistake in the code
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from error
    return torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)


def decode_video(path, num_samples, rng, short_side):
    """`read_video` for a video file: frames {index: uint8 [h, w, 3]}, and the T indices."""
    if not path.is_file():  # reading from a pipe would never end
        raise UserError("there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"over {MAX_BYTES:,} bytes: cut it into clips")
    # Without "file:", a colon in the name would turn what precedes it into a protocol.
    with av.open(f"file:{path}", **IGNORE_METADATA) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise UserError("it has no video stream of a known codec")  # cover art does not count
        codec = stream.codec_context
        codec.thread_count = 1  # the workers run in parallel
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        groups = read_groups(container, stream)
        indices = sample_frames(sum(map(count_frames, groups)), num_samples, rng).tolist()
        frames = read_frames(codec, groups, indices, short_side)
        if len(frames) < len(set(indices)):  # fewer frames than packets: count them by decoding all, and sample again
            packets = list(itertools.chain(*groups))
            indices = sample_frames(sum(1 for _ in decode(codec, packets)), num_samples, rng).tolist()
            frames = read_frames(codec, [packets], indices, short_side, decode_all=True)
    return frames, indices


def read_groups(container, stream):
    """The compressed packets of a video, in groups that can be decoded separately. A group starts with a keyframe, and
    no packet of a later group is displayed before it."""
    packets = []
    with contextlib.suppress(av.error.InvalidDataError):  # a damaged place: what precedes it may be enough
        for packet in container.demux(stream):
            if packet.size:
                packets.append(packet)
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        for packet in packets:
            packet.pts = None  # AVI stores no display times and FFmpeg may guess them wrong: count frames instead
    groups = [[]]
    earliest = math.inf
    for packet in reversed(packets):
        if packet.pts is None:
            return [packets]
        groups[-1].append(packet)
        if packet.is_keyframe and packet.pts < earliest:
            groups.append([])
        earliest = min(earliest, packet.pts)
    return [group[::-1] for group in reversed(groups)]


def count_frames(packets):
    """The header of a file may lack the number of frames, or lie. Discarded packets only help to decode others."""
    return sum(not packet.is_discard for packet in packets)


def read_frames(codec, groups, indices, short_side, decode_all=False):
    """The frames at `indices`, {index: uint8 [h, w, 3]}. Decodes each group of packets only as far as needed."""
    height, width = reduced_size(codec.height, codec.width, short_side)  # before frames are turned upright
    reformatter = av.video.reformatter.VideoReformatter()  # one for the clip: it keeps its scaler
    frames = {}
    first = 0
    for packets in groups:
        end = first + count_frames(packets)
        wanted = {i for i in indices if first <= i < end}
        if wanted:
            for i, frame in decode(codec, packets, first, None if decode_all else wanted):
                if i in wanted:
                    picture = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
                    frames[i] = upright(picture.to_ndarray(), frame)
                    if i == max(wanted):
                        break
        first = end
    return frames


def decode(codec, packets, first=0, wanted=None):
    """Yields the numbers, from `first` on, and the frames of some packets that start with a keyframe. If only some are
    `wanted`, others may be missing: those that no frame depends on are not decoded."""
    times = sorted(packet.pts for packet in packets if packet.pts is not None and not packet.is_discard)
    number = {time: i for i, time in enumerate(times, first)}
    if wanted is None or len(number) < count_frames(packets):  # without distinct times, frames are counted
        number = None
    codec.flush_buffers()
    count = first
    for packet in [*packets, None]:  # None: the frames that the decoder still holds
        needed = number is None or packet is None or number.get(packet.pts) in wanted
        codec.skip_frame = "DEFAULT" if needed else "NONREF"
        with contextlib.suppress(av.error.InvalidDataError):  # damaged packets give none
            for frame in codec.decode(packet):
                yield (number.get(frame.pts) if number else count), frame
                count += 1


def upright(picture, frame):
    """Rotates and mirrors a picture [h, w, 3] by the display matrix of its frame, in steps of 90 degrees. The matrix
    (a, b, u, c, d, v, x, y, w) displays the pixel (x, y) at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is None:
        return picture
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(b) > abs(a):  # x and y change places
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    if d < 0:
        picture = np.flipud(picture)
    if a < 0:
        picture = np.fliplr(picture)
    return picture


def reduced_size(height, width, short_side):
    """The height and width to which frames are reduced on reading. Raises UserError if a frame is too large."""
    if height * width > MAX_PIXELS:
        raise UserError(f"a frame of {width} x {height} pixels is too large")
    if short_side is None or min(height, width) <= 2 * short_side:
        return height, width
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def read_images(folder, num_samples, rng, short_side):
    """`read_video` for a folder of images of one kind, with or without optical flow: frames and indices."""
    names = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(IMAGE_FILES) and not JUNK.match(name)]
    names = [name for name in names if not name.lower().startswith("flow")] or names
    kinds = {re.sub("[0-9]+", "", name).lower(): name for name in reversed(names)}
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise UserError(f"images of several kinds, such as {one} and {other}: move one of them to another folder")
    names.sort(key=lambda name: [int(number) for number in re.findall("[0-9]+", name)])  # 9 before 10
    indices = sample_frames(len(names), num_samples, rng).tolist()
    frames = {}
    size = None
    for i in sorted(set(indices)):
        image = open_image(folder / names[i])
        size = size or reduced_size(image.height, image.width, short_side)  # of the first one
        frames[i] = np.array(image.resize(size[::-1], Image.Resampling.BOX))
    return frames, indices


def open_image(path):
    """A pillow image, upright, RGB. Raises UserError for a damaged one."""
    try:
        with Image.open(path) as image:
            reduced_size(image.height, image.width, None)  # checks the size before decoding
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # cameras add previews as MPO
                raise UserError("an animated picture is not a frame")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which pillow would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # pillow raises almost anything for a damaged file
        raise UserError(f"{path.name}: {error}") from error


# ---- Crops on the CPU; colours and mixing on the device -------------------------------------------------------------

SHORT_SIDE = 256 / 224  # the short side of a video in the original code, relative to the side of the input
CROP_SCALES = (1, 0.875, 0.75, 0.66)  # height and width of training crops, relative to the short side
# (height, width): the same scale, or two neighbouring ones
CROP_SHAPES = [(a, b) for a in CROP_SCALES for b in CROP_SCALES if abs(a - b) < 0.2]
CROP_PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)]  # four corners and the centre


def crop(video, height, width, down, right, size):
    """Cuts out height x width pixels: at the top for down = 0, at the bottom for down = 1, in the same way from left to
    right. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    h, w = video.shape[-2:]
    top, left = int((h - height) * down), int((w - width) * right)
    return resized_crop(video, top, left, height, width, [size, size])


def center_crop(video, size):
    """The test crop: the central 224 x 224 of a short side of 256. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    side = round(min(video.shape[-2:]) / SHORT_SIDE)
    return crop(video, side, side, 0.5, 0.5, size)


def three_crops(video, size):
    """Squares of the whole short side: at one end, in the middle, at the other. [T, 3, h, w] -> [3, T, 3, S, S]."""
    side = min(video.shape[-2:])
    return torch.stack([crop(video, side, side, place, place, size) for place in (0, 0.5, 1)])


def random_crop(video, size, rng, flip=True):
    """The training crop, the same in all frames: one of CROP_SHAPES at one of CROP_PLACES. With `flip`, mirrored half
    of the time. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    side = min(video.shape[-2:])
    tall, wide = CROP_SHAPES[rng.integers(len(CROP_SHAPES))]
    down, right = CROP_PLACES[rng.integers(len(CROP_PLACES))]
    video = crop(video, round(side * tall), round(side * wide), down, right, size)
    if flip and rng.uniform() < 0.5:
        video = horizontal_flip(video)
    return video


COLOR = v2.Compose([
    v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
    v2.RandomGrayscale(p=0.2),
])
GROUP = 4  # clips that are mixed with each other: those that one GPU took at once in the original code


def change_colors(video, seed, epoch, indices):
    """Colour jitter and grey, drawn once for each clip by (epoch, index): uint8 [B, T, 3, S, S] to the same."""
    changed = []
    with torch.random.fork_rng(devices=[]):
        for frames, index in zip(video, indices):
            rng = np.random.default_rng([seed, epoch, index, 1])  # 1: another random stream than frames and crop
            torch.manual_seed(int(rng.integers(2 ** 63)))
            changed.append(COLOR(frames))
    return torch.stack(changed)


def mix(video, target, seed, step, first=0):
    """Mixes the clips of each group of four with each other, by mixup or CutMix with equal probability. A group has one
    λ and one permutation of partners:

        mixup   x = λ x + (1 - λ) x[partner]        y = λ y + (1 - λ) y[partner]      λ from Beta(0.8, 0.8)
        CutMix  x[box] = x[partner][box]            the same, λ = 1 - area of the box          Beta(1, 1)

    Float video [B, T, 3, S, S] and target [B, C], the probabilities of the classes, to the same shapes. B is a multiple
    of GROUP. What is drawn for group g of an optimizer step depends on (seed, step, g); `first` is the first g here."""
    video, target = video.clone(), target.clone()
    side = video.shape[-1]
    groups = zip(video.split(GROUP), target.split(GROUP))
    for g, (x, y) in enumerate(groups, first):  # x and y are views, changed in place
        rng = np.random.default_rng([seed, step, g, 2])  # 2: another random stream than colours
        partner = rng.permutation(GROUP).tolist()
        if rng.uniform() < 0.5:
            share = rng.beta(0.8, 0.8)
            x.lerp_(x[partner], 1 - share)  # share * x + (1 - share) * x[partner]
        else:
            half = math.sqrt(1 - rng.beta(1, 1)) / 2
            center = rng.uniform(size=2)
            corners = side * np.stack([center - half, center + half]).clip(0, 1)
            (top, left), (bottom, right) = corners.astype(int).tolist()
            x[..., top:bottom, left:right] = x[partner, ..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / side ** 2
        y[:] = share * y + (1 - share) * y[partner]
    return video, target


# ---- Clips and batches ----------------------------------------------------------------------------------------------

@dataclass
class VideoDataset(Dataset):
    """Clips by (epoch, index): uint8 [T, 3, S, S], the label, the index, and the errors as a str with one per line.

    In training, frames and crop are random unless `augment` is "none", and an unreadable video is replaced by the next
    one. Clips are not flipped if one of the `classes` tells left from right. In evaluation, an unreadable video is all
    zeros, and a clip is [V, T, 3, S, S]: V = num_clips * num_crops views, with interleaved frames and 1 (centre) or 3
    crops."""

    samples: list  # (path, label)
    num_frames: int
    image_size: int
    train: bool
    seed: int = 0
    classes: tuple = ()
    augment: str = "crop"
    num_clips: int = 1
    num_crops: int = 1

    def __post_init__(self):
        if self.num_crops not in (1, 3):
            raise ValueError(f"views of 1 or 3 crops, not {self.num_crops}")
        names = "\n".join(map(words, self.classes))  # Something-Something has classes that tell left from right
        self.flip = not re.search("(?<![a-z])(left|right)(?![a-z])", names)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, first = key
        num_frames = self.num_frames * self.num_clips
        video = torch.zeros(num_frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        rng = None
        errors = []
        for attempt in range(100 if self.train else 1):
            index = (first + attempt) % len(self)
            path, label = self.samples[index]
            if self.train and self.augment != "none":
                rng = np.random.default_rng([self.seed, epoch, index])
            try:
                video = read_video(path, num_frames, rng, short_side=round(self.image_size * SHORT_SIDE))
                break
            except UserError as error:
                errors.append(str(error))
        if rng:
            video = random_crop(video, self.image_size, rng, self.flip)
        elif self.train:
            video = center_crop(video, self.image_size)
        else:
            video = self.views(video)
        return video, label, index, "\n".join(errors)  # a str: lists of different lengths make no batch

    def views(self, video):
        """uint8 [num_clips * T, 3, h, w] to [V, T, 3, S, S]. The frames are the middles of num_clips * T segments: clip
        v has the segments v, v + num_clips, v + 2 * num_clips and so on."""
        if self.num_crops == 1:
            video = center_crop(video, self.image_size)[None]
        else:
            video = three_crops(video, self.image_size)
        video = video.unflatten(1, (self.num_frames, self.num_clips))  # [crops, T, clips, 3, S, S]
        return video.transpose(1, 2).flatten(0, 1)


def training_batches(length, batch_size, epochs, seed, rank=0, world_size=1, micro_batch=None):
    """The training order: yields the micro-batches of one of `world_size` processes, lists of (epoch, index). In each
    epoch the videos are shuffled and cut into whole batches, and each process gets an equal share of every batch."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(length)
        order = order[: length // batch_size * batch_size]
        share = order.reshape(-1, world_size, batch_size // world_size)[:, rank]  # [batches, videos of a process]
        for indices in share.reshape(-1, micro_batch or batch_size // world_size).tolist():
            yield [(epoch, index) for index in indices]


class Loader(DataLoader):
    """Batches of a VideoDataset, by lists of (epoch, index): videos uint8, labels and indices int64, error strings."""

    def __init__(self, dataset, batches, workers):
        super().__init__(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                         pin_memory=torch.cuda.is_initialized())  # not with --gpus 0: pinning would start CUDA
        if workers:
            gc.freeze()  # or the garbage collector would copy the memory of the main process into each worker

    def __iter__(self):
        if threading.current_thread() is not threading.main_thread():  # which alone is told of Ctrl-C
            return super().__iter__()
        with interrupts_kept_from_workers():
            return super().__iter__()


@contextlib.contextmanager
def interrupts_kept_from_workers():
    """Ctrl-C is for the main process, which ends its workers. They inherit that the signal is blocked. The main process
    handles it when all of them have started: Python would lose a KeyboardInterrupt while it forks."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        resource_tracker.ensure_running()  # unblocks the signal when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


# ---- Data sets ------------------------------------------------------------------------------------------------------

def load_samples(dataset, root=None, split=1, train=False, classes="all", shots=None, seed=1024, video_list=None,
                 labels=None):
    """The training or the validation videos of a data set: a list of (path, label), and the class names.

    `dataset` is a name in DATASETS or the folder of your own videos, which are in `root`, by default datasets/NAME.
    A file `video_list` of "path label" lines replaces the split, and a file `labels` the class names. `classes` keeps
    the "base" or the "novel" half, `shots` as many training videos of each class, drawn by `seed`. Raises UserError for
    wrong lists, for two classes of the same name, and if no video is on disk."""
    root = Path(root or default_root(dataset)).absolute()
    for file in (video_list, labels):
        if file and not os.path.isfile(file):
            raise UserError(f"{file}: there is no such file")
    index = functools.cache(index_videos)  # called if a video is not where it is listed
    if video_list and labels:
        rows, names = read_list(video_list, labels)
    elif video_list:
        rows, names = read_table(video_list, root, index)
    else:
        rows, names = read_dataset(dataset, root, split, train, labels)
    numbers = {}
    for i, name in enumerate(names):
        first = numbers.setdefault(as_read(name), i)
        if first != i:
            raise UserError(f"two classes that no model can tell apart: {names[first]!r} and {name!r}")

    if classes != "all":
        training_rows, _ = read_dataset(dataset, root, train=True, labels=labels)  # of split 1, whatever is loaded
        names = class_half(training_rows, names, classes)
    label = {name: i for i, name in enumerate(names)}
    rows = [(listed, label[name]) for listed, name in rows if name in label]
    samples = []
    missing = []
    for listed, number in rows:
        path, there = find_listed(root, listed, index, unique=not video_list)
        if not there:
            missing.append(path)
            if dataset in ("k400", "k600"):  # many videos of Kinetics have vanished; others count as unreadable
                continue
        samples.append((Path(path), number))
    if not rows:
        raise UserError(f"{video_list or root} lists no videos")
    half = "training" if train else "validation"
    if len(missing) == len(rows):
        raise UserError(f"no {half} video is on disk (see --root); looked for {missing[0]}")
    if missing:
        say(f"{len(missing)} of the {len(rows)} {half} videos are not on disk, such as {missing[0]}")
    last = dict(samples)
    twice = [path for path, number in samples if number != last[path]]
    if twice:
        say(f"warning: {len(twice)} {half} videos have two classes, such as {twice[0]}")
    if train and shots:
        samples = draw_shots(samples, shots, seed)
    tell_empty(samples, names, half)
    return samples, names


def tell_empty(samples, names, half):
    """Names the classes without videos."""
    seen = {number for _, number in samples}
    empty = [name for number, name in enumerate(names) if number not in seen]
    if empty:
        say(f"{len(empty)} of the {len(names)} classes have no {half} videos, such as {', '.join(empty[:5])}")


def load_train_val(args):
    """The training samples, the validation samples and the class names that the flags ask for. Warns of videos that are
    in both halves."""
    training, names = load_samples(args.data, args.root, args.split, True, args.classes, args.shots, args.seed,
                                   args.train_list, args.labels)
    validation, val_names = load_samples(args.data, args.root, args.split, False, args.classes,
                                         video_list=args.val_list, labels=args.labels)
    validation = relabel(validation, val_names, names)
    if args.val_list and not args.labels:  # a table that may have fewer classes
        tell_empty(validation, names, "validation")
    both = dict(training).keys() & dict(validation).keys()
    if both:
        say(f"warning: {len(both)} videos are in training and in validation, such as {min(both)}")
    return training, validation, names


def relabel(samples, names, all_names):
    """Samples whose labels are numbers of `names`, with those of `all_names` instead."""
    number = {as_read(name): i for i, name in enumerate(all_names)}
    renumbered = []
    for name in names:
        if as_read(name) not in number:
            raise UserError(f"the class {name!r} has validation videos but is not a training class")
        renumbered.append(number[as_read(name)])
    return [(path, renumbered[label]) for path, label in samples]


def default_root(dataset):
    """The folder of a data set; of a list without one, the current folder."""
    if dataset == "toy":
        return toy.draw.CACHE
    if dataset in DATASETS:
        return Path("datasets", dataset)
    return dataset or "."


def read_dataset(dataset, root, split=1, train=False, labels=None):
    """Rows and class names of one half of a data set, or of the folder of your own videos (see `ucf101`), with the
    names in the file `labels` instead. Raises UserError, with what belongs in `root` and how to get it, if its lists
    are not there."""
    reader = DATASETS.get(dataset, own_videos)
    if split > 1 and reader in (kinetics, something_something, own_videos):
        raise UserError(f"--split {split}: {dataset} has no official splits")
    if dataset == "toy":
        with disk_errors(root):
            toy.draw.draw(root)  # unless it is there
    try:
        rows, names = reader(root, split, train)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename or "/")
        if not missing.is_relative_to(root):
            raise
        advice = ""
        if reader.__doc__ and dataset != "toy":
            advice = reader.__doc__.replace("{root}", str(root))
        raise UserError(f"the data set is not in {root}: {missing.relative_to(root)} is missing. {advice}") from error
    known = set(names)
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{reader.__name__}: the class {name!r} is not a str")
    for row in rows:
        if len(row) != 2 or row[1] not in known:
            raise UserError(f"{reader.__name__}: {row!r} is not a pair of a video and one of the classes")
    if labels:
        renamed = rename_classes(dataset, names, labels)
        rows = [(listed, renamed[name]) for listed, name in rows]
        names = [renamed[name] for name in names]
    return rows, names


def rename_classes(dataset, names, labels):
    """{name: the one in the file `labels`} for a data set. For own videos the file has the columns folder,name."""
    if dataset in DATASETS:
        new_names = read_names(labels)
        if len(new_names) != len(names):
            raise UserError(f"--labels {labels} has {len(new_names)} names, and {dataset} {len(names)} classes")
        return dict(zip(names, new_names.values()))
    renamed = {words(folder): name for _, (folder, name) in read_columns(labels, "folder,name")}
    for name in names:
        if name not in renamed:
            raise UserError(f"--labels {labels} has no row for the folder {name!r}")
    return renamed


def class_half(rows, names, half):
    """The "base" classes, the half of the names with the most training videos as in the original lists, or "novel"."""
    if half not in ("base", "novel"):
        raise ValueError(f'classes are "all", "base" or "novel", not {half!r}')
    counts = Counter(name for _, name in rows)
    order = sorted(names, key=lambda name: counts[name])  # of equally frequent ones, the later are base
    base = order[len(names) // 2 :]  # rounded up
    return [name for name in names if (name in base) == (half == "base")]


def draw_shots(samples, shots, seed):
    """`shots` samples of each class, or all if there are fewer: the same for the same list and seed."""
    drawn = Counter()
    kept = []
    for i in np.random.default_rng(seed).permutation(len(samples)).tolist():
        _, label = samples[i]
        if drawn[label] < shots:
            drawn[label] += 1
            kept.append(i)
    return [samples[i] for i in sorted(kept)]


# A reader returns rows of (video below `root`, class), and all classes, the same for both halves. A tuple of names is
# for a video that may have either. Its docstring tells those who lack the data set what belongs in `root`.

def ucf101(root, split, train):
    """UCF101 (Soomro et al., 2012): UCF-101/<Class>/*.avi and ucfTrainTestlist/*.txt. To fetch them (6.5 GB):
    mkdir -p {root} && cd {root}
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101.rar && unrar x UCF101.rar
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip && unzip UCF101Tr*.zip"""
    lists = root / "ucfTrainTestlist"
    names = [name for _, (name,) in read_lines(lists / "classInd.txt", r"[0-9]+\s+(\S+)", "'number Class'")]
    path = lists / f"{'train' if train else 'test'}list{split:02}.txt"
    rows = []
    for _, (file, name) in read_lines(path, r"((\S+)/\S+)(?:\s+[0-9]+)?", "'Class/clip.avi', in training 'label'"):
        rows.append((f"UCF-101/{file}", words(name)))
    return rows, list(map(words, names))


def hmdb51(root, split, train):
    """HMDB51 (Kuehne et al., 2011): <class>/*.avi and testTrainMulti_7030_splits/<class>_test_split<1|2|3>.txt. Put
    hmdb51_org.rar (2 GB) and test_train_splits.rar of https://serre.lab.brown.edu/hmdb51.html into {root}, then:
    cd {root} && unrar x hmdb51_org.rar && unrar x test_train_splits.rar && rm hmdb51_org.rar test_train_splits.rar
    for archive in *.rar; do unrar x $archive; done"""
    lists = root / "testTrainMulti_7030_splits"
    end = f"_test_split{split}.txt"
    names = [file.removesuffix(end) for file in os.listdir(lists) if file.endswith(end) and not JUNK.match(file)]
    names.sort()
    rows = []
    for name in names:
        for _, (file, half) in read_lines(lists / f"{name}{end}", r"(.+?)\s+([012])", "'clip.avi' and 0, 1 or 2"):
            if half == ("1" if train else "2"):
                rows.append((f"{name}/{file}", words(name)))
    return rows, list(map(words, names))


def kinetics(root, split, train):
    """Kinetics (Kay et al., 2017): train.csv, val.csv, and <id>_<start>_<end>.mp4 anywhere below train/ and val/. To
    fetch the copies of https://github.com/cvdfoundation/kinetics-dataset, here Kinetics-400:
    mkdir -p {root}/train {root}/val && cd {root}
    for half in train val; do curl -O https://s3.amazonaws.com/kinetics/400/annotations/$half.csv
    curl https://s3.amazonaws.com/kinetics/400/$half/k400_${half}_path.txt | while read -r url; do
    curl $url | tar xz -C $half; done; done"""
    rows = []
    names = set()
    for half in ("train", "val"):
        path = root / f"{half}.csv"
        wanted = half == ("train" if train else "val")
        if half == "val" and not path.exists() and (root / "validate.csv").exists():
            path = root / "validate.csv"
        if wanted or path.exists():  # the other half may have more classes
            table = csv.DictReader(read_text(path).splitlines())
            for row in table:
                try:
                    name, video = row["label"], row["youtube_id"]
                    start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                except (KeyError, TypeError, ValueError) as error:
                    form = "the columns label, youtube_id, time_start and time_end, the times in seconds"
                    raise UserError(f"{path}, line {table.line_num}: expected {form}; {error!r}") from error
                names.add(name)
                if wanted:
                    files = f"{video}_{start:06}_{end:06}", f"{video}_{start}_{end}", video
                    rows.append((tuple(f"{half}/{file}" for file in files), name))
    return rows, sorted(names)


def something_something(root, split, train):
    """Something-Something v2: labels.json, train.json, validation.json and 20bn-something-something-v2/*.webm. Register
    at https://www.qualcomm.com/developer/software/something-something-v-2-dataset, download all parts to {root}, then:
    cd {root} && cat 20bn-something-something-v2-?? | tar xz"""
    path = root / "labels.json"
    rows = []
    try:
        number = {name.lower(): int(i) for name, i in json.loads(read_text(path)).items()}
        path = root / ("train.json" if train else "validation.json")
        for row in json.loads(read_text(path)):
            name = re.sub(r"[\[\]]", "", row["template"]).lower()  # "Holding [something]" -> "holding something"
            rows.append((f"20bn-something-something-v2/{row['id']}.webm", name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected {{name: number}} or rows of id and template; {error!r}") from error
    return rows, sorted(number, key=number.get)


def own_videos(root, split, train):
    """Your own videos: train/<class>/* and val/<class>/*, as files or folders of their frames."""
    half = root / ("train" if train else "val")
    half.stat()  # raises if it is missing
    known = root / "train" if (root / "train").is_dir() else half  # to evaluate, val/ is enough
    names = sorted(words(path.name) for path in known.iterdir() if path.is_dir() and not JUNK.match(path.name))
    rows = []
    for video in find_videos(half):
        folder, *_ = (*video.relative_to(half).parent.parts, "")
        if words(folder) not in names:
            raise UserError(f"{video} belongs in the folder of a class of {known}, frames in a folder below that")
        rows.append((str(video), words(folder)))
    return rows, names


DATASETS = {
    "toy": ucf101,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "k400": kinetics,
    "k600": kinetics,
    "ssv2": something_something,
}


def words(name):
    """A class name in camel case, with underscores or hyphens, as CLIP reads it best: "FlipAnEgg" -> "flip an egg"."""
    name = unicodedata.normalize("NFC", name)
    return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_-]+", " ", name).lower()


def as_read(name):
    """A class name as the tokenizer reads it: capitals and spaces do not tell two of them apart."""
    return " ".join(name.lower().split())


# ---- Finding videos on disk -----------------------------------------------------------------------------------------

VIDEO_FILES = tuple("""
.avi .mp4 .mkv .webm .mov .m4v .mpg .mpeg .mpe .m1v .m2v .mpv .vob .wmv .asf .flv .f4v .3gp .3g2 .ts .mts .m2ts .m2t
.gif .ogv .mjpeg .mjpg .y4m .mxf .nut .rm .rmvb .divx .dv .h264 .hevc
""".split())
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Files and folders that operating systems leave behind
JUNK = re.compile(
    r"\.|~\$|.*:zone\.identifier$|(thumbs\.db|desktop\.ini|icon\r|@eadir|[#@$]recycle(\.bin)?|"
    r"lost\+found|__macosx|__pycache__|system volume information)$", re.IGNORECASE)


def find_videos(path):
    """The videos below a folder, or a file itself if it is a video: a list of Path. Raises UserError if it is empty."""
    videos, skipped = [path], []
    if path.is_dir():
        videos, skipped = walk(path)
    elif not path.name.lower().endswith(VIDEO_FILES):
        raise UserError(f"{path} has no known ending of a video file")
    if skipped:
        example = os.path.relpath(skipped[0], path.parent)
        say(f"{path}: skipped {len(skipped)} files that are not videos, such as {example}")
    if not videos:
        raise UserError(f"{path} contains no video")
    return list(map(Path, videos))


def walk(folder, parents=()):
    """The videos at any depth below a folder, and the files that are skipped: two lists of str. A folder with images
    and without videos, in it or below, is a video itself: its frames."""
    videos, images, skipped = [], [], []
    real = Path(folder).resolve()
    if real in parents:
        return [], []  # a link that leads up again
    parents = {*parents, real, *real.parents}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, name = entry.path, entry.name.lower()
        if JUNK.match(name):
            continue
        if os.path.isdir(path):
            more_videos, more_skipped = walk(path, parents)
            videos += more_videos
            skipped += more_skipped
        elif name.endswith(VIDEO_FILES) and os.path.isfile(path):
            videos.append(path)
        elif name.endswith(IMAGE_FILES):
            images.append(path)
        else:
            skipped.append(path)
    if images and not videos:
        return [str(folder)], skipped
    return videos, skipped + images


def match_key(path, root):
    """The parts of a path below `root` without what may differ on disk: endings of videos, capitals, Unicode form."""
    key = unicodedata.normalize("NFC", path.removeprefix(f"{root}{os.sep}")).lower()
    while key.endswith(VIDEO_FILES):
        key = key[: key.rindex(".")]
    return key.split(os.sep)


def index_videos(root):
    """The videos below a folder by the last part of their match_key: {name: [(match_key, path)]}."""
    index = defaultdict(list)
    if root.is_dir():
        for path in walk(root)[0]:
            key = match_key(path, root)
            index[key[-1]].append((key, path))
    return index


def find_listed(root, listed, index, unique):
    """The path of a listed video, and whether it is there. If not, a video of the same match_key in the `index` is
    taken. If file names are not `unique` in a data set, its folders must match, too."""
    names = listed if isinstance(listed, tuple) else (str(listed),)
    paths = [os.path.normpath(os.path.join(root, name.replace("\\", "/"))) for name in names]
    for path in paths:
        if os.path.exists(path):
            return path, True
    for path in paths:
        end = match_key(path, root)
        found = index(root)[end[-1]]
        if not unique:
            folder = os.path.dirname(path)
            elsewhere = not folder.startswith(str(root)) or not os.path.isdir(folder)  # a list of another machine
            found = [(key, video) for key, video in found
                     if key[-len(end) :] == end or (elsewhere and end[-len(key) :] == key)]
        if len(found) == 1 or (found and unique):
            return found[0][1], True
    return paths[0], False


# ---- Lists and tables -----------------------------------------------------------------------------------------------

NUMBERED = r'"?((?!# ).+?)"?[\s,;]+([0-9]+)(?:\.0*)?'  # a line of a list: path and number
HEADING = re.compile(
    r'(?i)\w*(id|folder|file|filename|path|video|label)[\s,;"]+(name|label|youtube_id)\b|(class|label|name)(e?s|_names?)?$')


def read_list(path, labels):
    """Rows and class names of a list of videos as other projects have them: lines of "path label" or "path frames
    label". The numbers are those of the names in the file `labels`."""
    names = read_names(labels)
    form = "'path label', the label a number; for a table of file,label leave out --labels"
    rows = []
    for where, (video, label) in read_lines(path, NUMBERED, form):
        if int(label) not in names:
            raise UserError(f"{where}: {labels} has no class for the label {label}")
        without_frames = re.sub(r"[\s,;]+[1-9][0-9]*$", "", video)
        rows.append(((video, without_frames), names[int(label)]))
    return rows, list(names.values())


def read_table(path, root, index):
    """Rows and class names of a table of file,label. The label is a name. A first row that is no video is a heading, in
    whatever language; `index` is `index_videos`."""
    rows = []
    for _, (video, label) in read_columns(path, "file,label; a list of numbered labels needs --labels"):
        rows.append((video, unicodedata.normalize("NFC", label)))
    if rows:
        video, label = rows[0]
        known = video.lower().endswith(VIDEO_FILES) or label in dict(rows[1:]).values()
        if not known and not find_listed(root, video, index, unique=False)[1]:
            del rows[0]
    names = sorted({label for _, label in rows})
    if names and all(map(str.isdecimal, names)):
        raise UserError(f"{path}: the labels are numbers; give their names with --labels")
    return rows, names


def read_names(path):
    """Class names by number, {int: str}: a table of id,name or, in a file of another ending, a name on each line."""
    names = {}
    if not str(path).lower().endswith((".csv", ".tsv")):
        pattern, form = r'(?![0-9]+\s)([^\[\]{}",;\t\0]+)', "a name on each line or, in a .csv file, id,name"
        return dict(enumerate(name for _, (name,) in read_lines(path, pattern, form)))
    for where, (number, name) in read_columns(path, "id,name"):
        if not number.isdecimal() or int(number) in names:
            raise UserError(f"{where}: expected id,name, with a different number in each row")
        names[int(number)] = name
    return dict(sorted(names.items()))


def read_lines(path, pattern, form):
    """Yields "file, line" and the groups of `pattern` for each line of a list. Raises UserError for a line that does
    not have the `form`."""
    for where, line in find_lines(path):
        match = re.fullmatch(pattern, line)
        if not match:
            raise UserError(f"{where}: expected {form}")
        yield where, match.groups()


def read_columns(path, form):
    """Yields "file, line" and the two cells of each row of a table. The separator is a semicolon or a tab if the first
    row has one, else a comma. Empty columns at the end are ignored. Raises UserError for a row of another form."""
    separator = None
    for where, line in find_lines(path):
        unquoted = re.sub('"[^"]*"', "", line)
        separator = separator or next((mark for mark in ";\t" if mark in unquoted), ",")
        try:
            [row] = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        except csv.Error as error:
            raise UserError(f"{where}: {error}") from error
        cells = list(map(str.strip, row))
        if any(cells):
            if len(cells) < 2 or not all(cells[:2]) or any(cells[2:]):
                raise UserError(f"{where}: expected two columns separated by {separator!r}: {form}")
            yield where, cells[:2]


def find_lines(path):
    """Yields "file, line" and the text of each line except empty ones, comments and a heading in the first."""
    first = True
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("# "):
            continue
        heading = first and HEADING.match(line)
        first = False
        if not heading:
            yield f"{path}, line {number}: {line[:100]!r}", line


def read_text(path):
    """The text of a file in UTF-8, with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8; save the file in that encoding") from error


# ---- Shared by the command lines of all scripts ---------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argparse parser whose flags have no defaults, so that it returns only what was typed. `--help` shows the
    settings `paper` and `tiny` of a script. Errors are one line."""

    def __init__(self, doc, paper, tiny):
        super().__init__(usage="python %(prog)s [flags]", description=doc, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.paper = paper
        self.tiny = tiny

    def flag(self, name, help, kind=str, **options):
        """Adds a flag. `kind` is a function that converts the text, a tuple of choices, or bool for a switch."""
        setting = name.strip("-").replace("-", "_")
        default, tiny = self.paper[setting], self.tiny[setting]
        if isinstance(default, list):
            default, tiny = (" ".join(map(str, values)) for values in (default, tiny))
        if default and default == tiny:
            help = f"{help} (default: {default})"
        elif default:
            help = f"{help} (default: {default}; tiny: {tiny})"
        elif tiny:
            help = f"{help} (tiny: {tiny})"
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options |= {"choices": kind, "type": type(kind[0])}
        else:
            options["type"] = kind
        self.add_argument(name, help=help, **options)

    def error(self, message):
        if rank() == 0:
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def at_least(minimum, kind=int, maximum=math.inf):
    """A kind of flag: a finite number from `minimum` to `maximum`."""
    def number(text):
        value = kind(text)
        if not minimum <= value <= maximum or math.isinf(value):  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {minimum} to {maximum}")
        return value
    return number


def name_or(exists, names=()):
    """A kind of flag: one of `names`, or a path that `exists`, made absolute."""
    def path(text):
        if text in names:
            return text
        if not exists(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not on disk, and not one of {', '.join(names)}")
        return os.path.abspath(text)
    return path


DATA_HELP = f"{', '.join(DATASETS)}, or a folder with train/<class>/* and val/<class>/*; by default toy"


def add_data_flags(parser, training, several=None):
    """Adds the flags about data: those of `training`, or of evaluation. `several`: nargs="+" for several splits."""
    parser.flag("--data", DATA_HELP, name_or(os.path.isdir, DATASETS))
    parser.flag("--root", "folder of the data set; by default datasets/DATA, with lists the current folder",
                os.path.abspath)
    parser.flag("--split", "official split of UCF101 or HMDB51", (1, 2, 3), nargs=several)
    parser.flag("--classes", "base: the half of the classes with the most training videos; novel: the other half",
                ("all", "base", "novel"), nargs=several)
    parser.flag("--val-list", "list of validation videos instead of a split: lines of 'path label' (with --labels) or "
                "a table of file,label; paths below --root", os.path.abspath, nargs=several)
    parser.flag("--labels", "class names: a .csv of id,name, or a text file with a name on each line; for a folder of "
                "your own videos a table of folder,name", os.path.abspath if training else str, nargs=several)
    parser.flag("--frames", "frames sampled from each video", at_least(1))
    if training:
        parser.flag("--train-list", "list of training videos, in the form of --val-list", os.path.abspath)
        parser.flag("--shots", "training videos of each class; by default all", at_least(1))
        parser.flag("--augment", "none: frames and crop as in evaluation; crop: random frames, crop and flip; color: "
                    "crop and colour jitter; mix: color, mixup and CutMix", ("none", "crop", "color", "mix"))
        parser.flag("--seed", "random seed of everything that is drawn", at_least(0))


def check_lists(parser, args):
    """Refuses lists that are given in part, or along with flags that they replace."""
    if args.val_list and args.classes not in ("all", ["all"]):
        parser.error("--classes cannot be combined with lists")
    if args.val_list and args.split not in (1, [1]):
        parser.error("--split cannot be combined with lists")
    if hasattr(args, "train_list") and bool(args.train_list) != bool(args.val_list):
        parser.error("give both --train-list and --val-list")


def process(variable, default=0):
    """RANK, LOCAL_RANK or WORLD_SIZE if torchrun started this process. Values that others have set are ignored."""
    if torch.distributed.is_torchelastic_launched():
        return int(os.environ[variable])
    return default


def rank():
    """The number of this process; 0 is the main process, which prints and writes."""
    return process("RANK")


def say(text=""):
    """Prints a line, in the main process only, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(str(text))


@contextlib.contextmanager
def disk_errors(path):
    """Turns what the disk refuses into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path):
    """Yields a temporary path beside `path`, and renames it at the end: a kill or a full disk leaves the previous file.
    Raises UserError if it cannot be written."""
    temporary = path.with_name(f"unfinished-{path.name}")
    try:
        with disk_errors(path):
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, content):
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def interrupt(*_):
    """Handles Ctrl-C. A second one is ignored, so that it cannot disturb what the first one has to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def skip_finalization():
    """Ends a failed process at once if it is one of several. Python's finalization could abort in a thread of gloo, and
    waiting for the other processes could last forever."""
    if torch.distributed.is_initialized():
        multiprocessing.util._exit_function()  # ends workers and removes their semaphores
        os._exit(1)


def run(main, *errors):
    """Runs the `main` of a script. UserError and the types in `errors`, a file that may not be read, too little memory
    and Ctrl-C end in one line on stderr. All other errors show their traceback: they are mistakes in the code."""
    atexit.register(skip_finalization)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # file names may not be valid text
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):  # not in a shell's background
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    except (UserError, *errors) as error:
        message = str(error)
    except PermissionError as error:
        message = f"{error.filename}: {error.strerror}"
    except BrokenPipeError:  # of a reader that has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain when it ends
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        message = "out of memory; try fewer --frames, or a smaller --micro-batch or --batch-size"
        if "shared memory" in str(error):  # of the workers
            message = "out of shared memory; try docker run --shm-size=8g, or --workers 0"
        elif "DataLoader worker" in str(error):
            message = "a process that reads videos was killed, maybe for lack of memory; try fewer --workers"
        elif "by peer" in str(error):  # another process has failed and told why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun need not end this one
            sys.exit(1)
        elif not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
    except KeyboardInterrupt as error:
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would complain about the ended workers
        for worker in multiprocessing.active_children():
            worker.terminate()
        if rank() == 0:
            tqdm.write("; ".join(["interrupted", *error.args]), file=sys.stderr)
        sys.exit(130)
    if rank() > 0:
        time.sleep(5)  # lets the main process report the error first, if it has the same one
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


# ---- A look at a data set -------------------------------------------------------------------------------------------

def save_grid(rows, path, tile=128):
    """Draws a picture with a row for each (title, frames uint8 [T, 3, S, S]); a frame has `tile` x `tile` pixels."""
    import matplotlib

    # DejaVu Sans: pillow's own font has only English letters
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size=14)
    titles, videos = zip(*rows)
    frames = resize(torch.cat(videos), [tile - 2, tile - 2])
    grid = make_grid(frames, nrow=len(videos[0]), padding=2, pad_value=255)[:, 1:-1, 1:-1]
    sheet = ImageOps.expand(to_pil_image(grid), (210, 0, 0, 0), "white")  # pixels for the titles
    draw = ImageDraw.Draw(sheet)
    for y, title in enumerate(titles):
        draw.text((8, tile * (y + 0.5)), textwrap.fill(title, 24), "black", font, anchor="lm")
    with writing(path) as temporary:
        known = path.suffix.lower() in Image.registered_extensions()
        sheet.save(temporary, None if known else "png")
    say(f"drawn: {path}")


def show_half(half, samples, names):
    """Prints the counts of one half of a data set, and which of a hundred of its videos cannot be read."""
    sizes = np.bincount([label for _, label in samples], minlength=len(names))
    smallest = ", ".join(f"{names[i]} ({sizes[i]})" for i in sizes.argsort(kind="stable")[:5])
    say(f"{half}:\n  {len(samples)} videos of {len(names)} classes, the smallest: {smallest}")
    dataset = VideoDataset(samples, num_frames=1, image_size=8, train=False)
    tried = range(0, len(samples), math.ceil(len(samples) / 100))
    clips = thread_map(lambda index: dataset[0, index], tried, desc="read", leave=False, disable=None)
    errors = [error for _, _, _, error in clips if error]
    say(f"  {len(tried)} tried: {len(errors)} unreadable")
    for error in errors:
        say(f"  unreadable {error}")


def main():
    """Prints what is in a data set and draws some of its videos."""
    settings = dict(data=None, root=None, split=1, classes="all", train_list=None, val_list=None, labels=None,
                    frames=8, shots=None, augment="crop", seed=1024, out=None)
    parser = Parser(__doc__, settings, settings)
    parser.flag("data", "the same as --data", nargs="?")
    add_data_flags(parser, training=True)
    parser.flag("--out", "the picture to draw; by default DATA.png", Path)
    args = SimpleNamespace(**settings | vars(parser.parse_args()))
    check_lists(parser, args)
    if not args.val_list:
        args.data = args.data or "toy"
    training, validation, names = load_train_val(args)
    show_half("training", training, names)
    show_half("validation", validation, names)

    image_size = 64 if args.data == "toy" else 224
    dataset = VideoDataset(training, args.frames, image_size, True, args.seed, names, args.augment)
    rows = []
    for index in range(0, len(training), math.ceil(len(training) / 10)):
        video, label, drawn, _ = dataset[0, index]
        file, _ = training[drawn]  # another one if that of `index` is unreadable
        rows.append((f"{file.name}: {names[label]}", video))
    save_grid(rows, args.out or Path(f"{Path(args.data or args.train_list).resolve().name}.png"))


if __name__ == "__main__":
    run(main)
