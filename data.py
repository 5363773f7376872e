"""From a video file on disk to a uint8 clip in a batch.

    file -- read_video --> uint8 [T, 3, h, w] -- crop --> uint8 [T, 3, S, S] -- batch --> uint8 [B, T, 3, S, S]

A video is a set of T of its n frames (section 4.1 of the paper; "TSN sampling"): one at random of each T segments of
n // T frames to train, the middles of T equal parts to test. Colour jitter, mixing and normalisation run on the device.
A data set is a list of (path, label) and a list of class names: see `ucf101`.

`python data.py NAME` shows what is on disk and draws what the model will see.
"""
import argparse
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import re
import struct
import sys
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop, to_pil_image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import toy.draw


class UserError(ValueError):
    """A mistake of the user, not of the code: a wrong file, list or value. `run` prints the message, one line."""


# ---- Frames ---------------------------------------------------------------------------------------------------------

def sample_frames(num_frames, num_samples, rng=None):
    """Which of a video's n = num_frames frames to take: int64 [T], T = num_samples.

        training (rng, a numpy Generator):  i * (n // T) + a random number below n // T,  for i = 0 ... T - 1
        training, n < T:                    round(i * n / T), all frames with repetitions
        test (no rng):                      floor(i * n / T + n / (2 T)), the middle of segment i

    As in the original code, all are taken modulo n: a short video may end with its first frame."""
    n, t, i = num_frames, num_samples, np.arange(num_samples)
    if n < 1:
        raise UserError("a video without frames")
    if rng is None:
        return (i * n / t + n / (2 * t)).astype(np.int64) % n
    if n < t:
        return np.round(i * n / t).astype(np.int64) % n
    return i * (n // t) + rng.integers(n // t, size=t)


# What one file may ask for. The bounds are on work, not time, so that every machine refuses the same files.
MAX_PIXELS = 2 ** 26  # of a frame: twice 8K
MAX_PACKETS, MAX_BYTES = 200_000, 2 ** 30  # of a compressed video: two hours
MAX_DECODED = 2 ** 36  # pixels decoded for one clip: 20 minutes of 1080p, where all of it has to be decoded

# Titles and the like may be in any encoding. PyAV 19 does not read them by itself and has no such option.
IGNORE_METADATA = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def read_video(path, num_samples, rng=None, short_side=None):
    """Reads T = num_samples frames (`sample_frames` says which) of a video file, or of a folder of images in the order
    of the numbers in their names: uint8 [T, 3, h, w], RGB, upright. Frames over twice as large as `short_side` (pixels)
    are reduced to it. Raises UserError, "path: reason", if none can be read or the file asks for too much."""
    path = Path(path)
    try:
        frames = (read_images if path.is_dir() else decode_video)(path, num_samples, rng, short_side)
    except (UserError, av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def reduced_size(height, width, short_side):
    """The height and width to which frames are reduced while they are read."""
    if height * width > MAX_PIXELS:
        raise UserError(f"a frame of {width} x {height} pixels is too large")
    scale = short_side / min(height, width) if short_side and min(height, width) > 2 * short_side else 1
    return round(height * scale), round(width * scale)


def read_images(folder, num_samples, rng, short_side):
    """`read_video` for a folder of images of one kind, and perhaps optical flow: a list of uint8 [h, w, 3]."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_FILES and not JUNK.match(path.name)]
    files = [path for path in files if not path.name.lower().startswith("flow")] or files
    kinds = {re.sub("[0-9]+", "", path.name).lower(): path.name for path in sorted(files, reverse=True)}
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise UserError(f"images of several kinds, such as {one} and {other}: move one of them to another folder")
    files.sort(key=lambda path: ([int(part) for part in re.findall("[0-9]+", path.stem)], path.name))  # 9 before 10
    indices = sample_frames(len(files), num_samples, rng).tolist()
    found, size = {}, None
    for i in sorted(set(indices)):
        try:
            with Image.open(files[i]) as image:
                reduced_size(image.height, image.width, short_side)  # raises, before decoding, if it is too large
                image = ImageOps.exif_transpose(image)
                size = size or reduced_size(image.height, image.width, short_side)  # of the first, upright
                if image.mode.startswith("I"):  # 16 bits, which pillow would cut off at 255
                    image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
                found[i] = np.array(image.convert("RGB").resize(size[::-1], Image.Resampling.BOX))
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise UserError(f"{files[i].name}: {error}") from error  # pillow raises all of these for broken files
    return [found[i] for i in indices]


def decode_video(path, num_samples, rng, short_side):
    """`read_video` for a video file: a list of uint8 [h, w, 3]."""
    if not path.is_file():  # reading a pipe would wait for ever
        raise UserError("there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"over {MAX_BYTES:,} bytes: cut it into clips")
    # "file:", or else a colon in the name would make a protocol of what is before it.
    with av.open(f"file:{path}", **IGNORE_METADATA) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise UserError("it has no video stream of a known codec")  # the cover of a song is none, either
        codec = stream.codec_context
        codec.thread_count = 1  # the workers are the parallel part
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        packets, starts = read_packets(container, stream)
        # The number of frames before each packet, and of all; packets that are only there to decode others give none
        numbers = [0, *itertools.accumulate(not packet.is_discard for packet in packets)]
        count = numbers[-1]
        height, width = reduced_size(codec.height, codec.width, short_side)  # before frames are turned upright
        reformatter = av.video.reformatter.VideoReformatter()  # one for the clip: it keeps its scaler
        while count:
            indices = sample_frames(count, num_samples, rng).tolist()
            found, pixels, number = {}, 0, -1
            for start, end in itertools.pairwise([*starts, len(packets)]):
                wanted = [i for i in indices if numbers[start] <= i < numbers[end]]
                if not wanted:
                    continue
                for number, frame in zip(range(numbers[start], max(wanted) + 1), decode(codec, packets[start:end])):
                    pixels += frame.height * frame.width
                    if pixels > MAX_DECODED:
                        raise UserError("it takes too long to decode; cut it into clips")
                    if number in wanted:
                        picture = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
                        found[number] = upright(picture.to_ndarray(), frame)
            if len(found) == len(set(indices)):
                return [found[i] for i in indices]
            # Fewer frames than packets: decode all as one group to count them, then apply the rule to that number
            if starts == [0]:
                count = number + 1
            starts = [0]
    raise UserError("no frame of it can be decoded")


def read_packets(container, stream):
    """The compressed packets of a video, which are few bytes, and the indices of those where decoding can start: each
    keyframe, unless a packet behind it is shown before it. The header may lack the number of frames, or lie."""
    packets, starts, earliest = [], [], math.inf
    with contextlib.suppress(av.error.InvalidDataError):  # at a damaged place: what came before may do
        for packet in container.demux(stream):
            if packet.size:
                packets.append(packet)
            if len(packets) > MAX_PACKETS:
                raise UserError(f"over {MAX_PACKETS:,} frames: cut it into clips")
    for i, packet in reversed([*enumerate(packets)]):
        if packet.pts is None:
            return packets, [0]
        if i == 0 or (packet.is_keyframe and packet.pts < earliest):
            starts.append(i)
        earliest = min(earliest, packet.pts)
    return packets, starts[::-1]


def decode(codec, packets):
    codec.flush_buffers()
    for packet in [*packets, None]:  # None: the frames that the decoder still holds
        with contextlib.suppress(av.error.InvalidDataError):  # damaged packets give none
            yield from codec.decode(packet)


def upright(picture, frame):
    """Turns and mirrors a picture [h, w, 3] as the display matrix of its frame asks for, in steps of 90 degrees. The
    matrix (a, b, u, c, d, v, x, y, w) shows the pixel (x, y) at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix is not None else (1, 0, 0, 0, 1)
    if abs(b) > abs(a):  # x and y change places
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# ---- Crops, colours and mixing; the last two on the device ----------------------------------------------------------

# The short side of the video, where the input has 1. Crops are cut from the video as it is, with one interpolation.
SHORT_SIDE = 256 / 224
CROP_SCALES = (1, 0.875, 0.75, 0.66)  # of the short side, for training


def center_crop(video, size):
    """The test crop: the central 224 x 224 of a short side of 256. uint8 [T, 3, h, w] -> [T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = round(min(h, w) / SHORT_SIDE)
    return resized_crop(video, (h - side) // 2, (w - side) // 2, side, side, [size, size])


def three_crops(video, size):
    """Squares of the whole short side at one end, in the middle and at the other: [T, 3, h, w] -> [3, T, 3, S, S]."""
    h, w = video.shape[-2:]
    side = min(h, w)
    return torch.stack([resized_crop(video, (h - side) * i // 2, (w - side) * i // 2, side, side, [size, size])
                        for i in range(3)])


def random_crop(video, size, rng, flip=True):
    """The training crop, uint8 [T, 3, h, w] -> [T, 3, S, S], the same in all frames: width and height from CROP_SCALES,
    at most one step apart in that list, at a corner or the centre; with `flip` mirrored half of the time."""
    h, w = video.shape[-2:]
    pairs = [(a, b) for i, a in enumerate(CROP_SCALES) for j, b in enumerate(CROP_SCALES) if abs(i - j) <= 1]
    height, width = (round(min(h, w) * scale) for scale in pairs[rng.integers(len(pairs))])
    down, right = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)][rng.integers(5)]
    video = resized_crop(video, int((h - height) * down), int((w - width) * right), height, width, [size, size])
    return horizontal_flip(video) if flip and rng.uniform() < 0.5 else video


COLOR = v2.Compose([v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
                    v2.RandomGrayscale(p=0.2)])
GROUP = 4  # clips that are mixed with each other: those that a GPU took at once in the original code


def change_colors(video, seed, epoch, indices):
    """Colour jitter and grey, drawn once for each clip (epoch, index): uint8 [B, T, 3, S, S] to the same."""
    clips = []
    with torch.random.fork_rng(devices=[]):
        for clip, index in zip(video, indices):
            rng = np.random.default_rng([seed, epoch, index, 1])  # 1: not the numbers that frames and crop came from
            torch.manual_seed(int(rng.integers(2 ** 63)))
            clips.append(COLOR(clip))
    return torch.stack(clips)


def mix(video, target, seed, step, first=0):
    """Mixup or CutMix, each half of the time, in groups of four clips, each with its own coefficient and partners:

        mixup   x = λ x + (1 - λ) x[partner]        y = λ y + (1 - λ) y[partner]      λ from Beta(0.8, 0.8)
        CutMix  x[box] = x[partner][box]            the same, λ = 1 - area of the box          Beta(1, 1)

    Float video [B, T, 3, S, S] and target [B, C], the probabilities of the classes, to the same shapes; B is a multiple
    of GROUP. Group number g of the optimizer step is drawn by (seed, step, g); the first here is number `first`."""
    video, target = video.clone(), target.clone()
    for g, (x, y) in enumerate(zip(video.split(GROUP), target.split(GROUP)), first):  # views, changed in place
        rng = np.random.default_rng([seed, step, g, 2])  # 2: not the numbers of crops (none) or colours (1)
        partner, side = rng.permutation(GROUP).tolist(), x.shape[-1]
        if rng.uniform() < 0.5:
            share = rng.beta(0.8, 0.8)
            x[:] = x[partner].lerp_(x, share)
        else:
            half, center = math.sqrt(1 - rng.beta(1, 1)) / 2, rng.uniform(size=2)
            top, left = ((center - half).clip(0, 1) * side).astype(int).tolist()
            bottom, right = ((center + half).clip(0, 1) * side).astype(int).tolist()
            x[..., top:bottom, left:right] = x[partner][..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / side ** 2
        y[:] = share * y + (1 - share) * y[partner]
    return video, target


# ---- Videos and lists on disk ---------------------------------------------------------------------------------------

# What systems and tools leave between the videos
JUNK = re.compile(r"\.|~\$|.*:zone\.identifier$|(thumbs\.db|desktop\.ini|icon\r|@eadir|[#@$]recycle(\.bin)?|"
                  r"lost\+found|__macosx|__pycache__|system volume information)$", re.IGNORECASE)
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
OTHER_FILES = set("""
.txt .md .csv .tsv .json .jsonl .xml .yaml .yml .ini .cfg .toml .log .html .pdf .doc .docx .xls .xlsx .srt .vtt .ass .py
.sh .bat .ipynb .mat .npy .npz .pkl .pt .pth .h5 .zip .rar .tar .gz .tgz .7z .part .tmp .bak .crdownload .ytdl .torrent
.md5 .sha1 .sha256 .db .exe .mp3 .wav .flac .aac .m4a .ogg .opus .wma .tif .tiff .svg .ico .heic .heif .avif .jfif .jxl
.ppm .pgm .psd .dng .cr2 .nef .arw .raw .aae .xmp .lrf .lrv .thm
""".split())  # all the rest is tried as a video
ENDING = re.compile(r"(\.(avi|mp4|mkv|webm|mov|m4v|mpe?g|wmv|flv|3gp|3g2|m?ts|m2ts|gif|vob|asf|f4v|m1v|mjpeg|y4m))+$")


def match_key(name):
    """The name of a file or folder without what may differ on disk: its ending, capitals, Unicode form."""
    return ENDING.sub("", unicodedata.normalize("NFC", name).lower())


def walk(folder):
    """The videos at any depth below a folder, and the other files: two lists. A video is a file that is not known to be
    something else, or a folder of frames: one with images, and no other video in it or below."""
    videos, images, others = [], [], []
    try:
        entries = [entry for entry in os.scandir(folder) if not JUNK.match(entry.name)]
    except PermissionError:
        return [], [folder]
    for entry in sorted(entries, key=lambda entry: entry.name):
        path, ending = Path(entry), Path(entry).suffix.lower()
        if not entry.is_dir():
            (images if ending in IMAGE_FILES else others if ending in OTHER_FILES else videos).append(path)
        elif not entry.is_symlink() or path.resolve() not in map(Path.resolve, path.parents):  # no way back up
            more_videos, more_others = walk(path)
            videos, others = videos + more_videos, others + more_others
    return ([folder], others) if images and not videos else (videos, others + images)


def find_videos(path):
    """The videos below a folder (see `walk`), or a path that is a file. Raises UserError if there is none."""
    videos, others = ([path], []) if path.is_file() else walk(path)
    if others:
        say(f"{path}: passed over {len(others)} files that are no videos, such as {others[0].relative_to(path)}")
    if not videos:
        raise UserError(f"{path} contains no video")
    return videos


@functools.cache
def index_videos(root):
    """The videos below a folder by the match_key of their names: {key: list of paths}."""
    index = {}
    for path in walk(root)[0] if root.is_dir() else ():
        index.setdefault(match_key(path.name), []).append(path)
    return index


def find_listed(root, name, unique):
    """The path of a video listed as `name`, or None. If it is not there: the one of the same match_key in a folder of
    the same name or below; anywhere if names are `unique`; directly in `root` if there is no such folder."""
    path = root / name.replace("\\", "/")
    if path.exists():
        return path
    found, folder = index_videos(root).get(match_key(path.name), []), match_key(path.parent.name)
    ways = ([video for video in found if match_key(video.parent.name) == folder],
            [video for video in found if path.parent in video.parents],
            [video for video in found if unique or (video.parent == root and not path.parent.is_dir())])
    return next((videos[0] for videos in ways if videos and (unique or len(videos) == 1)), None)


def read_text(path):
    """The text of a file in UTF-8, with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8; save the file in that encoding") from error


def read_lines(path, pattern, form):
    """Yields the file and line, and the groups of `pattern`, of all lines but comments. Raises UserError for others."""
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), 1):
        match, where = re.fullmatch(pattern, line), f"{path}, line {number}: {line[:100]!r}"
        if match:
            yield where, match.groups()
        elif line and not re.match("# |.*(path|file|video).*label" if number == 1 else "# ", line, re.IGNORECASE):
            raise UserError(f"{where}: expected {form}")


