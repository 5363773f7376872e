"""Every command of the README is run in its order, with small stand-ins for data sets and weights."""
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import open_clip
import pytest
import torch
from conftest import PROJECT, distance, numbered_frames, read_log, write_video

import clip
import toy.draw

README = (PROJECT / "README.md").read_text()


def commands():
    """What the README has after "python", in blocks and between backticks, in order: lists of words."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"^    (?:pip install.*&& )?python (.*)$|`python ([^`]+)`", text, re.MULTILINE)
    return [shlex.split(block or inline, comments=True) for block, inline in found]


# What makes them short: the last of two flags counts.
SHORT = {
    "train.py": "--epochs 1 --warmup-epochs 0 --shots 2 --batch-size 4 --frames 1 --workers 0",
    "prompt.py": "--epochs 1 --warmup-epochs 0 --shots 2 --batch-size 4 --frames 1 --workers 0 --depth 2 2",
    "evaluate.py": "--frames 1 --workers 0",
    "data.py": "",
}


@pytest.fixture
def stand_ins(tmp_path, home, reference, monkeypatch):
    """A folder with four classes in the layout of each data set, a toy with one of four groups, and a small ViT-B/16 in
    the cache of a new home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(home / ".cache", tmp_path / ".cache")
    torch.save(reference.state_dict(), tmp_path / ".cache" / "clip" / "ViT-B-16.pt")
    video = write_video(tmp_path / "new.mp4", numbered_frames(12, 48, 64), "mpeg4", "yuv420p")

    def put(path, text=None, link=video):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.symlink_to(link)
        else:
            path.write_text(text)

    toy.draw.draw(toy.draw.CACHE)
    put("toy/UCF-101", link=toy.draw.CACHE / "UCF-101")
    for path in (toy.draw.CACHE / "ucfTrainTestlist").iterdir():
        put(f"toy/ucfTrainTestlist/{path.name}", re.sub(r".*_g(?!01|05|09).*\n", "", path.read_text()))
    monkeypatch.setattr(toy.draw, "CACHE", tmp_path / "toy")
    marks = "1.avi 1\n2.avi 1\n3.avi 2\n"  # 1: for training, 2: for testing
    names = ("Archery", "Bowling", "Drumming", "Fencing")
    for name in names:
        for i in (1, 2, 3):
            put(f"datasets/ucf101/UCF-101/{name}/v_{name}_g01_c{i}.avi")
            put(f"datasets/hmdb51/{name}/{i}.avi")
            for kinetics in ("k400", "k600"):
                put(f"datasets/{kinetics}/{'val' if i == 3 else 'train'}/{name.lower()}{i}_000000_000010.mp4")
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
        put(f"lists/{half}.txt", "".join(f"{name}/{i}.avi {k}\n" for k, name in enumerate(names) for i in numbers))
    rows = [f"val/{name.lower()}3_000000_000010.mp4 {i}\n" for i, name in enumerate(names)]
    for letter in "abc":
        put(f"lists/{letter}.txt", "".join(rows))
        put(f"lists/{letter}.csv", "id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    put("lists/labels.csv", "id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    return tmp_path


def test_the_commands_of_the_readme(stand_ins, call):
    scripts = [command for command in commands() if command[0] in SHORT and command[-1] not in ("NAME", "FILE", "...")]
    assert len(scripts) > 25
    assert {command[0] for command in scripts} == set(SHORT)
    for command in scripts:
        short = [] if "--resume" in command else shlex.split(SHORT[command[0]])
        arguments = re.sub(r"--gpus [2-9]", "--gpus 1", shlex.join(command))  # which runs on the CPU with a warning
        status, _, errors = call(*shlex.split(arguments), *short)
        assert (status, errors) == (0, ""), shlex.join(command)
    for path in ("runs/toy/best.pt", "toy.png", "ucf101.png", "results/results.json", "results/embeddings.png",
                 "runs/k400-full/curves.png"):
        assert (stand_ins / path).exists(), path
    assert len(list((stand_ins / "results").glob("attention-*.png"))) == 3


def snippet(first):
    """The Python in the README that begins with that line."""
    return textwrap.dedent(re.search(rf"^    {re.escape(first)}.*?(?=\n\n[^ ])", README, re.MULTILINE | re.DOTALL)[0])


def test_the_python_of_the_readme(stand_ins, capsys):
    exec(snippet("import clip, data, evaluate, torch"), {})
    answer, *parts, cosines = capsys.readouterr().out.splitlines()
    assert "red ball bouncing" in answer
    assert len(parts) == 36
    assert re.fullmatch(r"tensor\(\[ *-?0\.[0-9]+, +-?0\.[0-9]+\]\)", cosines)


def test_the_table_of_runs_of_the_readme(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in ("1", "2"):
        run("train.py", "--classes", "novel", "--shots", "1", "--frames", "1", "--batch-size", "4", "--epochs", "2",
            "--warmup-epochs", "0", "--workers", "0", "--seed", seed)
    (tmp_path / "runs" / "toy" / "best.pt").unlink()
    exec(snippet("import json, pathlib"), {})
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading == "run, weights, epochs, lr, augment, seed; top-1 before, best, last"
    for row, name, seed in zip(rows, ("toy", "toy-2"), (1, 2), strict=True):
        _, (before, *epochs) = read_log(tmp_path / "runs" / name)
        before, *top1 = [round(result["top1"], 1) for result in (before, *epochs)]
        assert row == f"{name} None 2 0.0008 crop {seed} [{before}] {max(top1)} [{top1[-1]}]"


def test_weights_go_on_in_other_libraries(stand_ins, monkeypatch):
    """By the lines of the README: the embeddings are the same."""
    torch.manual_seed(0)
    ours = clip.CLIP(512, 224, 16, 768, 12, 77, 49408, 512, 12).eval()
    for function in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):  # not theirs
        monkeypatch.setattr(torch.nn.init, function, lambda tensor, *args, **kwargs: tensor)
    (stand_ins / "runs" / "ucf101").mkdir(parents=True)
    torch.save({"model": ours.state_dict()}, "runs/ucf101/best.pt")
    found = {}
    exec(snippet("import clip, open_clip, torch, transformers"), found)
    images, tokens = torch.randn(2, 3, 224, 224), open_clip.get_tokenizer("ViT-B-16")(["archery", "a dog."])
    with torch.no_grad():
        image, text = ours.encode_image(images), ours.encode_text(tokens)
        theirs = found["in_open_clip"].eval()
        assert distance(theirs.encode_image(images), image) < 1e-5
        assert distance(theirs.encode_text(tokens), text) < 1e-5
        output = found["in_transformers"].eval()(input_ids=tokens, pixel_values=images)
        logits = ours.logits(image, text)
        assert distance(output.logits_per_image, logits) < 1e-4


def test_the_other_commands_are_the_benchmark_and_tests(home):
    """A section of the benchmark stands for all of it. Tests that are named are there; they are running."""
    others = [command for command in commands() if command[0] not in SHORT]
    tests = [command for command in others if command[:2] == ["-m", "pytest"]]
    for _, _, *selection in tests:
        if selection:
            file, *words = selection  # and perhaps: -k "word or word"
            text = (PROJECT / file).read_text(encoding="utf-8")
            for word in "".join(words[1:]).split(" or "):
                assert re.search(rf"def test_\w*{word}", text), selection
    debugger = ["-m", "pdb", "-c", "continue", "train.py", "--workers", "0"]
    assert [command for command in others if command not in tests] == [debugger, ["tests/benchmark.py"]]
    process = subprocess.run([sys.executable, PROJECT / "tests" / "benchmark.py", "augment", "cuda"], text=True,
                             stdout=subprocess.PIPE, timeout=300, check=True)
    assert re.search(r"colours, once for each clip \| .* ms .* ms .* x", process.stdout)
    assert "no GPU here" in process.stdout or "TFLOP/s" in process.stdout


def test_files_and_addresses_of_the_readme_are_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = [link for link in links if not link.startswith("https://")]
    assert {"clip.py", "data.py", "evaluate.py", "train.py", "prompt.py", "toy/method.svg"} <= set(files)
    assert all((PROJECT / file).exists() for file in files)
