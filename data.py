"""From a video file on disk to a uint8 clip in a batch.

    file -- read_video --> uint8 [T, 3, h, w] -- crop --> uint8 [T, 3, S, S] -- batch --> uint8 [B, T, 3, S, S]

A video is a set of T frames spread over its whole length (section 4.1 of the paper; "TSN sampling"): drawn at random
inside T equal segments to train, taken from the middles of the segments to test. Workers decode, choose and crop, and
hand over bytes; colours and mixtures are left to the device.

A data set is a list of (path, label) and a list of class names: see `ucf101` for one. Which frames and which crop a
sample gets depends on (seed, epoch, index) alone, not on who reads it.

`python data.py NAME` shows what is on disk and draws what the model will see.
"""
import argparse
import contextlib
import copy
import csv
import errno
import functools
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop
from tqdm import tqdm

import toy.draw

# ---------------------------------------------------------------------------------------------------------------------
# Frames


def sample_frames(num_frames, num_samples, rng=None):
    """Which of a video's n = num_frames frames to take: int64 [T], T = num_samples.

    With `rng`, a numpy Generator, the training rule: one frame at random from each of T segments of n // T frames, or,
    where there are fewer than T frames, all of them with repetitions. Without it the test rule: the middle of each of T
    segments of n / T frames. Both follow the original code, its rounding and its modulo (a short video may end with its
    first frame) included.
    """
    n, i = num_frames, np.arange(num_samples)
    if n < 1:
        raise ValueError("a video without frames")
    if rng is None:
        return (i * n / num_samples + n / (2 * num_samples)).astype(np.int64) % n
    step = n // num_samples
    if step > 0:
        return i * step + rng.integers(step, size=num_samples)
    return np.round(i * n / num_samples).astype(np.int64) % n


# What one file may ask for. These bound work and not time: what is refused is the same on every machine.
MAX_PIXELS = 2 ** 26  # of a frame: twice 8K
MAX_PACKETS, MAX_BYTES = 200_000, 2 ** 30  # of a compressed video: two hours
MAX_DECODED = 2 ** 36  # pixels decoded for one clip: 20 minutes of 1080p, where all of it has to be decoded

# Titles and the like may be in any encoding. PyAV 19 does not read them by itself and has no such option any more.
IGNORE_METADATA = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def read_video(path, num_samples, rng=None, short_side=None):
    """Reads T = num_samples frames of a video file, or of a folder of images in the order of the numbers in their
    names: uint8 [T, 3, h, w], RGB, upright; `sample_frames` says which.

    Frames over twice as large as `short_side` (pixels) are reduced to it on the way, which saves time and memory.
    Raises ValueError, or OSError, with the reason if no frame can be read or the file asks for too much.
    """
    try:
        frames = (read_images if Path(path).is_dir() else decode_video)(path, num_samples, rng, short_side)
    except (av.error.FFmpegError, Image.DecompressionBombError, SyntaxError) as error:  # pillow's, for a broken PNG
        raise ValueError(reason(error)) from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def reduced(height, width, short_side):
    """The height and width to which frames are reduced while they are read."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"a frame of {width} x {height} pixels is too large")
    scale = short_side / min(height, width) if short_side and min(height, width) > 2 * short_side else 1
    return round(height * scale), round(width * scale)


def image_files(path):
    """The images of a folder in the order of the numbers in their names: frame9.jpg comes before frame10.jpg."""
    def numbers(file):
        return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", file.name)]

    return sorted((file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_FILES), key=numbers)


def read_images(path, num_samples, rng, short_side):
    """`read_video` for a folder of images: a list of uint8 [h, w, 3]."""
    files = image_files(path)
    indices = sample_frames(len(files), num_samples, rng).tolist()
    found, size = {}, None
    for i in sorted(set(indices)):
        with Image.open(files[i]) as image:
            size = size or reduced(image.height, image.width, short_side)
            found[i] = np.array(image.convert("RGB").resize(size[::-1], Image.Resampling.BOX))
    return [found[i] for i in indices]


@contextlib.contextmanager
def open_video(path):
    """Gives the decoder of a video file and its compressed packets, in groups that can be decoded on their own.

    Compressed they are small and can be kept: to count them is the only way to know the number of frames before
    decoding, since the header may lack it or lie.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    # "file:", or else a colon in the name would make a protocol of what is before it.
    with av.open(f"file:{path}", **IGNORE_METADATA) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a song
            raise ValueError("it has no video stream")
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        stream.codec_context.thread_count = 1  # the workers are the parallel part
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        packets, size = [], 0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet)
                    size += packet.size
                if len(packets) > MAX_PACKETS or size > MAX_BYTES:
                    raise ValueError(f"over {MAX_PACKETS:,} frames or {MAX_BYTES:,} bytes: cut it into clips")
        except av.error.InvalidDataError:
            pass  # the file ends here, or is damaged: what came before may do
        yield stream.codec_context, group_packets(packets)