def read_csv(path, **types):
    """Yields the file and line of each row of a CSV, and its values by heading and type. Raises UserError."""
    rows = csv.DictReader(read_text(path).splitlines(), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", [convert(row[name].strip()) for name, convert in types.items()]
    except (KeyError, AttributeError, ValueError, csv.Error) as error:  # AttributeError: a row is too short
        raise UserError(f"{path}, line {rows.line_num}: expected a CSV with the headings {','.join(types)}") from error


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


# ---- Data sets ------------------------------------------------------------------------------------------------------
# Each reader returns rows of (name of the video below `root`, label) and the class names, the same for both halves. Its
# docstring says what belongs in `root`, to those who lack it.

def words(name):
    """A class name in camel case, with underscores or hyphens, as CLIP reads it best: "FlipAnEgg" -> "flip an egg"."""
    return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_-]+", " ", unicodedata.normalize("NFC", name)).lower()


def ucf101(root, split, train):
    """UCF101 (Soomro et al., 2012): UCF-101/<Class>/*.avi and ucfTrainTestlist/*.txt. To fetch them (6.5 GB):
    mkdir -p {root} && cd {root}
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101.rar && unrar x UCF101.rar
    curl -LO https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip && unzip UCF101Tr*.zip"""
    lists, rows = root / "ucfTrainTestlist", []
    names = [name for _, (name,) in read_lines(lists / "classInd.txt", r"[0-9]+\s+(\S+)", "'number Class'")]
    label = {name.lower(): i for i, name in enumerate(names)}
    path = lists / f"{'train' if train else 'test'}list{split:02}.txt"
    for where, (clip, name) in read_lines(path, r"((\S+)/\S+)(?:\s+[0-9]+)?", "'Class/clip.avi', in training 'label'"):
        if name.lower() not in label:
            raise UserError(f"{where}: classInd.txt has no such class")
        rows.append((f"UCF-101/{clip}", label[name.lower()]))
    return rows, [words(name) for name in names]


