"""A miniature UCF101: 25 classes, five objects doing five things, drawn as real video files.

The folders, the file names, the split files and the codec are UCF101's own, so that whatever reads the one reads
the other:

    UCF-101/RedBallBouncing/v_RedBallBouncing_g01_c01.avi
    ucfTrainTestlist/{classInd,trainlist01,testlist01,...}.txt

As in UCF101, the clips of a group g## share a scene, and a split never has one group on both sides. The mean over time
is blind to the order of the frames, so each action is told by the *set* of frames that it shows: a sliding object is
seen at many places from left to right, a bouncing one at many heights, a growing one in many sizes, a blinking one is
there or not, a spinning one at many angles. One frame alone shows the object, and of the action next to nothing.
"""
import hashlib
import os
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm.contrib.concurrent import thread_map

OBJECTS = ("red ball", "blue cone", "green box", "yellow star", "purple moon")
ACTIONS = ("sliding", "bouncing", "growing", "blinking", "spinning")
WIDTH, HEIGHT = 80, 72  # pixels
FRAMES, RATE = 20, 10  # frames in a clip, frames per second
GROUPS, TEST_GROUPS = 14, 4  # split k tests on the k-th four groups and trains on the other ten

COLOURS = {"red": (214, 48, 40), "blue": (38, 84, 214), "green": (34, 150, 64), "yellow": (240, 200, 30),
           "purple": (140, 52, 176)}
MARK = (250, 250, 245)  # the light band on ball, cone and box: without it nobody would see a ball spin
# Drawn once, into a folder that git ignores; its name changes with this file, so that no older drawing is taken for it.
CACHE = Path(__file__).parent / f"videos-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"


def is_base(object_index, action_index):
    """True for 13 of the 25 classes, which get more clips than the rest and so become the base classes of the
    base-to-novel protocol. Every object and every action is in two or three of them: a novel class is a new
    combination of known parts."""
    return (object_index + 2 * action_index) % 5 < 2 or (object_index, action_index) in ((0, 1), (1, 3), (2, 0))


def shape(name, u, v):
    """Signed distances (inside < 0) to an object of radius 1 and to its mark; u points right, v down."""
    r = np.hypot(u, v)
    nowhere = np.ones_like(u)
    if name == "ball":
        return r - 0.9, np.abs(v) - 0.22
    if name == "cone":  # apex up
        return np.maximum(v - 0.75, (2 * np.abs(u) - v - 1) / 5 ** 0.5), np.abs(v - 0.2) - 0.18
    if name == "box":  # the mark is the lid
        return np.maximum(np.abs(u), np.abs(v)) - 0.75, np.abs(v + 0.55) - 0.15
    if name == "star":  # five points: the edge is a line in each of ten sectors
        sector = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2 * np.pi / 5
        return r * np.sin(sector + 0.35) / np.sin(0.35) * 0.34 - 0.34, nowhere
    return np.maximum(r - 0.95, 0.8 - np.hypot(u - 0.55, v)), nowhere  # moon: a disc less another


SHADES = {"pink": (1, -1, 0.4), "mint": (-1, 1, 0), "lilac": (0.3, -1, 1), "sand": (1, 0.6, -1), "sky": (-1, 0.2, 1),
          "grey": (0, 0, 0), "peach": (1, 0, -0.6), "lime": (0.2, 1, -1)}


def scene(rng):
    """A room: pale colours of wall and floor, the height where they meet, and a little light from one side."""
    def colour(brightness):
        tint = np.array(list(SHADES.values())[rng.integers(len(SHADES))])
        return brightness + 28 * tint + rng.uniform(-8, 8, 3)

    return {"wall": colour(rng.uniform(190, 215)), "floor": colour(rng.uniform(130, 170)),
            "horizon": rng.uniform(0.55, 0.85), "light": rng.uniform(-20, 20)}


def shade(colour):
    """The word in SHADES that comes nearest to a colour of `scene`."""
    tint = (colour - np.mean(colour)) / 28
    return min(SHADES, key=lambda name: np.sum((tint - np.array(SHADES[name]) + np.mean(SHADES[name])) ** 2))


def render(name, x, y, size, angle, visible, room):
    """Draws T frames of one object in one scene.

    x, y, size: float [T], in heights of the picture, x and y from its centre; angle: [T], radians; visible: bool [T].
    Returns uint8 [T, HEIGHT, WIDTH, 3].
    """
    colour, kind = name.split()
    across, down = np.meshgrid((np.arange(WIDTH) + 0.5 - WIDTH / 2) / HEIGHT, (np.arange(HEIGHT) + 0.5) / HEIGHT - 0.5)
    floor = (down > room["horizon"] - 0.5)[..., None]
    picture = np.where(floor, room["floor"], room["wall"]) + (room["light"] * across)[..., None]  # [HEIGHT, WIDTH, 3]
    x, y, size, angle, visible = (np.asarray(a, dtype=np.float32)[:, None, None] for a in (x, y, size, angle, visible))
    dx, dy = across.astype(np.float32) - x, down.astype(np.float32) - y  # [T, HEIGHT, WIDTH]
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / size
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / size
    body, mark = shape(kind, u, v)
    # A distance becomes the share of a pixel that is covered: smooth edges without drawing large and scaling down.
    cover, marked = (np.clip(0.5 - d * size * HEIGHT, 0, 1)[..., None] for d in (body, mark))
    paint = marked * np.array(MARK, np.float32) + (1 - marked) * np.array(COLOURS[colour], np.float32)
    cover = cover * visible[..., None]
    return (cover * paint + (1 - cover) * picture.astype(np.float32)).clip(0, 255).astype(np.uint8)