def group_packets(packets):
    """Cuts a list of packets before each keyframe, unless a packet behind the keyframe is shown before it."""
    if any(packet.pts is None for packet in packets):
        return [packets]
    starts, earliest = [], float("inf")
    for i, packet in reversed(list(enumerate(packets))):
        if i == 0 or (packet.is_keyframe and packet.pts < earliest):
            starts.append(i)
        earliest = min(earliest, packet.pts)
    starts.reverse()
    return [packets[start:end] for start, end in zip(starts, [*starts[1:], None])]


def num_frames(packets):
    """How many frames are shown of some packets: the first ones of a video may only be there to decode the others."""
    return sum(not packet.is_discard for packet in packets)


def decode_video(path, num_samples, rng, short_side):
    """`read_video` for a video file: a list of uint8 [h, w, 3]."""
    with open_video(path) as (codec, groups):
        size = reduced(codec.height, codec.width, short_side)
        count = sum(map(num_frames, groups))
        while count:
            indices = sample_frames(count, num_samples, copy.deepcopy(rng)).tolist()
            found, seen = decode(codec, groups, set(indices), size)
            if len(found) == len(set(indices)):
                return [found[i] for i in indices]
            # Decoding gave fewer frames than there are packets. How many there are in all is known when no group is
            # skipped; then the rule is applied again to that number.
            count, groups = (seen if len(groups) == 1 else count), [[packet for group in groups for packet in group]]
    raise ValueError("no frame of it can be decoded")


def count_frames(path):
    """The number of frames of a video file, as far as can be known without decoding it, or of a folder of images."""
    if Path(path).is_dir():
        return len(image_files(path))
    with open_video(path) as (_, groups):
        return sum(map(num_frames, groups))


def decode(codec, groups, wanted, size):
    """Decodes those groups of packets that hold a frame whose number is in the set `wanted`.

    Returns the wanted frames by number, a dict of uint8 [h, w, 3], and how many frames were seen; some are missing
    where damaged packets, which are passed over, gave none. `size` is theirs before they are turned upright.
    """
    reformatter = av.video.reformatter.VideoReformatter()  # one for the clip: it keeps its scaler
    found, pixels, end, number = {}, 0, 0, -1
    for group in groups:
        first, end = end, end + num_frames(group)
        left = {i for i in wanted if first <= i < end}
        for number, frame in enumerate(decode_group(codec, group) if left else (), first):
            pixels += frame.height * frame.width
            if pixels > MAX_DECODED:
                raise ValueError("it takes too long to decode; cut it into clips")
            if number in left:
                picture = reformatter.reformat(frame, size[1], size[0], "rgb24", interpolation="AREA")
                found[number] = np.rot90(picture.to_ndarray(), frame.rotation // 90)
                left.remove(number)
                if not left:
                    break
    return found, number + 1


def decode_group(codec, packets):
    codec.flush_buffers()
    for packet in [*packets, None]:  # None: the frames that the decoder still holds
        try:
            yield from codec.decode(packet)
        except av.error.InvalidDataError:
            continue


# ---------------------------------------------------------------------------------------------------------------------
# Crops

# The short side that the crops are cut from, for an input of one pixel. A crop does not resize to it first, but cuts
# the same part out of the video as it is: one interpolation.
SHORT_SIDE = 256 / 224


def center_crop(video, size):
    """The test crop: the central 224 x 224 of a short side of 256. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = round(min(h, w) / SHORT_SIDE)
    return resized_crop(video, (h - side) // 2, (w - side) // 2, side, side, [size, size], antialias=True)


def three_crops(video, size):
    """Squares of the whole short side at one end, in the middle and at the other: [T, 3, h, w] -> [3, T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = min(h, w)
    return torch.stack([resized_crop(video, (h - side) * place // 2, (w - side) * place // 2, side, side, [size, size],
                                     antialias=True) for place in (0, 1, 2)])


CROP_SCALES = (1, 0.875, 0.75, 0.66)  # of the short side


def random_crop(video, size, rng, flip=True):
    """The training crop, the same for all frames: uint8 [T, 3, h, w] -> [T, 3, S, S].

    "Multi-scale crop": width and height each from CROP_SCALES, at most one step apart in that list, in one of the four
    corners or the centre; then, with `flip`, left and right are exchanged half of the time.
    """
    h, w = video.shape[-2:]
    pairs = [(a, b) for i, a in enumerate(CROP_SCALES) for j, b in enumerate(CROP_SCALES) if abs(i - j) <= 1]
    height, width = (round(min(h, w) * scale) for scale in pairs[rng.integers(len(pairs))])
    down, right = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)][rng.integers(5)]
    video = resized_crop(video, int((h - height) * down), int((w - width) * right), height, width, [size, size],
                         antialias=True)
    return horizontal_flip(video) if flip and rng.uniform() < 0.5 else video