def hmdb51(root, split, train):
    """HMDB51 (Kuehne et al., 2011): <class>/*.avi and testTrainMulti_7030_splits/<class>_test_split<1|2|3>.txt."""
    lists, end = root / "testTrainMulti_7030_splits", f"_test_split{split}.txt"
    names = sorted(name.removesuffix(end) for name in os.listdir(lists) if name.endswith(end) and not JUNK.match(name))
    rows = [(f"{name}/{clip}", label) for label, name in enumerate(names)
            for _, (clip, half) in read_lines(lists / f"{name}{end}", r"(.+?)\s+([012])", "'clip.avi' and 0, 1 or 2")
            if half == ("1" if train else "2")]
    return rows, [words(name) for name in names]


def kinetics(root, split, train):
    """Kinetics (Kay et al., 2017): train.csv, val.csv, and <id>_<start>_<end>.mp4 anywhere below train/ and val/."""
    names = "val.csv", "validate.csv", "validation.csv"
    paths = {True: root / "train.csv", False: root / next((name for name in names if (root / name).exists()), names[0])}
    halves = {half: [row for _, row in read_csv(path, label=str, youtube_id=str, time_start=float, time_end=float)]
              for half, path in paths.items() if half == train or path.exists()}
    names = sorted({name for rows in halves.values() for name, *_ in rows})  # those of both halves
    label, rows = {name: i for i, name in enumerate(names)}, []
    for name, video, start, end in halves[train]:
        start, end = start // 1, end // 1  # whole seconds
        ways = f"{video}_{start:06.0f}_{end:06.0f}", f"{video}_{start:.0f}_{end:.0f}", video
        clip = next((way for way in ways if match_key(way) in index_videos(root)), ways[0])
        rows.append((f"{'train' if train else 'val'}/{clip}", label[name]))
    return rows, names