def motion(action, rng):
    """x, y, size, angle and visible [FRAMES] of one clip; everything that the action does not change stays put."""
    t = np.arange(FRAMES) / FRAMES + rng.uniform()  # one period, from anywhere in it
    wave = np.abs((t % 1) * 2 - 1)  # 1 -> 0 -> 1 at constant speed
    still = np.ones(FRAMES)
    x, y = rng.uniform(-0.12, 0.12) * still, rng.uniform(-0.12, 0.12) * still
    size, angle, visible = rng.uniform(0.15, 0.25) * still, rng.uniform(-0.3, 0.3) * still, still > 0
    if action == "sliding":
        x, y = (wave - 0.5) * rng.uniform(0.6, 0.75), y + 0.2  # along the floor
    elif action == "bouncing":
        y = 0.3 - rng.uniform(0.55, 0.7) * (1 - (2 * ((2 * t) % 1) - 1) ** 2)  # two parabolas
    elif action == "growing":
        size = 0.06 + 0.32 * (t % 1)
    elif action == "blinking":
        visible = (t * 3) % 1 < 0.5
    elif action == "spinning":
        angle = 2 * np.pi * t * rng.choice((-1, 1))
    return x, y, size, angle, visible


def camel_case(text):
    return "".join(word.capitalize() for word in text.split())


def write_clip(path, frames):
    """Writes uint8 [T, H, W, 3] as MPEG-4 part 2 in AVI, UCF101's codec; the same bytes every time."""
    with av.open(path, "w", options={"fflags": "bitexact"}) as container:  # no version of the muxer in the header
        stream = container.add_stream("mpeg4", rate=Fraction(RATE))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"flags": "bitexact+qscale", "global_quality": str(4 * 118)}  # a fixed quantiser: 4
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def draw_group(root, object_index, action_index, group, seed):
    """Draws the clips of one class in one scene, 4 for base classes, 3 for others: their paths below UCF-101."""
    name, action = OBJECTS[object_index], ACTIONS[action_index]
    label = camel_case(f"{name} {action}")
    folder = root / "UCF-101" / label
    folder.mkdir(parents=True, exist_ok=True)
    room = scene(np.random.default_rng([seed, object_index, action_index, group]))
    clips = []
    for number in range(1, 5 if is_base(object_index, action_index) else 4):
        rng = np.random.default_rng([seed, object_index, action_index, group, number])
        file = f"v_{label}_g{group:02}_c{number:02}.avi"
        write_clip(folder / file, render(name, *motion(action, rng), room))
        clips.append(f"{label}/{file}")
    return clips


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def draw(root, seed=0):
    """Draws the whole data set below `root` (a Path), unless it is there. The same bytes for the same seed.

    It is drawn beside its place and then renamed, so that a run that is killed leaves nothing half done, and of two
    runs that draw at once one wins.
    """
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{root.name}-unfinished-", dir=root.parent))
    unfinished.chmod(0o755)  # for the other users of a shared checkout too
    try:
        tasks = [(o, a, g) for o in range(len(OBJECTS)) for a in range(len(ACTIONS)) for g in range(1, GROUPS + 1)]
        drawn = thread_map(lambda task: draw_group(unfinished, *task, seed), tasks, max_workers=os.cpu_count(),
                           desc="drawing the toy", leave=False, disable=None)  # None: a bar on terminals only
        clips = sorted(clip for group in drawn for clip in group)
        names = sorted({clip.split("/")[0] for clip in clips})
        lists = unfinished / "ucfTrainTestlist"
        lists.mkdir()
        write_lines(lists / "classInd.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
        for split in (1, 2, 3):
            tested = [f"_g{g:02}_" for g in range((split - 1) * TEST_GROUPS + 1, split * TEST_GROUPS + 1)]
            test = [clip for clip in clips if any(group in clip for group in tested)]
            train = [f"{clip} {names.index(clip.split('/')[0]) + 1}" for clip in clips if clip not in test]
            write_lines(lists / f"trainlist{split:02}.txt", train)
            write_lines(lists / f"testlist{split:02}.txt", test)
        try:
            unfinished.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was faster: its files are the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
