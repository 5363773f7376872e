"""Every command of the README is run in its order, with small stand-ins for data sets and weights."""
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import PROJECT, numbered_frames, write_video

import data
import train

README = (PROJECT / "README.md").read_text()


def commands():
    """What the README has after "python", in blocks and between backticks, in order: lists of words."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"^    (?:pip install.*&& )?python (.*)$|`python ([^`]+)`", text, re.MULTILINE)
    return [shlex.split(block or inline, comments=True) for block, inline in found]


# What makes them short: the last of two flags counts.
SHORT = {
    "train.py": "--epochs 1 --warmup-epochs 0 --shots 1 --batch-size 2 --frames 1 --workers 0",
    "prompt.py": "--epochs 1 --warmup-epochs 0 --shots 1 --batch-size 2 --frames 1 --workers 0 --depth 2",
    "evaluate.py": "--frames 1 --workers 0",
    "data.py": "",
}


@pytest.fixture
def stand_ins(tmp_path, home, reference, monkeypatch):
    """A folder with four classes in the layout of each data set, and a small ViT-B/16 in the cache of a new home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(home / ".cache", tmp_path / ".cache")
    torch.save(reference.state_dict(), tmp_path / ".cache" / "clip" / "ViT-B-16.pt")
    clip = write_video(tmp_path / "new.mp4", numbered_frames(12, 48, 64), "mpeg4", "yuv420p")

    def put(path, text=None):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.symlink_to(clip)
        else:
            path.write_text(text)

    marks = "1.avi 1\n2.avi 1\n3.avi 2\n"  # 1: for training, 2: for testing
    names = ("Archery", "Bowling", "Drumming", "Fencing")
    for name in names:
        for i in (1, 2, 3):
            put(f"datasets/ucf101/UCF-101/{name}/v_{name}_g01_c{i}.avi")
            put(f"datasets/hmdb51/{name}/{i}.avi")
            put(f"datasets/k400/{'val' if i == 3 else 'train'}/{name.lower()}{i}_000000_000010.mp4")
            put(f"my/videos/{'val' if i == 3 else 'train'}/{name}/{i}.mp4")
    put("datasets/ucf101/ucfTrainTestlist/classInd.txt", "".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    for split in (1, 2, 3):
        for half, numbers in (("train", (1, 2)), ("test", (3,))):
            rows = [f"{name}/v_{name}_g01_c{i}.avi\n" for name in names for i in numbers]
            put(f"datasets/ucf101/ucfTrainTestlist/{half}list0{split}.txt", "".join(rows))
        for name in names:
            put(f"datasets/hmdb51/testTrainMulti_7030_splits/{name}_test_split{split}.txt", marks)
    for half, numbers in (("train", (1, 2)), ("val", (3,))):
        rows = [f"{name.lower()},{name.lower()}{i},0,10,{half}\n" for name in names for i in numbers]
        put(f"datasets/k400/{half}.csv", "label,youtube_id,time_start,time_end,split\n" + "".join(rows))
    data.read_once.cache_clear()  # it knows relative paths from another folder
    yield tmp_path
    data.read_once.cache_clear()


def test_the_commands_of_the_readme(stand_ins, call, monkeypatch):
    for name, value in (("epochs", 1), ("frames", 1)):  # of the bridge of the toy
        monkeypatch.setitem(train.TINY, name, value)
    scripts = [command for command in commands() if command[0] in SHORT]
    assert len(scripts) > 25
    assert {command[0] for command in scripts} == set(SHORT)
    for command in scripts:
        short = [] if "--resume" in command else shlex.split(SHORT[command[0]])
        arguments = re.sub(r"--gpus [2-9]", "--gpus 1", shlex.join(command))  # which runs on the CPU with a warning
        status, _, errors = call(*shlex.split(arguments), *short)
        assert (status, errors) == (0, ""), shlex.join(command)
    for path in ("runs/toy/best.pt", "runs/prompts/bridge-and-prompt/best.pt", "toy.png", "ucf101.png",
                 "results/results.json", "results/confusion.png", "blend.png", "runs/k400-full/curves.png"):
        assert (stand_ins / path).exists(), path
    code = textwrap.dedent(re.search(r"^    import clip, data.*?(?=\n\n[^ ])", README, re.MULTILINE | re.DOTALL)[0])
    exec(code, {})


def test_the_other_commands_are_the_benchmark_and_the_tests(home):
    """A section of the benchmark stands for all of it; the tests are running."""
    others = [command for command in commands() if command[0] not in SHORT]
    assert {tuple(command) for command in others} == {
        ("-m", "pytest"), ("tests/benchmark.py",), ("tests/benchmark.py", "cuda")}
    process = subprocess.run([sys.executable, PROJECT / "tests" / "benchmark.py", "loader", "cuda"], text=True,
                             stdout=subprocess.PIPE, timeout=300, check=True)
    assert re.search(r"two workers \| one .* ms .* ms .* x", process.stdout)
    assert "no GPU here" in process.stdout or "TFLOP/s" in process.stdout


def test_files_and_addresses_of_the_readme_are_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = [link for link in links if not link.startswith("https://")]
    assert {"clip.py", "data.py", "evaluate.py", "train.py", "prompt.py", "toy/toy.png"} <= set(files)
    assert all((PROJECT / file).exists() for file in files)