def ssv2(root, split, train):
    """Something-Something v2: labels.json, train.json, validation.json and 20bn-something-something-v2/*.webm."""
    path = root / "labels.json"
    try:
        number = {name: int(i) for name, i in json.loads(read_text(path)).items()}
        names = sorted(number, key=number.get)
        label = {name: i for i, name in enumerate(names)}
        path = root / f"{'train' if train else 'validation'}.json"
        rows = [(f"20bn-something-something-v2/{row['id']}.webm", label[re.sub(r"[\[\]]", "", row["template"])])
                for row in json.loads(read_text(path))]  # "Holding [something]" is the class "holding something"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected {{name: number}} or rows of id and template; {error!r}") from error
    return rows, [name.lower() for name in names]


def folder(root, split, train):
    """Your own videos: train/<class>/* and val/<class>/*, as files or folders of their frames."""
    half = root / ("train" if train else "val")
    known = root / "train" if (root / "train").is_dir() else half  # to evaluate, val/ is enough
    classes = [path.name for path in sorted(known.iterdir()) if path.is_dir() and not JUNK.match(path.name)]
    label, rows = {match_key(name): i for i, name in enumerate(classes)}, []
    for video in find_videos(half):
        name = match_key(str(video.relative_to(half).parent).split(os.sep)[0])  # "." in no folder of a class
        if name not in label:
            raise UserError(f"{video} belongs in the folder of a class of {known}, frames in a folder below that")
        rows.append((str(video.relative_to(root)), label[name]))
    return rows, [words(name) for name in classes]


