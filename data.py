"""From a video file on disk to a batch of uint8 clips.

    file -- read_video --> uint8 [T, 3, h, w] -- crop --> uint8 [T, 3, S, S] -- batch --> uint8 [B, T, 3, S, S]

T of the n frames of a video are used (section 4.1 of the paper; "TSN sampling"). Training takes one random frame from
each of T segments of n // T frames, testing takes the middle frames of T equal segments. Colour jitter, mixing and
normalisation run on the device. A data set is a list of (path, label) and a list of class names: see `ucf101`.

`python data.py NAME` shows what is on disk and draws what the model will see.
"""
import argparse
import contextlib
import csv
import functools
import json
import math
import os
import re
import struct
import sys
import textwrap
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip, pad, resize, resized_crop, to_pil_image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import toy.draw


class UserError(ValueError):
    """A mistake of the user, not of the code: a wrong file, list or value. `run` prints the message, one line."""


# ---- Which frames, and reading them ---------------------------------------------------------------------------------

def sample_frames(num_frames, num_samples, rng=None):
    """The T = num_samples frames to take from a video of n = num_frames: int64 [T].

        training (rng, a numpy Generator):  i * (n // T) + a random number below n // T,  for i = 0 ... T - 1
        training, n < T:                    round(i * n / T), all frames with repetitions
        test (no rng):                      floor(i * n / T + n / (2 T)), the middle of segment i

    All are taken modulo n, as in the original code: a short video may end with its first frame. Raises UserError for a
    video without frames."""
    n, t = num_frames, num_samples
    if n < 1:
        raise UserError("a video without frames")
    i = np.arange(t)
    if rng is None:
        return (i * n / t + n / (2 * t)).astype(np.int64) % n
    if n < t:
        return np.round(i * n / t).astype(np.int64) % n
    return i * (n // t) + rng.integers(n // t, size=t)


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
        frames = reader(path, num_samples, rng, short_side)
    except (UserError, av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def decode_video(path, num_samples, rng, short_side):
    """`read_video` for a video file: a list of uint8 [h, w, 3]."""
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
        frames = decode_frames(codec, groups, indices, short_side)
        if len(frames) < len(set(indices)):  # fewer frames than packets: count them by decoding all, and sample again
            packets = sum(groups, [])
            indices = sample_frames(sum(1 for _ in decode(codec, packets)), num_samples, rng).tolist()
            frames = decode_frames(codec, [packets], indices, short_side)
    return [frames[i] for i in indices]


def read_groups(container, stream):
    """The compressed packets of a video, in groups that can be decoded separately. A group starts with a keyframe, and
    no packet of a later group is displayed before it."""
    packets = []
    with contextlib.suppress(av.error.InvalidDataError):  # a damaged place: what precedes it may be enough
        for packet in container.demux(stream):
            if packet.size:
                packets.append(packet)
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


def decode_frames(codec, groups, indices, short_side):
    """The frames at `indices`, {index: uint8 [h, w, 3]}. Decodes each group of packets only as far as needed."""
    height, width = reduced_size(codec.height, codec.width, short_side)  # before frames are turned upright
    reformatter = av.video.reformatter.VideoReformatter()  # one for the clip: it keeps its scaler
    frames = {}
    first = 0
    for packets in groups:
        end = first + count_frames(packets)
        wanted = {i for i in indices if first <= i < end}
        if wanted:
            for i, frame in zip(range(first, max(wanted) + 1), decode(codec, packets)):
                if i in wanted:
                    picture = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
                    frames[i] = upright(picture.to_ndarray(), frame)
        first = end
    return frames


def decode(codec, packets):
    """Yields the frames of some packets that start with a keyframe."""
    codec.flush_buffers()
    for packet in [*packets, None]:  # None: the frames that the decoder still holds
        with contextlib.suppress(av.error.InvalidDataError):  # damaged packets give none
            yield from codec.decode(packet)


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
    """`read_video` for a folder of images of one kind, with or without optical flow: a list of uint8 [h, w, 3]."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_FILES) and not JUNK.match(name)]
    names = [name for name in names if not name.lower().startswith("flow")] or names
    kinds = {re.sub("[0-9]+", "", name).lower(): name for name in sorted(names, reverse=True)}
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
    return [frames[i] for i in indices]


def open_image(path):
    """A pillow image, upright, RGB. Raises UserError for a damaged one."""
    try:
        with Image.open(path) as image:
            reduced_size(image.height, image.width, None)  # checks the size before decoding
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which pillow would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # pillow raises almost anything for a damaged file
        raise UserError(f"{path.name}: {error}") from error


# ---- Crops on the CPU; colours and mixing on the device -------------------------------------------------------------

SHORT_SIDE = 256 / 224  # the short side of a video in the original code, relative to the side of the input
CROP_SCALES = (1, 0.875, 0.75, 0.66)  # height and width of training crops, relative to the short side
CROP_SHAPES = [(a, b) for i, a in enumerate(CROP_SCALES) for b in CROP_SCALES[max(i - 1, 0) : i + 2]]
CROP_PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)]  # four corners and the centre


def center_crop(video, size):
    """The test crop: the central 224 x 224 of a short side of 256. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = round(min(h, w) / SHORT_SIDE)
    return resized_crop(video, (h - side) // 2, (w - side) // 2, side, side, [size, size])


def three_crops(video, size):
    """Squares of the whole short side: at one end, in the middle, at the other. [T, 3, h, w] -> [3, T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = min(h, w)
    crops = []
    for i in range(3):
        top, left = (h - side) * i // 2, (w - side) * i // 2
        crops.append(resized_crop(video, top, left, side, side, [size, size]))
    return torch.stack(crops)


def random_crop(video, size, rng, flip=True):
    """The training crop, the same in all frames: one of CROP_SHAPES at one of CROP_PLACES. With `flip`, mirrored half
    of the time. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    h, w = video.shape[-2:]
    tall, wide = CROP_SHAPES[rng.integers(len(CROP_SHAPES))]
    height, width = round(min(h, w) * tall), round(min(h, w) * wide)
    down, right = CROP_PLACES[rng.integers(len(CROP_PLACES))]
    top, left = int((h - height) * down), int((w - width) * right)
    video = resized_crop(video, top, left, height, width, [size, size])
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
    clips = []
    with torch.random.fork_rng(devices=[]):
        for clip, index in zip(video, indices):
            rng = np.random.default_rng([seed, epoch, index, 1])  # 1: another random stream than frames and crop
            torch.manual_seed(int(rng.integers(2 ** 63)))
            clips.append(COLOR(clip))
    return torch.stack(clips)


def mix(video, target, seed, step, first=0):
    """Mixup or CutMix, each half of the time, in groups of four clips, each with its own coefficient and partners:

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
            x[:] = torch.lerp(x[partner], x, share)  # share * x + (1 - share) * x[partner]
        else:
            half = math.sqrt(1 - rng.beta(1, 1)) / 2
            center = rng.uniform(size=2)
            top, left = pixels(center - half, side)
            bottom, right = pixels(center + half, side)
            x[..., top:bottom, left:right] = x[partner][..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / side ** 2
        y[:] = share * y + (1 - share) * y[partner]
    return video, target


def pixels(corner, side):
    return (corner.clip(0, 1) * side).astype(int).tolist()


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
            flip = not re.search(r"\b(left|right)\b", "\n".join(self.classes))  # Something-Something has such classes
            video = random_crop(video, self.image_size, rng, flip)
        else:
            video = self.views(video)
        if self.train and not rng:
            video = video[0]
        return video, label, index, "\n".join(errors)

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


def make_loader(dataset, batches, workers):
    """A DataLoader of batches of a VideoDataset: videos uint8, labels and indices int64, errors as strings."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=torch.cuda.is_available())


# ---- Data sets ------------------------------------------------------------------------------------------------------

def load_samples(dataset, root=None, split=1, train=False, classes="all", shots=None, seed=1024, video_list=None,
                 labels=None):
    """One half of a data set: a list of (path, label), and the class names.

    `dataset` is a name in DATASETS or the folder of your own videos, which are in `root`, by default datasets/NAME.
    A file `video_list` of "path label" lines replaces the split, and a file `labels` the class names. `classes` keeps
    the "base" or the "novel" half, `shots` as many training videos of each class, drawn by `seed`. Raises UserError for
    wrong lists, for two classes of the same name, and if no video is on disk."""
    root = Path(root or default_root(dataset)).absolute()
    for file in (video_list, labels):
        if file and not os.path.isfile(file):
            raise UserError(f"{file}: there is no such file")
    if video_list:
        rows, names = read_list(video_list, labels)
    else:
        rows, names = read_dataset(dataset, root, split, train)
    new_names = names
    if labels:
        new_names = list(read_names(labels).values())
        if len(new_names) != len(names):
            raise UserError(f"--labels {labels} has {len(new_names)} names, and {dataset} {len(names)} classes")
    spoken = [" ".join(name.lower().split()) for name in new_names]  # as the tokenizer sees them
    for name in spoken:
        if spoken.count(name) > 1:
            raise UserError(f"two classes have the same name, {name!r}: no model can tell them apart")

    kept = names
    if classes != "all":
        training_rows, _ = read_dataset(dataset, root, train=True)  # of split 1, whatever is loaded
        base = base_classes(training_rows, names)
        kept = [name for name in names if (name in base) == (classes == "base")]
    label = {name: i for i, name in enumerate(kept)}
    rows = [(video, label[name]) for video, name in rows if name in label]
    samples = []
    missing = []
    for video, number in rows:
        path = find_listed(root, video, unique=not video_list)
        if path is None:
            path = root / video
            missing.append(path)
            if dataset in ("k400", "k600"):  # many videos of Kinetics have vanished; others count as unreadable
                continue
        samples.append((path, number))
    if not rows:
        raise UserError(f"{video_list or root} lists no videos")
    half = "training" if train else "validation"
    if len(missing) == len(rows):
        raise UserError(f"no {half} video is on disk; looked for {missing[0]}")
    if missing:
        say(f"{len(missing)} of the {len(rows)} {half} videos are not on disk, such as {missing[0]}")
    if train and shots:
        samples = draw_shots(samples, shots, seed)
    renamed = dict(zip(names, new_names))
    return samples, [renamed[name] for name in kept]


def load_halves(args):
    """The training samples, the validation samples and the class names that the flags ask for."""
    training, names = load_samples(args.data, args.root, args.split, True, args.classes, args.shots, args.seed,
                                   args.train_list, args.labels)
    validation, same_names = load_samples(args.data, args.root, args.split, False, args.classes,
                                          video_list=args.val_list, labels=args.labels)
    if names != same_names:
        raise UserError(f"training has the classes {', '.join(names)[:80]}, validation {', '.join(same_names)[:80]}")
    return training, validation, names


def default_root(dataset):
    """The folder of a data set; of a list without one, the current folder."""
    if dataset == "toy":
        return toy.draw.CACHE
    if dataset in DATASETS:
        return Path("datasets", dataset)
    return dataset or "."


def read_dataset(dataset, root, split=1, train=False):
    """Rows and class names of one half of a data set, or of the folder of your own videos (see `ucf101`). Raises
    UserError, with what belongs in `root` and how to get it, if its lists are not there."""
    reader = DATASETS.get(dataset, own_videos)
    if split > 1 and reader in (kinetics, something_something, own_videos):
        raise UserError(f"--split {split}: {dataset} has no official splits")
    if dataset == "toy":
        with disk_errors(root):
            toy.draw.draw(root)  # unless it is there
    try:
        rows, names = reader(root, split, train)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).relative_to(root)
        advice = (reader.__doc__ or "").replace("{root}", str(root))
        raise UserError(f"the data set is not in {root}: {missing} is missing. {advice}") from error
    for video, name in rows:
        if name not in names:
            raise UserError(f"{dataset}: {video} has the class {name!r}, which is not in the list of classes")
    return rows, names


def base_classes(rows, names):
    """The base classes: the half of the names with the most training videos, as in the original lists."""
    counts = Counter(name for _, name in rows)
    order = sorted(names, key=lambda name: counts[name])  # of equally frequent ones, the later are base
    base = order[len(names) // 2 :]  # rounded up
    return [name for name in names if name in base]


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


# A reader returns rows of (name of the video below `root`, class), and all classes, the same for both halves. Its
# docstring tells those who lack the data set what belongs in `root`.

def ucf101(root, split, train):
    """UCF101 (Soomro et al., 2012): UCF-101/<Class>/*.avi and ucfTrainTestlist/*.txt. To fetch them (6.5 GB):
    mkdir -p {root} && cd {root}
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101.rar && unrar x UCF101.rar
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip && unzip UCF101Tr*.zip"""
    lists = root / "ucfTrainTestlist"
    names = [name for _, (name,) in read_lines(lists / "classInd.txt", r"[0-9]+\s+(\S+)", "'number Class'")]
    path = lists / f"{'train' if train else 'test'}list{split:02}.txt"
    rows = []
    for _, (clip, name) in read_lines(path, r"((\S+)/\S+)(?:\s+[0-9]+)?", "'Class/clip.avi', in training 'label'"):
        rows.append((f"UCF-101/{clip}", words(name)))
    return rows, [words(name) for name in names]


def hmdb51(root, split, train):
    """HMDB51 (Kuehne et al., 2011): <class>/*.avi and testTrainMulti_7030_splits/<class>_test_split<1|2|3>.txt."""
    lists = root / "testTrainMulti_7030_splits"
    end = f"_test_split{split}.txt"
    files = [file for file in os.listdir(lists) if file.endswith(end) and not JUNK.match(file)]
    names = sorted(file.removesuffix(end) for file in files)
    rows = []
    for name in names:
        for _, (clip, half) in read_lines(lists / f"{name}{end}", r"(.+?)\s+([012])", "'clip.avi' and 0, 1 or 2"):
            if half == ("1" if train else "2"):
                rows.append((f"{name}/{clip}", words(name)))
    return rows, [words(name) for name in names]


def kinetics(root, split, train):
    """Kinetics (Kay et al., 2017): train.csv, val.csv, and <id>_<start>_<end>.mp4 anywhere below train/ and val/."""
    wanted = "train" if train else "val"
    rows = []
    names = set()
    for half in ("train", "val"):
        path = root / f"{half}.csv"
        for other in ("validate.csv", "validation.csv"):
            if half == "val" and not path.exists() and (root / other).exists():
                path = root / other
        if half == wanted or path.exists():  # the other half may have more classes
            for _, (name, video, start, end) in read_csv(
                    path, label=str, youtube_id=str, time_start=float, time_end=float):
                names.add(name)
                if half == wanted:
                    rows.append((f"{half}/{kinetics_clip(root, video, int(start), int(end))}", name))
    return rows, sorted(names)


def kinetics_clip(root, video, start, end):
    """The name under which a clip is on disk, start and end in seconds; the usual name if it is not there."""
    usual = f"{video}_{start:06}_{end:06}"
    for name in (usual, f"{video}_{start}_{end}", video):
        if match_key(name) in index_videos(root):
            return name
    return usual


def something_something(root, split, train):
    """Something-Something v2: labels.json, train.json, validation.json and 20bn-something-something-v2/*.webm."""
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
    known = root / "train" if (root / "train").is_dir() else half  # to evaluate, val/ is enough
    names = sorted(words(path.name) for path in known.iterdir() if path.is_dir() and not JUNK.match(path.name))
    rows = []
    for video in find_videos(half):
        folder, *_ = (*video.relative_to(half).parent.parts, "")
        if words(folder) not in names:
            raise UserError(f"{video} belongs in the folder of a class of {known}, frames in a folder below that")
        rows.append((video, words(folder)))
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
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    videos, skipped = walk(path)
    if skipped:
        say(f"{path}: skipped {len(skipped)} files that are not videos, such as {skipped[0].relative_to(path)}")
    if not videos:
        raise UserError(f"{path} contains no video")
    return videos


def walk(path, parents=()):
    """The videos of a folder at any depth, and the files that are skipped: two lists of Path. A folder with images and
    without videos, in it or below, is a video itself: its frames. A file is in one of the lists itself."""
    if not os.path.isdir(path):  # not path.is_dir(), which raises for a link to itself
        if path.name.lower().endswith(VIDEO_FILES) and os.path.isfile(path):
            return [path], []
        return [], [path]
    real = os.path.realpath(path)
    if real in parents:  # a link to a folder above it
        return [], []
    videos, skipped = [], []
    for name in sorted(os.listdir(path)):
        if not JUNK.match(name):
            more_videos, more_skipped = walk(path / name, (*parents, real))
            videos += more_videos
            skipped += more_skipped
    images = [file for file in skipped if file.parent == path and file.name.lower().endswith(IMAGE_FILES)]
    if images and not videos:
        return [path], [file for file in skipped if file not in images]
    return videos, skipped


def match_key(name):
    """The name of a file or folder without what may differ on disk: endings of videos, capitals, Unicode form."""
    name = unicodedata.normalize("NFC", name).lower()
    while name.endswith(VIDEO_FILES):
        name = name[: name.rindex(".")]
    return name


@functools.cache
def index_videos(root):
    """The videos below a folder by the match_key of their names: {key: list of Path}."""
    index = {}
    if root.is_dir():
        for path in walk(root)[0]:
            index.setdefault(match_key(path.name), []).append(path)
    return index


def find_listed(root, name, unique):
    """The path of a video listed as `name`, or None. If it is not there, a video of the same match_key is taken, first
    of all one below a folder with the listed name. If names are not `unique`, it must be the only one."""
    path = root / str(name).replace("\\", "/")
    if path.exists():
        return path
    found = index_videos(root).get(match_key(path.name), [])
    folder = match_key(path.parent.name)
    nearby = [video for video in found if folder in [match_key(part) for part in video.parent.parts]]
    if unique:
        return next(iter(nearby or found), None)
    if not nearby and not path.parent.is_dir():
        nearby = [video for video in found if video.parent == root]
    return nearby[0] if len(nearby) == 1 else None


# ---- Lists and tables -----------------------------------------------------------------------------------------------

def read_list(path, labels):
    """A list of the original code, lines of "path label", and its class names, a CSV of id,name: rows and names."""
    names = read_names(labels)
    form = "'path label', the label a number"
    rows = []
    for where, (video, number) in read_lines(path, r'"?((?!# ).+?)"?[\s,;]+([0-9]+)(?:\.0*)?', form):
        if re.search(r"\.\w{2,4}[\s,;]+[0-9]+$", video):  # "file.avi 12 0": which number is the label?
            raise UserError(f"{where}: expected {form}")
        if int(number) not in names:
            raise UserError(f"{where}: {labels} has no class for the label {number}")
        rows.append((video, names[int(number)]))
    return rows, list(names.values())


def read_names(path):
    """Class names by id, {int: str}: a CSV of id,name, or a text file with a name on each line."""
    if not str(path).endswith(".csv"):
        pattern, form = r'(?![0-9]+\s)([^\[\]{}",;\t\0]+)', "a name on each line or, in a .csv file, id,name"
        return dict(enumerate(name for _, (name,) in read_lines(path, pattern, form)))
    names = {}
    for where, (number, name) in read_csv(path, id=int, name=str):
        if number in names or not name:
            raise UserError(f"{where}: expected id,name with each number once")
        names[number] = name
    return dict(sorted(names.items()))


def read_text(path):
    """The text of a file in UTF-8, with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8; save the file in that encoding") from error


def read_lines(path, pattern, form):
    """Yields "file, line" and the groups of `pattern` for each line. Skips comments and a heading. Raises UserError for
    a line that does not have the `form`."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip()
        where = f"{path}, line {number}: {line[:100]!r}"
        match = re.fullmatch(pattern, line)
        heading = number == 1 and re.match(".*(path|file|video).*label", line, re.IGNORECASE)
        if match:
            yield where, match.groups()
        elif line and not line.startswith("# ") and not heading:
            raise UserError(f"{where}: expected {form}")


def read_csv(path, **types):
    """Yields "file, line" and the values of each row of a CSV; `types` gives the headings and the types of the values.
    Raises UserError."""
    rows = csv.DictReader(read_text(path).splitlines(), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", [convert(row[name].strip()) for name, convert in types.items()]
    except (KeyError, AttributeError, ValueError, csv.Error) as error:  # AttributeError: a row is too short
        raise UserError(f"{path}, line {rows.line_num}: expected a CSV with the headings {','.join(types)}") from error


# ---- Shared by the command lines of all scripts ---------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argparse parser whose flags have no defaults, so that it returns only what was typed. `--help` shows the
    settings `paper` and `tiny` of a script. Errors are one line."""

    def __init__(self, doc, paper, tiny):
        super().__init__(usage="python %(prog)s [flags]", description=doc, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.paper = paper
        self.tiny = tiny
        self.group = self

    def section(self, title):
        """Starts a new section of the help text."""
        self.group = self.add_argument_group(title)

    def flag(self, name, help, kind=str, **options):
        """Adds a flag. `kind` is a function that converts the text, a tuple of choices, or bool for a switch."""
        setting = name.strip("-").replace("-", "_")
        default, tiny = self.paper[setting], self.tiny[setting]
        if default and default == tiny:
            help = f"{help} (default: {default})"
        elif default:
            help = f"{help} (default: {default}; tiny: {tiny})"
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options |= {"choices": kind, "type": type(kind[0])}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        self.group.add_argument(name, help=help, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least(minimum, kind=int, maximum=math.inf):
    """A kind of flag: a finite number from `minimum` to `maximum`."""
    def number(text):
        value = kind(text)
        if not minimum <= value <= maximum or math.isinf(value):  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {minimum} to {maximum}")
        return value
    return number


def name_or_path(names, exists):
    """A kind of flag: one of `names`, or a path that `exists`, made absolute."""
    def path(text):
        if text in names:
            return text
        if not exists(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not on disk, and not one of {', '.join(names)}")
        return os.path.abspath(text)
    return path


def file_or_names(text):
    """A kind of flag: a file, made absolute, or any other text."""
    return os.path.abspath(text) if os.path.isfile(text) else text


data_set = name_or_path(DATASETS, os.path.isdir)
DATA_HELP = f"{', '.join(DATASETS)}, or a folder with train/<class>/* and val/<class>/*"


def add_data_flags(parser, training, several=None):
    """Adds the flags about data: those of `training`, or of evaluation. `several`: nargs="+" for several splits."""
    parser.flag("--root", "where the videos and the lists of the data set are; by default datasets/DATA", os.path.abspath)
    parser.flag("--split", "official split of UCF101 or HMDB51", (1, 2, 3), nargs=several)
    parser.flag("--classes", "base: the half of the classes with the most training videos; novel: the other half",
                ("all", "base", "novel"), nargs=several)
    parser.flag("--val-list", "validation videos, instead of a split: lines of 'path label', paths below --root; needs "
                "--labels", os.path.abspath, nargs=several)
    parser.flag("--labels", "class names: a CSV of id,name, or a text file with a name on each line", file_or_names,
                nargs=several)
    parser.flag("--frames", "frames sampled from each video", at_least(1))
    if training:
        parser.flag("--train-list", "training videos, in the same form", os.path.abspath)
        parser.flag("--shots", "training videos of each class; by default all", at_least(1))
        parser.flag("--augment", "none: frames and crop as in evaluation; crop: random frames, crop and flip; color: "
                    "also colour jitter; mix: also mixup and CutMix", ("none", "crop", "color", "mix"))
        parser.flag("--seed", "random seed", at_least(0))


def check_lists(parser, args):
    """Refuses lists that are given in part, or along with flags that they replace."""
    if args.val_list and not args.labels:
        parser.error("--val-list needs --labels")
    if args.val_list and args.classes not in ("all", ["all"]):
        parser.error("--classes does not go with lists")
    if hasattr(args, "train_list") and bool(args.train_list) != bool(args.val_list):
        parser.error("give both --train-list and --val-list")


def process(variable, default=0):
    """RANK, LOCAL_RANK or WORLD_SIZE if torchrun started this process. What else has set them does not matter."""
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


def run(main, *errors):
    """Runs the `main` of a script. UserError and the types in `errors`, a file that may not be read, too little memory
    and Ctrl-C end in one line on stderr. All other errors show their traceback: they are mistakes in the code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    except (UserError, *errors) as error:
        message = str(error)
    except PermissionError as error:
        message = f"{error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory; try fewer --frames, or a smaller --micro-batch or --batch-size"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


# ---- A look at a data set -------------------------------------------------------------------------------------------

def save_grid(rows, path, tile=128):
    """Draws a picture with a row for each (title, frames uint8 [T, 3, S, S]); a frame has `tile` x `tile` pixels."""
    left = 210  # pixels for the titles
    columns = max(len(frames) for _, frames in rows)
    sheet = Image.new("RGB", (left + tile * columns, tile * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (title, frames) in enumerate(rows):
        draw.text((8, tile * (y + 0.5)), textwrap.fill(title, 24), "black", font_size=16, anchor="lm")
        frames = pad(resize(frames, [tile - 2, tile - 2]), [1], fill=255)
        sheet.paste(to_pil_image(torch.cat(list(frames), dim=2)), (left, tile * y))
    with writing(path) as temporary:
        sheet.save(temporary)
    say(f"drawn: {path}")


def show_half(half, samples, names):
    """Prints the counts of one half of a data set, and which of a hundred of its videos cannot be read."""
    sizes = np.bincount([label for _, label in samples], minlength=len(names))
    say(f"{half}:\n  {len(samples)} videos of {len(names)} classes, {names[0]} ... {names[-1]}: "
        f"{sizes.min()} to {sizes.max()} of each")
    dataset = VideoDataset(samples, num_frames=1, image_size=8, train=False)
    keys = [(0, index) for index in range(0, len(samples), math.ceil(len(samples) / 100))]
    clips = thread_map(dataset.__getitem__, keys, max_workers=os.cpu_count(), desc="read", leave=False, disable=None)
    errors = [error for _, _, _, error in clips if error]
    say(f"  {len(keys)} tried: {len(errors)} unreadable")
    for error in errors:
        say(f"  unreadable {error}")


def main():
    settings = dict(data="toy", root=None, split=1, out=None)
    parser = Parser(__doc__, settings, settings)
    parser.flag("data", DATA_HELP, nargs="?", default="toy")
    parser.flag("--root", "where it is; by default datasets/DATA", Path)
    parser.flag("--split", "official split of UCF101 or HMDB51", (1, 2, 3))
    parser.flag("--out", "the picture to draw; by default DATA.png", Path)
    args = SimpleNamespace(**settings | vars(parser.parse_args()))
    training, names = load_samples(args.data, args.root, args.split, train=True)
    validation, _ = load_samples(args.data, args.root, args.split)
    show_half("training", training, names)
    show_half("validation", validation, names)

    image_size = 64 if args.data == "toy" else 224
    dataset = VideoDataset(training, 8, image_size, train=True, classes=names)
    rows = []
    for index in np.linspace(0, len(training) - 1, 10).astype(int).tolist():
        video, label, _, _ = dataset[0, index]
        rows.append((names[label], video))
    save_grid(rows, args.out or Path(f"{Path(args.data).resolve().name}.png"))


if __name__ == "__main__":
    run(main)