# ---------------------------------------------------------------------------------------------------------------------
# Colours and mixtures: on the device, where they cost next to nothing

AUGMENTATIONS = ("none", "crop", "color", "mix")  # each includes those before it


def draw_colors(seed, epoch, indices):
    """How to change the colours of the clips (epoch, index), float [B, 4]: with probability 0.8 factors of brightness,
    contrast and saturation and a turn of the hue, and with probability 0.2 no saturation at all."""
    colors = np.tile([1.0, 1.0, 1.0, 0.0], (len(indices), 1))
    for color, index in zip(colors, indices):
        rng = np.random.default_rng([seed, epoch, index, 1])  # 1: not the numbers that the frames and crop came from
        if rng.uniform() < 0.8:
            color[:] = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1))
        if rng.uniform() < 0.2:
            color[2] = 0
    return torch.from_numpy(colors).float()


def color_matrix(colors, mean):
    """What `colors` [B, 4] do to the colours x = (r, g, b) of clips with the mean colours `mean` [B, 3], as matrices
    for (r, g, b, 1): [B, 3, 4]. With brightness b, contrast c, saturation s and hue h, in circles,

        x' = b (c (y + s (cos h (x - y) + sin h Q x)) + (1 - c) luma of the mean),   y = luma of x

    Q takes a colour's chrominance a quarter circle on, in the plane of I and Q of YIQ (NTSC). Saturation and hue leave
    luma as it is, so that it does not matter in which order the four are done.
    """
    brightness, contrast, saturation, hue = colors[:, :, None, None].unbind(1)  # [B, 1, 1]
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    quarter = torch.linalg.inv(yiq) @ torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ yiq
    quarter, luma = quarter.to(colors), yiq[:1].expand(3, 3).to(colors)
    chroma = torch.eye(3).to(colors) - luma
    turned = (2 * torch.pi * hue).cos() * chroma + (2 * torch.pi * hue).sin() * quarter
    linear = contrast * (luma + saturation * turned)
    return brightness * torch.cat([linear, (1 - contrast) * (luma @ mean[:, :, None])], dim=2)


def change_colors(video, colors):
    """Color jitter, one for all frames of a clip: uint8 [B, T, 3, S, S], [B, 4] -> float, pixels in 0..255."""
    pixels = video.flatten(-2).float()  # [B, T, 3, S * S]
    matrix = color_matrix(colors, pixels.mean(dim=(1, 3)))[:, None]
    return (matrix[..., :3] @ pixels + matrix[..., 3:]).clamp_(0, 255).unflatten(-1, video.shape[-2:])


def mix(video, target, seed):
    """Mixup (alpha 0.8) or CutMix (alpha 1), each half of the time: neighbours, 0 and 1, 2 and 3, ... mix with each
    other, all by the same coefficient or box, which depends on the seed alone.

    Float video [B, T, 3, S, S] and target [B, C], the probabilities of the classes, to the same shapes; B is even.
    """
    # For torchvision a batch of two, which hold all the even and all the odd clips, with the labels 0 and 1.
    pairs = tv_tensors.Video(video.unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2))  # [2, B / 2 * T, 3, S, S]
    choice = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=2), v2.CutMix(alpha=1.0, num_classes=2)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
        pairs, share = choice(pairs, torch.arange(2))
    video = pairs.as_subclass(torch.Tensor).unflatten(1, (-1, video.shape[1])).transpose(0, 1).flatten(0, 1)
    return video, (share.to(target) @ target.unflatten(0, (-1, 2))).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: a list of (path, label) and a list of class names