DATASETS = {"toy": ucf101, "ucf101": ucf101, "hmdb51": hmdb51, "k400": kinetics, "k600": kinetics, "ssv2": ssv2}


def read_list(path, labels):
    """A list of the original code, lines of "path label", and its class names, a CSV of id,name: rows and names."""
    names, rows = read_names(labels), []
    pattern, form = r'"?((?!# ).+?)"?[\s,;]+([0-9]+)(?:\.0*)?', "'path label', the label a number"
    for where, (name, number) in read_lines(path, pattern, form):
        if re.search(r"\.\w{2,4}[\s,;]+[0-9]+$", name):  # "file.avi 12 0": which number is the label?
            raise UserError(f"{where}: expected {form}")
        if int(number) not in names:
            raise UserError(f"{where}: {labels} has no class for the label {number}")
        rows.append((name, list(names).index(int(number))))
    return rows, list(names.values())


def read_dataset(name, root, split=1, train=False):
    """Rows and class names of one half of a data set: a name in DATASETS, or the folder of your own videos. Raises
    UserError, with what belongs in `root` and how to get it, if its lists are not there."""
    reader, what = DATASETS.get(name, folder), name if name in DATASETS else "the data set"
    if split > 1 and reader in (kinetics, ssv2, folder):
        raise UserError(f"--split {split}: {name} has no official splits")
    try:
        if name == "toy":
            toy.draw.draw(root)  # if it is not there yet
        return reader(root, split, train)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing, how = Path(error.filename).relative_to(root), "" if name == "toy" else reader.__doc__ or ""
        raise UserError(f"{what} is not in {root}: {missing} is missing. {how.replace('{root}', str(root))}") from error


