"""From a video file on disk to a uint8 clip in a batch.

    file -- read_video --> uint8 [T, 3, h, w] -- crop --> uint8 [T, 3, S, S] -- batch --> uint8 [B, T, 3, S, S]

A video is a set of T frames spread over its whole length (section 4.1 of the paper; "TSN sampling"): drawn at random
inside T equal segments to train, taken from the middles of the segments to test. Workers decode, choose and crop, and
hand over bytes; the rest happens on the device, where it costs next to nothing.

A data set is a list of (path, label) and a list of class names: see `ucf101` for one. Which frames and which crop a
sample gets depends on (seed, epoch, index) alone, not on who reads it.

`python data.py NAME` shows what is on disk and draws what the model will see.
"""
import argparse
import copy
import csv
import functools
import json
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
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


def read_video(path, num_samples, rng=None):
    """Decodes T = num_samples frames of a video file: uint8 [T, 3, h, w], RGB; `sample_frames` says which.

    Raises ValueError, or OSError, with the reason if the file is not a video that can be decoded.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1  # the workers are the parallel part
            # The compressed packets are small and are kept: counting them is the only way to know the number of frames
            # before decoding, since the count in the header may be missing or wrong.
            packets = [packet for packet in container.demux(stream) if packet.size]
            count, frames = len(packets), []
            while len(frames) < num_samples:
                if count == 0:
                    raise ValueError("no frame of it can be decoded")
                # If decoding gives fewer frames than there are packets, the rule is applied again to the right number.
                indices = sample_frames(count, num_samples, copy.deepcopy(rng))
                frames, count = decode(stream.codec_context, packets, indices)
    except av.error.FFmpegError as error:
        raise ValueError(error.strerror) from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def decode(codec, packets, indices):
    """Decodes packets until all frames of `indices` are found. Returns them, a list of uint8 [h, w, 3] in the order of
    `indices` (shorter if the video ended before), and the number of frames seen. A damaged packet is passed over."""
    codec.flush_buffers()
    reformatter = av.video.reformatter.VideoReformatter()  # one for the clip: it keeps its scaler
    wanted, found, count = set(indices.tolist()), {}, 0
    for packet in [*packets, None]:  # None: the frames that the decoder still holds
        try:
            decoded = codec.decode(packet)
        except av.error.InvalidDataError:
            continue
        for frame in decoded:
            if count in wanted:
                found[count] = reformatter.reformat(frame, codec.width, codec.height, "rgb24").to_ndarray()
            count += 1
        if len(found) == len(wanted):
            break
    return [found[i] for i in indices if i in found], count


# ---------------------------------------------------------------------------------------------------------------------
# Crops


def center_crop(video, size):
    """The test crop: the central 7/8 of the short side, squared. uint8 [T, 3, h, w] -> [T, 3, S, S].

    It is what is left by resizing the short side to 256 and cutting out the central 224 x 224, in one interpolation.
    """
    h, w = video.shape[-2:]
    side = round(min(h, w) * 224 / 256)
    return resized_crop(video, (h - side) // 2, (w - side) // 2, side, side, [size, size], antialias=True)


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
# Data sets: a list of (path, label) and a list of class names

VIDEO_FILES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp"}


def words(name):
    """A class name in camel case or with underscores as CLIP reads it best: "ApplyEyeMakeup" -> "apply eye makeup"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def lines(path):
    """The lines of a text file that are not blank."""
    return [line for line in path.read_text().splitlines() if line.strip()]


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
    with open(root / f"{half}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    on_disk = {path.stem: path for path in (root / half).rglob("*") if path.suffix in VIDEO_FILES}
    names = sorted({row["label"] for row in rows})
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
    """Your own videos: train/<class>/* and val/<class>/*, as torchvision's ImageFolder has it."""
    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    samples = []
    for path in sorted((root / ("train" if train else "val")).glob("*/*")):
        if path.suffix.lower() in VIDEO_FILES:
            if path.parent.name not in names:
                raise ValueError(f"{path} is of a class that {root / 'train'} lacks")
            samples.append((path, names.index(path.parent.name)))
    return samples, [words(name) for name in names]


def listed(file, labels, root):
    """A list of the original code, "path label" a line, and its names, a CSV of id and name. Paths are below `root`."""
    with open(labels, newline="") as lines_of_csv:
        names = {int(row["id"]): row["name"] for row in csv.DictReader(lines_of_csv)}
    order = {number: i for i, number in enumerate(sorted(names))}
    samples = []
    for line in lines(Path(file)):
        path, _, label = line.rpartition(" ")
        if not label.isdecimal() or int(label) not in names:
            raise ValueError(f"{file}: {labels} has no class for the label of {line!r}")
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


def read_dataset(name, root=None, split=1, train=False):
    """The samples, a list of (path, label), and the class names of one half of a data set: a name in DATASETS, or the
    path of a folder of your own videos.

    Raises FileNotFoundError, with what belongs in `root` and how to get it, if it is not there.
    """
    reader = DATASETS.get(name, folder)
    root = Path(root or (name if reader is folder else toy.draw.CACHE if name == "toy" else Path("datasets") / name))
    try:
        samples, names = reader(root, split, train)
    except (FileNotFoundError, NotADirectoryError) as error:
        if name == "toy":
            raise
        missing = Path(error.filename).absolute().relative_to(root.absolute())
        how = HOW_TO_GET.get(name, "The folder should hold train/<class>/* and val/<class>/*.").format(root=root)
        raise FileNotFoundError(f"{name} is not in {root.absolute()}: {missing} is missing. {how}") from error
    if not samples:
        raise ValueError(f"{name} in {root.absolute()}: no {'training' if train else 'test'} video in split {split}")
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
        samples, names = listed(file, args.labels, args.root or Path())
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


class VideoDataset(torch.utils.data.Dataset):
    """Clips by (epoch, index): a video uint8 [T, 3, S, S], its label, its index and the error, "" if there was none.

    A video that cannot be read is replaced by the next of the list in training, and is all zeros in evaluation. The
    error tells of all that could not be read, a line each.
    """

    ATTEMPTS = 12  # videos in a row; more than train.py lets pass

    def __init__(self, samples, num_frames, image_size, train, seed=0, flip=True):
        self.paths = np.array([str(path) for path, _ in samples])  # arrays: forked workers share them without copying
        self.labels = np.array([label for _, label in samples])
        self.num_frames, self.image_size, self.train = num_frames, image_size, train
        self.seed, self.flip = seed, flip

    def __len__(self):
        return len(self.paths)

    def read_clip(self, epoch, index):
        if not self.train:
            return center_crop(read_video(self.paths[index], self.num_frames), self.image_size)
        rng = np.random.default_rng([self.seed, epoch, index])
        return random_crop(read_video(self.paths[index], self.num_frames, rng), self.image_size, rng, self.flip)

    def __getitem__(self, key):
        epoch, index = key
        errors = []
        while True:
            try:
                video = self.read_clip(epoch, index)
                break
            except (ValueError, OSError) as error:
                errors.append(f"{self.paths[index]}: {getattr(error, 'strerror', None) or error}")
            if not self.train or len(errors) == self.ATTEMPTS:
                video = torch.zeros(self.num_frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
                break
            index = (index + 1) % len(self)
        return video, int(self.labels[index]), index, "\n".join(errors)


class Batches(torch.utils.data.Sampler):
    """What one process reads: batches of (epoch, index), the share of `rank` among `world` processes.

    With a seed, the training order: shuffled anew in each epoch (set `epoch`), in whole batches, which taken over all
    processes are the same whatever `world` is. Without, the test order: every index once, in batches as they come.
    """

    def __init__(self, length, batch_size, seed=None, rank=0, world=1):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = 0

    def __len__(self):
        if self.seed is not None:
            return self.length // self.batch_size
        return -(-len(range(self.rank, self.length, self.world)) // (self.batch_size // self.world))

    def __iter__(self):
        order = np.arange(self.length)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
            order = order[: len(self) * self.batch_size]
        mine = [(self.epoch, int(index)) for index in order[self.rank :: self.world]]
        size = self.batch_size // self.world
        for first in range(0, len(mine), size):
            yield mine[first : first + size]


def make_loader(dataset, batches, workers):
    """A DataLoader of (video uint8 [B, T, 3, S, S], label [B], index [B], errors: B strings)."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=workers > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help begins with the docstring of the script and whose errors are one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

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


def add_arguments(parser, name="--data"):
    """The flags about data, the same in every script; here the name of the data set needs no flag."""
    group = parser.add_argument_group("data")
    group.add_argument(name, nargs=None if name.startswith("-") else "?", type=dataset, default="toy", metavar="DATA",
                       help=f"{', '.join(DATASETS)}, or a folder of your own videos, train/<class>/* and val/<class>/* "
                            "(default: toy, or as the weights were trained)")
    group.add_argument("--root", type=Path, help="folder that holds it (default: datasets/NAME; the toy draws itself)")
    group.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="official split (default: 1)")
    group.add_argument("--classes", choices=("all", "base", "novel"), default="all",
                       help="base: the half with the most training videos; novel: the others (default: all)")
    group.add_argument("--val-list", type=Path,
                       help="in place of --data a list of the original code: 'path label' a line, paths below --root")
    group.add_argument("--labels", type=Path, help="CSV of id,name that goes with the lists")
    group.add_argument("--frames", type=at_least(1),
                       help="frames taken from a video (default: 32, for tiny 8, or as the weights were trained)")


def draw_contact_sheet(dataset, names, path, num_videos=10, num_frames=8, tile=128):
    """Draws what the model will see: a row for each of some videos of a VideoDataset, spread over its classes, with the
    class name and `num_frames` of the frames, as sampled, cropped and flipped. Saves it as a picture at `path`."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, num_videos).astype(int))
    sheet = Image.new("RGB", (210 + num_frames * (tile + 2), len(indices) * (tile + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, index in enumerate(indices):
        video, label, _, error = dataset[0, int(index)]
        title = "\n".join(textwrap.wrap(names[label], 24)) if not error else "unreadable"
        draw.text((8, row * (tile + 2) + tile // 2), title, "black", font, anchor="lm")
        for column, frame in enumerate(video[sample_frames(len(video), num_frames)]):
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((tile, tile))
            sheet.paste(picture, (210 + column * (tile + 2), row * (tile + 2)))
    sheet.save(path)


def say(text=""):
    """Prints a line, in the main process only, above a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(str(text))


def run(main):
    """Runs `main`. What a user can cause, such as a missing file, a wrong value or a full disk, ends in one line on
    stderr and exit status 1."""
    try:
        main()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            error = ": ".join(str(part) for part in (error.strerror, error.filename) if part)
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: out of memory; try a smaller --batch-size or fewer --frames")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main():
    parser = Parser(__doc__)
    add_arguments(parser, "data")
    parser.add_argument("--image-size", type=at_least(1), help="side of the input in pixels (default: 224, toy 64)")
    parser.add_argument("--seed", type=at_least(0), default=1024, help="of frames and crops (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to draw the contact sheet (default: NAME.png)")
    parser.set_defaults(train_list=None, shots=None)
    args = parser.parse_args()
    is_toy = args.data == "toy"
    args.frames, args.image_size = args.frames or (8 if is_toy else 32), args.image_size or (64 if is_toy else 224)
    for train in (True, False):
        samples, names = load_samples(args, train)
        sizes = Counter(label for _, label in samples)
        missing = sum(not path.exists() for path, _ in samples)
        smallest, largest = min(sizes[i] for i in range(len(names))), max(sizes.values())
        say(f"{'training' if train else 'test':9} {len(samples)} videos, {missing} of them missing; "
            f"{len(names)} classes, the smallest of {smallest} videos, the largest of {largest}")
        if train:
            clips = VideoDataset(samples, args.frames, args.image_size, train, args.seed, args.data != "ssv2")
    out = args.out or Path(f"{Path(args.data).name}.png")
    draw_contact_sheet(clips, names, out)
    say(f"{out} shows some training videos as the model sees them")


if __name__ == "__main__":
    run(main)