VIDEO_FILES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp"}


def words(name):
    """A class name in camel case, with underscores or hyphens, as CLIP reads it best: "ApplyEye" -> "apply eye"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name).lower()


def lines(path):
    """The lines of a text file that are not blank."""
    return [line for line in path.read_text().splitlines() if line.strip()]


def read_csv(path):
    """The rows of a CSV, dicts by the names in its first line."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def ucf101(root, split, train):
    """UCF101 (Soomro et al., 2012) and all that is laid out like it."""
    lists = root / "ucfTrainTestlist"
    names = [line.split()[1] for line in lines(lists / "classInd.txt")]
    samples = []
    for line in lines(lists / f"{'train' if train else 'test'}list{split:02}.txt"):
        clip = line.split()[0]  # Class/file.avi; training lists have the label behind it
        if clip.split("/")[0] not in names:
            raise ValueError(f"{lists} has a clip of a class that classInd.txt lacks: {line!r}")
        samples.append((root / "UCF-101" / clip, names.index(clip.split("/")[0])))
    return samples, [words(name) for name in names]


def toy_ucf101(root, split, train):
    toy.draw.draw(root)
    return ucf101(root, split, train)


def hmdb51(root, split, train):
    """HMDB51 (Kuehne et al., 2011). Each class has a list; a 1 behind a file is for training, a 2 for testing."""
    end = f"_test_split{split}.txt"
    lists = sorted(path for path in (root / "testTrainMulti_7030_splits").iterdir() if path.name.endswith(end))
    names = [path.name.removesuffix(end) for path in lists]
    samples = []
    for label, (name, path) in enumerate(zip(names, lists)):
        for line in lines(path):
            file, mark = line.rsplit(maxsplit=1)
            if mark == ("1" if train else "2"):
                samples.append((root / name / file, label))
    return samples, [words(name) for name in names]


def kinetics(root, split, train):
    """Kinetics-400 and -600 (Kay et al., 2017): train.csv and train/, val.csv and val/, with class folders or without.
    Videos that have vanished since the lists were made are left out and counted."""
    half = "train" if train else "val"
    lists = {name: read_csv(root / f"{name}.csv") for name in ("train", "val")
             if name == half or (root / f"{name}.csv").exists()}
    rows = lists[half]
    on_disk = {path.stem: path for path in (root / half).rglob("*") if path.suffix in VIDEO_FILES}
    names = sorted({row["label"] for every in lists.values() for row in every})
    label = {name: i for i, name in enumerate(names)}
    stems = [f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}" for row in rows]
    samples = [(on_disk[stem], label[row["label"]]) for stem, row in zip(stems, rows) if stem in on_disk]
    if len(samples) < len(rows):
        say(f"{len(rows) - len(samples)} of the {len(rows)} videos in {half}.csv are not on disk")
    return samples, names


def ssv2(root, split, train):
    """Something-Something v2 (Goyal et al., 2017): "Holding [something]" is the class "holding something"."""
    label = {name: int(i) for name, i in json.loads((root / "labels.json").read_text()).items()}
    rows = json.loads((root / f"{'train' if train else 'validation'}.json").read_text())
    videos = root / "20bn-something-something-v2"
    samples = [(videos / f"{row['id']}.webm", label[re.sub(r"[\[\]]", "", row["template"])]) for row in rows]
    return samples, [name.lower() for name in sorted(label, key=label.get)]


def folder(root, split, train):
    """Your own videos: train/<class>/* and val/<class>/*, as torchvision's ImageFolder has it. A video is a file or a
    folder of its frames."""
    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir() and path.name[0] != ".")
    samples = []
    for path in sorted(path for name in (root / ("train" if train else "val")).iterdir() for path in name.glob("*")
                       if name.name[0] != "."):
        if path.suffix.lower() in VIDEO_FILES or path.is_dir():
            if path.parent.name not in names:
                raise ValueError(f"{path} is of a class that {root / 'train'} lacks")
            samples.append((path, names.index(path.parent.name)))
    return samples, [words(name) for name in names]


def listed(file, labels, root):
    """A list of the original code, "path label" a line, and its names, a CSV of id and name. Paths are below `root`."""
    names = {int(row["id"]): row["name"] for row in read_csv(labels)}
    order = {number: i for i, number in enumerate(sorted(names))}
    samples = []
    for line in lines(Path(file)):
        path, label = line.rsplit(maxsplit=1)
        if int(label) not in names:
            raise ValueError(f"{labels} has no class for the label of {line!r}")
        samples.append((root / path, order[int(label)]))
    return samples, [names[number] for number in order]