def base_classes(rows, num_classes):
    """The labels of the base classes: the half with the most training rows; of equals, those of higher label."""
    counts = np.bincount([label for _, label in rows], minlength=num_classes)
    return sorted(counts.argsort(kind="stable")[num_classes // 2 :].tolist())  # rounded up, as in the original lists


def draw_shots(samples, shots, seed):
    """`shots` samples of each class, or all that there are: the same for the same list and seed."""
    order = np.random.default_rng(seed).permutation(len(samples))
    labels = np.array([samples[i][1] for i in order])
    drawn = np.concatenate([order[labels == label][:shots] for label in np.unique(labels)])
    return [samples[i] for i in sorted(drawn)]


def load_samples(args, train):
    """Reads --data or a list, applies --labels, --classes and --shots, and finds the videos on disk: a list of (path,
    label), and the class names. Raises UserError if two classes have one name, or no video is on disk."""
    default = toy.draw.CACHE if args.data == "toy" else f"datasets/{args.data}" if args.data in DATASETS else args.data
    root = Path(args.root or default or "").absolute()
    path, half = (args.train_list, "training") if train else (args.val_list, "validation")
    for file in filter(None, (path, args.labels)):
        if not os.path.isfile(file):
            raise UserError(f"{file}: there is no such file")
    rows, classes = read_list(path, args.labels) if path else read_dataset(args.data, root, args.split, train)
    names = list(read_names(args.labels).values()) if args.labels else classes
    if len(names) != len(classes):
        raise UserError(f"--labels {args.labels} has {len(names)} names, and {args.data} {len(classes)} classes")
    same = Counter(" ".join(name.lower().split()) for name in names)  # as the tokenizer sees them
    if len(same) < len(names):
        raise UserError(f"two classes have the same name, {same.most_common(1)[0][0]!r}: no model can tell them apart")
    if args.classes != "all":  # the training videos of split 1 decide, whichever are read
        base = base_classes(read_dataset(args.data, root, train=True)[0], len(names))
        kept = [label for label in range(len(names)) if (label in base) == (args.classes == "base")]
        position = {label: i for i, label in enumerate(kept)}
        rows = [(name, position[label]) for name, label in rows if label in position]
        names = [names[label] for label in kept]
    found = [(find_listed(root, name, unique=not path), root / name, label) for name, label in rows]
    missing = [listed for video, listed, _ in found if not video]
    if len(missing) == len(rows):
        raise UserError(f"no {half} video is on disk; looked for {missing[0]}" if rows else
                        f"{path or root} lists no videos")
    if missing:
        say(f"{len(missing)} of the {len(rows)} {half} videos are not on disk, such as {missing[0]}")
    # Many videos of Kinetics have vanished from the web: they are left out. Others count as unreadable.
    samples = [(video or listed, label) for video, listed, label in found if video or args.data not in ("k400", "k600")]
    return draw_shots(samples, args.shots, args.seed) if train and args.shots else samples, names


# ---- Loading --------------------------------------------------------------------------------------------------------

class VideoDataset(Dataset):
    """Clips by (epoch, index): a video uint8 [T, 3, S, S], its label, its index and the errors, "" if there were none.

    In training, frames and crop are random unless `augment` is "none", and an unreadable video is replaced by the next
    of the list. In evaluation an unreadable video is all zeros; the errors name each of them on its own line. `views` =
    (V, K) gives [V * K, T, 3, S, S]: V clips with interleaved frames, and of each K = 1 (centre) or 3 crops. Clips are
    not flipped if one of the `classes` tells left from right."""

    def __init__(self, samples, num_frames, image_size, train, seed=0, classes=(), augment="crop", views=(1, 1)):
        self.paths, self.labels = [str(path) for path, _ in samples], [label for _, label in samples]
        self.num_frames, self.image_size, self.train = num_frames, image_size, train
        self.seed, self.augment, self.views = seed, augment, views
        self.flip = not any(re.search(r"\b(left|right)\b", name) for name in classes)  # Something-Something has some

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        (epoch, first), (clips, crops), errors = key, self.views, []
        video = torch.zeros(clips * self.num_frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        for attempt in range(100 if self.train else 1):
            index = (first + attempt) % len(self)
            rng = np.random.default_rng([self.seed, epoch, index]) if self.train and self.augment != "none" else None
            try:
                video = read_video(self.paths[index], len(video), rng, round(self.image_size * SHORT_SIDE))
                break
            except UserError as error:
                errors.append(str(error))
        if rng:
            video = random_crop(video, self.image_size, rng, self.flip)
        else:
            # The frames are the middles of V * T segments. Clip v takes the segments v, v + V, v + 2 V and so on.
            video = center_crop(video, self.image_size)[None] if crops == 1 else three_crops(video, self.image_size)
            video = video.unflatten(1, (self.num_frames, clips)).transpose(1, 2).flatten(0, 1)  # [K * V, T, 3, S, S]
            video = video[0] if self.train else video
        return video, self.labels[index], index, "\n".join(errors)


def training_batches(length, batch_size, epochs, seed, rank=0, world=1, micro_batch=None):
    """The training order: yields lists of (epoch, index), the micro-batches of process `rank` of `world`. In each epoch
    the videos are shuffled and cut into whole batches, and each process gets an equal share of every batch."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(length)[: length // batch_size * batch_size]
        share = order.reshape(-1, world, batch_size // world)[:, rank]  # [batches, videos of each]
        for indices in share.reshape(-1, micro_batch or batch_size // world).tolist():
            yield [(epoch, index) for index in indices]


def make_loader(clips, batches, workers):
    """A DataLoader of batches of what a VideoDataset gives: videos uint8, labels and indices int64, errors strings."""
    return DataLoader(clips, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=workers > 0)


# ---- Command line, and a look at a data set -------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argparse parser whose help begins with the docstring of the script and whose errors are one line."""

    def __init__(self, doc, usage="python %(prog)s [flags]", **options):
        super().__init__(usage=usage, description=doc, allow_abbrev=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least(minimum, kind=int, maximum=math.inf):
    """A type for argparse: a finite number of `kind` from `minimum` to `maximum`."""
    def number(text):
        if not minimum <= kind(text) <= maximum or math.isinf(kind(text)):  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {minimum} to {maximum}")
        return kind(text)
    return number


def name_or_folder(text):
    """A type for argparse: a name in DATASETS or the absolute path of a folder."""
    if text not in DATASETS and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(DATASETS)}")
    return text if text in DATASETS else os.path.abspath(text)


def add_arguments(parser, name="--data", training=False):
    """Adds the flags about data: with `training` those of training videos, else several splits, lists and classes."""
    add = parser.add_argument_group("data").add_argument
    several = {} if training else dict(nargs="+")
    add(name, nargs=None if name.startswith("-") else "?", type=name_or_folder, metavar="DATA",
        help=f"{', '.join(DATASETS)}, or a folder of train/<class>/*, val/<class>/*; by default toy")
    add("--root", type=os.path.abspath, metavar="FOLDER", help="where DATA is, by default datasets/DATA")
    add("--split", type=int, choices=(1, 2, 3), default=1 if training else [1], help="split, 1 by default", **several)
    add("--classes", choices=("all", "base", "novel"), default="all" if training else ["all"], **several,
        help="base: the half with the most training videos; novel: the others (default: %(default)s)")
    add("--val-list", type=os.path.abspath, metavar="FILE", help="lines 'path label', in place of a split", **several)
    add("--labels", type=os.path.abspath if training else str, metavar="FILE", **several,
        help="names of the classes, a CSV of id,name: for lists, or in place of those of DATA")
    add("--frames", type=at_least(1), metavar="N", help="frames sampled from a video (default: %(default)s)")
    if training:
        add("--train-list", type=os.path.abspath, metavar="FILE", help="as --val-list, for training")
        add("--shots", type=at_least(1), metavar="N", help="use at most N training videos of each class")
        add("--augment", choices=("none", "crop", "color", "mix"), metavar="HOW",
            help="crop: random frames, crop, flip; color: also colours; mix: also mixup, CutMix (default: %(default)s)")
        add("--seed", type=at_least(0), metavar="N", default=1024, help="random seed (default: %(default)s)")


def check_lists(parser, args):
    lists = args.val_list, getattr(args, "train_list", args.val_list)  # evaluate.py has the first alone
    if any(lists) and not (all(lists) and args.labels and args.classes in ("all", ["all"])):
        parser.error("lists need --val-list, --labels and, in training, --train-list, and no --classes")


def rank():
    """The number of this process, one of torchrun's; 0 is the main one, which prints and writes."""
    return int(os.environ.get("RANK", 0))


def say(text=""):
    """Prints a line, in the main process only, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(str(text))


def run(main, *errors):
    """Runs `main`. A mistake of the user (UserError, and the types in `errors`), a missing file that the command line
    names, too little memory and Ctrl-C end in one line on stderr. A mistake in the code shows its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    except (UserError, *errors) as error:
        message = str(error)
    except OSError as error:
        if os.path.abspath(error.filename or "/") not in (os.path.abspath(part.split("=")[-1]) for part in sys.argv):
            raise
        message = f"{error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory; try fewer --frames, or a smaller --micro-batch, in evaluate.py --batch-size"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def picture_grid(rows, tile=128):
    """A picture of some rows, each a (title, frames uint8 [T, 3, S, S]), with frames of `tile` x `tile` pixels."""
    step, left = tile + 2, 210  # pixels from frame to frame, and for the titles
    sheet = Image.new("RGB", (left + step * max(len(frames) for _, frames in rows), step * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for y, (title, frames) in enumerate(rows):
        draw.text((8, y * step + tile // 2), textwrap.fill(title, 24), "black", font, anchor="lm")
        for x, frame in enumerate(frames):
            sheet.paste(to_pil_image(frame).resize((tile, tile)), (left + x * step, y * step))
    return sheet


def main():
    """Shows what is on disk: counts, missing and unreadable files, a contact sheet."""
    parser = Parser(__doc__, usage="python %(prog)s [DATA] [flags]")
    add_arguments(parser, "data", training=True)
    parser.set_defaults(frames=8, augment="crop")
    parser.add_argument("--check-all", action="store_true", help="read every video, not just a hundred")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the contact sheet to draw, by default DATA.png")
    args = parser.parse_args()
    check_lists(parser, args)
    args.data = args.data or (None if args.val_list else "toy")
    halves = {"training": load_samples(args, train=True), "validation": load_samples(args, train=False)}

    for half, (samples, names) in halves.items():
        sizes = np.bincount([label for _, label in samples], minlength=len(names))
        say(f"{half}:\n  {len(samples)} videos of {len(names)} classes, {names[0]} ... {names[-1]}: "
            f"{sizes.min()} to {sizes.max()} of each")
        clips = VideoDataset(samples, num_frames=1, image_size=8, train=False)
        keys = [(0, index) for index in range(0, len(samples), 1 if args.check_all else math.ceil(len(samples) / 100))]
        tried = thread_map(clips.__getitem__, keys, max_workers=os.cpu_count(), desc="read", leave=False, disable=None)
        errors = [error for _, _, _, error in tried if error]
        say(f"  {len(keys)} tried: {len(errors)} unreadable" + "".join(f"\n  unreadable {error}" for error in errors))

    samples, names = halves["training"]
    size, rows = 64 if args.data == "toy" else 224, []
    clips = VideoDataset(samples, args.frames, size, True, args.seed, names, args.augment)
    for index in np.linspace(0, len(clips) - 1, min(len(clips), 10)).astype(int).tolist():  # spread over the classes
        video, label, index, _ = clips[0, index]
        if args.augment in ("color", "mix"):
            video = change_colors(video[None], args.seed, 0, [index])[0]
        rows.append((names[label], video))
    out = args.out or Path(f"{Path(args.data or args.train_list).stem}.png")
    picture_grid(rows).save(out)
    say(f"{out} shows some training videos as a model sees them before they are mixed, with --augment {args.augment}")


if __name__ == "__main__":
    run(main)