DATASETS = {"toy": toy_ucf101, "ucf101": ucf101, "hmdb51": hmdb51, "k400": kinetics, "k600": kinetics, "ssv2": ssv2}

HOW_TO_GET = {
    "ucf101": """The folder should hold UCF-101/<Class>/*.avi and ucfTrainTestlist/*.txt. To fetch them (6.5 GB):
  mkdir -p {root} && cd {root}
  curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101.rar && unrar x UCF101.rar
  curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip && unzip UCF101Tr*.zip""",
    "hmdb51": "The folder should hold <class>/*.avi and testTrainMulti_7030_splits/<class>_test_split<1|2|3>.txt.",
    "k400": "The folder should hold train.csv, val.csv, and <id>_<start>_<end>.mp4 anywhere below train/ and val/.",
    "ssv2": "The folder should hold labels.json, train.json, validation.json and 20bn-something-something-v2/*.webm.",
}
HOW_TO_GET["k600"] = HOW_TO_GET["k400"]


def root_of(name):
    """The folder in which a data set is, if nothing else is said."""
    return Path(name) if name not in DATASETS else toy.draw.CACHE if name == "toy" else Path("datasets") / name


@contextlib.contextmanager
def told_as(what):
    """Makes one line, which says what was read, of whatever a list with wrong content causes."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{what} is not as it should be: {kind}{error}") from error


def read_dataset(name, root=None, split=1, train=False):
    """The samples, a list of (path, label), and the class names of one half of a data set: a name in DATASETS, or the
    path of a folder of your own videos.

    Raises FileNotFoundError, with what belongs in `root` and how to get it, if it is not there.
    """
    root, half = Path(root or root_of(name)), "training" if train else "validation"
    what = name if name in DATASETS else "a data set"
    if split > 1 and name not in ("toy", "ucf101", "hmdb51"):
        raise ValueError(f"--split {split}: {name} has no official splits")
    try:
        with told_as(f"{what} in {root.absolute()}"):
            samples, names = DATASETS.get(name, folder)(root, split, train)
            samples = [(Path(path), range(len(names))[label]) for path, label in samples]  # refuses what is no label
    except (FileNotFoundError, NotADirectoryError) as error:
        if name == "toy":
            raise
        missing = Path(error.filename).absolute().relative_to(root.absolute())
        how = HOW_TO_GET.get(name, " ".join(DATASETS.get(name, folder).__doc__.split())).format(root=root)
        raise FileNotFoundError(f"{what} is not in {root.absolute()}: {missing} is missing. {how}") from error
    if not samples:
        raise ValueError(f"{what} in {root.absolute()}: no {half} video" + (f" in split {split}" if split > 1 else ""))
    return samples, names


# train.py asks for both halves, and --classes for the training half each time: it is read, and its gaps are told, once.
read_once = functools.cache(read_dataset)


def base_classes(samples, names):
    """The labels of the base classes: the half, rounded up, that has the most training samples; ties by name."""
    counts = Counter(label for _, label in samples)
    order = sorted(range(len(names)), key=lambda label: (-counts[label], names[label]))
    return sorted(order[: (len(names) + 1) // 2])


def draw_shots(samples, shots, seed):
    """`shots` samples of each class, or all that there are: the same for the same list and seed."""
    drawn, taken = [], Counter()
    for i in np.random.default_rng(seed).permutation(len(samples)):
        taken[samples[i][1]] += 1
        if taken[samples[i][1]] <= shots:
            drawn.append(i)
    return [samples[i] for i in sorted(drawn)]


def load_samples(args, train):
    """The samples and class names that the flags ask for: of --data or a list, of --classes, --shots of each."""
    file = args.train_list if train else args.val_list
    if file:
        with told_as(f"{file} with {args.labels}"):
            samples, names = listed(file, args.labels, args.root or (root_of(args.data) if args.data else Path()))
        if not samples:
            raise ValueError(f"{file} lists no videos")
    else:
        samples, names = read_once(args.data, args.root, args.split, train)
    if args.classes != "all":  # the more frequent half is of the training set, whichever half is read
        training, _ = read_once(args.data, args.root, args.split, True)
        base = base_classes(training, names)
        kept = base if args.classes == "base" else [label for label in range(len(names)) if label not in base]
        position = {label: i for i, label in enumerate(kept)}
        samples = [(path, position[label]) for path, label in samples if label in position]
        names = [names[label] for label in kept]
    if train and args.shots:
        samples = draw_shots(samples, args.shots, args.seed)
    return samples, names


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def reason(error):
    """What an exception says, without the number and the name of a file."""
    return getattr(error, "strerror", None) or str(error)


class VideoDataset(torch.utils.data.Dataset):
    """Clips by (epoch, index): a video uint8 [T, 3, S, S], its label, its index and the error, "" if there was none.

    In training frames and crop are random, unless `augment` is "none", and a video that cannot be read is replaced by
    the next of the list. In evaluation it is all zeros; the error tells of all that could not be read, a line each.
    With `views` = (V, K) other than (1, 1) an evaluated video is [V * K, T, 3, S, S]: V clips, whose frames lie between
    each other, and K = 1 (centre) or 3 crops of each.
    """

    ATTEMPTS = 12  # videos in a row; more than train.py lets pass

    def __init__(self, samples, num_frames, image_size, train, seed=0, flip=True, augment="crop", views=(1, 1)):
        self.paths = np.array([str(path) for path, _ in samples])  # arrays: forked workers share them without copying
        self.labels = np.array([label for _, label in samples])
        self.num_frames, self.image_size, self.train = num_frames, image_size, train
        self.seed, self.flip, self.augment, self.views = seed, flip, augment, views

    def __len__(self):
        return len(self.paths)

    def read_clip(self, epoch, index):
        """The video alone, as the class docstring says. Raises ValueError or OSError if it cannot be read."""
        short_side = round(self.image_size * SHORT_SIDE)
        if self.train and self.augment != "none":
            rng = np.random.default_rng([self.seed, epoch, index])
            video = read_video(self.paths[index], self.num_frames, rng, short_side)
            return random_crop(video, self.image_size, rng, self.flip)
        clips, crops = self.views
        # Of V * T segments clip v takes every V-th, from v on: the offsets (v + 1/2) / V inside each of T segments.
        video = read_video(self.paths[index], clips * self.num_frames, None, short_side)
        video = center_crop(video, self.image_size)[None] if crops == 1 else three_crops(video, self.image_size)
        video = video.unflatten(1, (self.num_frames, clips)).transpose(1, 2).flatten(0, 1)  # [V * K, T, 3, S, S]
        return video if len(video) > 1 else video[0]

    def __getitem__(self, key):
        epoch, index = key
        errors = []
        while True:
            try:
                video = self.read_clip(epoch, index)
                break
            except (ValueError, OSError) as error:
                errors.append(f"{self.paths[index]}: {reason(error)}")
            if not self.train or len(errors) == self.ATTEMPTS:
                views = () if self.views == (1, 1) else (math.prod(self.views),)
                video = torch.zeros(*views, self.num_frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
                break
            index = (index + 1) % len(self)
        return video, int(self.labels[index]), index, "\n".join(errors)


class Batches(torch.utils.data.Sampler):
    """What one process reads: lists of (epoch, index), the share of `rank` among `world` processes.

    With a seed, the training order: shuffled anew in each epoch (set `epoch`), in whole batches, of which each process
    reads a stretch, in pieces of `micro_batch`; the first `skip` pieces are left out. Without, the test order: every
    index once, in batches as they come.
    """

    def __init__(self, length, batch_size, seed=None, rank=0, world=1, micro_batch=None):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.size = micro_batch or batch_size // world
        self.epoch = self.skip = 0

    def __len__(self):
        if self.seed is None:
            return -(-len(range(self.rank, self.length, self.world)) // self.size)
        return self.length // self.batch_size * (self.batch_size // self.world // self.size) - self.skip

    def __iter__(self):
        if self.seed is None:
            mine = np.arange(self.rank, self.length, self.world)
        else:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
            whole = order[: self.length // self.batch_size * self.batch_size]
            mine = whole.reshape(-1, self.world, self.batch_size // self.world)[:, self.rank].flatten()
        for first in range(self.skip * self.size, len(mine), self.size):
            yield [(self.epoch, index) for index in mine[first : first + self.size].tolist()]


def make_loader(dataset, batches, workers):
    """A DataLoader of (video uint8 [B, T, 3, S, S], label [B], index [B], errors: B strings)."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=workers > 0, worker_init_fn=start_worker)


def start_worker(_):
    """A SIGTERM or Ctrl-C for all processes is for the main one alone, which needs its workers until it has saved."""
    def end_if_told_by_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    threading.Thread(target=end_if_told_by_parent, daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help begins with the docstring of the script and whose errors are one line."""

    def __init__(self, doc, usage="python %(prog)s [flags]"):
        super().__init__(usage=usage, description=doc, allow_abbrev=False,
                         formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least(minimum, kind=int, maximum=float("inf")):
    """A type for argparse: a finite number of `kind` from `minimum` to `maximum`."""

    def number(text):
        value = kind(text)
        if not minimum <= value <= maximum or value == float("inf"):
            upwards = "on" if maximum == float("inf") else f"to {maximum}"
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum} {upwards}")
        return value

    number.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says: invalid whole number value: 'x'
    return number


def dataset(text):
    """A type for argparse: a name in DATASETS or a folder."""
    if text in DATASETS:
        return text
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(DATASETS)}")
    return str(Path(text).absolute())


def add_arguments(parser, name="--data", training=False):
    """The flags about data, the same in every script; here the name of the data set needs no flag. `training` adds
    those about training videos; without there may be several splits and kinds of classes."""
    group = parser.add_argument_group("data")
    several = {} if training else dict(nargs="+")
    group.add_argument(name, nargs=None if name.startswith("-") else "?", type=dataset, metavar="DATA",
                       help=f"{', '.join(DATASETS)}, or a folder of your own, train/<class>/* and val/<class>/* "
                            "(default: toy)")
    group.add_argument("--root", type=Path, help="folder that holds it (default: datasets/DATA; the toy draws itself)")
    group.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="official split (default: 1)", **several)
    group.add_argument("--classes", choices=("all", "base", "novel"), default="all", **several,
                       help="base: the half with the most training videos; novel: the others (default: all)")
    group.add_argument("--val-list", type=Path, metavar="FILE",
                       help="lines 'path label' below --root in place of a split, as in the original code")
    group.add_argument("--labels", metavar="FILE", help="CSV of id,name that goes with the lists")
    group.add_argument("--frames", type=at_least(1), metavar="N", help="frames of a video (default: 32; tiny: 8)")
    if training:
        group.add_argument("--train-list", type=Path, metavar="FILE", help="as --val-list, for training")
        group.add_argument("--shots", type=at_least(1), metavar="N", help="training videos of a class (default: all)")
        group.add_argument("--augment", choices=AUGMENTATIONS, metavar="HOW",
                           help="none; crop: frames, crop and flip at random; color: and colours; mix: and mixup or "
                                "CutMix (default: mix; tiny: crop)")
        group.add_argument("--seed", type=at_least(0), metavar="N", default=1024,
                           help="of all that is random (default: %(default)s)")


def check_lists(parser, args):
    """Ends a call with only some of the flags that go together."""
    lists = (getattr(args, "train_list", args.val_list), args.val_list, args.labels)
    if any(lists) and (not all(lists) or args.classes not in ("all", ["all"])):
        first, last = ("", "; --video goes with --labels alone") if hasattr(args, "video") else (
            "--train-list (for training), ", "")
        parser.error(f"{first}--val-list and --labels go together, and not with --classes{last}")


def picture_grid(rows, tile=128):
    """A picture of some rows, each a (title, frames uint8 [T, 3, S, S]), with frames of `tile` x `tile` pixels."""
    step = tile + 2
    sheet = Image.new("RGB", (210 + step * max(len(frames) for _, frames in rows), step * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for y, (title, frames) in enumerate(rows):
        title = "\n".join(textwrap.fill(line, 24) for line in title.split("\n"))
        draw.text((8, y * step + tile // 2), title, "black", font, anchor="lm")
        for x, frame in enumerate(frames):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((tile, tile)), (210 + x * step, y * step))
    return sheet


def draw_contact_sheet(dataset, names, path, num_videos=10, num_frames=8):
    """Draws what the model will see: a row for each of some videos of a VideoDataset, spread over its classes, with the
    class name and `num_frames` of the frames, as sampled, cropped, flipped and coloured."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, num_videos).astype(int)).tolist()
    rows = []
    for index, colors in zip(indices, draw_colors(dataset.seed, 0, indices)):
        video, label, _, error = dataset[0, index]
        if dataset.augment in ("color", "mix"):
            video = change_colors(video[None], colors[None])[0].byte()
        frames = video[sample_frames(len(video), num_frames)]
        rows.append((f"unreadable: {Path(dataset.paths[index]).name}", frames[:0]) if error else (names[label], frames))
    picture_grid(rows).save(path)


def say(text=""):
    """Prints a line, in the main process only, above a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(str(text))


def run(main):
    """Runs `main`. What a user can cause, such as a missing file, a wrong value or a full disk, ends in one line on
    stderr and exit status 1."""
    try:
        main()
    except BrokenPipeError:  # who reads the output, `head` for example, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            error = ": ".join(str(part) for part in (error.strerror, error.filename) if part)
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except RuntimeError as error:  # PyTorch tells them apart by their text alone
        told = {"memory": "out of memory; try a smaller --batch-size or --micro-batch, or fewer --frames",
                "DataLoader worker": f"a worker ended: {error}", "Connection": "another process has ended"}
        message = next((told[part] for part in told if part in str(error)), None)
        if message is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


CHECKED = 100  # videos of each half, spread over it


def report(samples, names, args):
    """Prints what is in one half of a data set, and reads some of its videos, or all, to see whether they can be."""
    sizes = Counter(label for _, label in samples)
    order = sorted(range(len(names)), key=lambda label: (sizes[label], names[label]))
    say(f"  {len(samples)} videos of {len(names)} classes, from {sizes[order[0]]} ({names[order[0]]}) to "
        f"{sizes[order[-1]]} ({names[order[-1]]})")
    exists = [path.exists() for path, _ in samples]
    if not all(exists):
        say(f"  {exists.count(False)} missing, the first is {samples[exists.index(False)][0].absolute()}")
    paths = [path for (path, _), there in zip(samples, exists) if there]
    if not paths:
        raise ValueError("none of the videos is on disk; is --root right?")
    if not args.check_all:
        paths = paths[:: -(-len(paths) // CHECKED)]

    def check(path):
        try:
            read_video(path, args.frames, short_side=round(args.resolution * SHORT_SIDE))
            return count_frames(path), ""
        except (ValueError, OSError) as error:
            return 0, f"{path}: {reason(error)}"

    cores, begin = len(os.sched_getaffinity(0)), time.perf_counter()
    with ThreadPool(cores) as pool:  # threads do: FFmpeg works without Python's lock
        results = list(tqdm(pool.imap(check, paths), "reading", len(paths), leave=False, unit="video", disable=None))
    rate = len(paths) / (time.perf_counter() - begin)
    errors = [error for _, error in results if error]
    say(f"  {len(paths)} tried: {len(errors)} unreadable; {rate:.0f} videos/s on {cores} cores")
    frames = sorted(count for count, error in results if not error)
    if frames:
        say(f"  {frames[0]} to {frames[-1]} frames, the median {frames[len(frames) // 2]}")
    for error in errors:
        say(f"  unreadable {error}")


def main():
    """Shows what is on disk: counts, missing and unreadable files, a contact sheet."""
    parser = Parser(__doc__, usage="python %(prog)s [DATA] [flags]")
    add_arguments(parser, "data", training=True)
    group = parser.add_argument_group("a look at them")
    group.add_argument("--resolution", type=at_least(1), metavar="N", help="pixels a side (default: 224; toy: 64)")
    group.add_argument("--check-all", action="store_true", help=f"read every video, not just some {CHECKED}")
    group.add_argument("--out", type=Path, metavar="PNG", help="the contact sheet to draw (default: DATA.png)")
    args = parser.parse_args()
    check_lists(parser, args)
    args.data = args.data or (None if args.val_list else "toy")
    defaults = dict(frames=8, resolution=64, augment="crop") if args.data == "toy" else dict(
        frames=32, resolution=224, augment="mix")
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.out = args.out or Path(f"{Path(args.data or args.train_list.stem).name}.png")
    if args.out.suffix != ".png" or not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out} is no PNG in a folder that is there")
    halves = [load_samples(args, train) for train in (True, False)]
    for half, (samples, names) in zip(("training", "validation"), halves):
        say(f"{half}:")
        report(samples, names, args)
    samples, names = halves[0]
    clips = VideoDataset(samples, args.frames, args.resolution, True, args.seed, args.data != "ssv2", args.augment)
    draw_contact_sheet(clips, names, args.out)
    say(f"{args.out} shows some training videos as the model sees them ({args.resolution} pixels, 8 of {args.frames} "
        f"frames, --augment {args.augment}{', not yet mixed' if args.augment == 'mix' else ''})")


if __name__ == "__main__":
    run(main)
