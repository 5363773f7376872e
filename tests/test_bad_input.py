"""Bad input, one test for each kind: it is told in one line that says what is wrong and what to do, or it is survived.

Exit status 2 is for a wrong call, 1 for a failed run. Runs that are killed are in test_train.py, broken downloads in
test_weights.py and files that are hard to decode in test_video.py.
"""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, numbered_frames, read_results, script, write_video

import clip
import data
import train


def only_line(name, errors):
    """The message of the only line of `errors`."""
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith(f"{name}: error: ")
    return line.removeprefix(f"{name}: error: ")


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["train.py", "--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
    (["train.py", "--epochs", "0"], 2, "--epochs: 0 is not in the range from 1 to inf"),
    (["train.py", "--lr", "fast"], 2, "--lr: invalid number value: 'fast'"),
    (["train.py", "--lr", "nan"], 2, "--lr: nan is not in the range from 0 to inf"),
    (["train.py", "--lr", "inf"], 2, "--lr: inf is not in the range from 0 to inf"),
    (["train.py", "--data", "nosuch"], 2, "--data: 'nosuch' is not on disk, and not one of toy, ucf101,"),
    (["train.py", "--template", "a photo", "--frames", "1", "--out", "{}"], 1, "the template 'a photo' has no {} for"),
    (["evaluate.py", "--template", "a photo"], 1, "the template 'a photo' has no {} for the class name"),
    (["train.py", "--gpus", "64"], 2, "--gpus 64: this machine has"),
    (["train.py", "--augment", "mix", "--batch-size", "6"], 2, "--augment mix takes clips in groups of 4, not 6 clips"),
    (["train.py", "--batch-size", "5000"], 1, "880 training videos are fewer than --batch-size 5000"),
    (["train.py", "--resume", "nowhere"], 2, "--resume: nowhere/last.pt is not there, so there is nothing to continue"),
    (["train.py", "--root", "LICENSE"], 1, f"not in {PROJECT}/LICENSE: ucfTrainTestlist/classInd.txt is missing"),
    (["train.py", "--out", "LICENSE/run"], 1, "cannot write LICENSE/run: Not a directory"),
    (["evaluate.py", "--out", "LICENSE/run"], 1, "cannot write LICENSE/run: Not a directory"),
    (["train.py", "--data", "tests", "--split", "2"], 1, f"--split 2: {PROJECT}/tests has no official splits"),
    (["train.py", "--val-list", "a.txt"], 2, "give both --train-list and --val-list"),
    (["train.py", "--val-list", "x", "--labels", "y"], 2, "give both --train-list and --val-list"),
    (["train.py", "--train-list", "x"], 2, "give both --train-list and --val-list"),
    (["train.py", "--weights", "nosuch.pt"], 2, "--weights: 'nosuch.pt' is not on disk, and not one of ViT-B/32,"),
    (["data.py", "--out", "no/where.png"], 1, "cannot write no/where.png: No such file or directory"),
    (["evaluate.py", "--frames", f"{10 ** 12}", "--workers", "0"], 1, "out of memory; try fewer --frames"),
    (["evaluate.py", "--split", "4"], 2, "--split: invalid choice"),
    (["evaluate.py", "--views", "4x2"], 2, "--views: '4x2' is not a number of clips x 1 or 3 crops"),
    (["evaluate.py", "--val-list", "LICENSE"], 1, "LICENSE, line 1: 'MIT License': expected two columns sep"),
    (["evaluate.py", "--val-list", "x", "--labels", "y", "--classes", "base"], 2, "--classes cannot be combined with"),
    (["evaluate.py", "--val-list", "x", "--labels", "y", "--split", "2"], 2, "--split cannot be combined with"),
    (["evaluate.py", "--val-list", "x", "--labels", "y", "z"], 2, "--labels: give one file, or one for each of the"),
    (["evaluate.py", "--zero-shot", "--weights", "tiny"], 2, "--zero-shot evaluates plain CLIP: give --model, not"),
    (["evaluate.py", "--weights", "LICENSE"], 1, "LICENSE is damaged or not a file of weights"),
    (["evaluate.py", "--blend", "0.5"], 2, "--blend needs --weights"),
    (["evaluate.py", "--blend", "2", "--weights", "tiny"], 2, "--blend: 2 is not in the range from 0 to 1"),
    (["evaluate.py", "--video", "x.mp4"], 2, "--video needs --labels"),
    (["evaluate.py", "--video", "x", "--labels", "a", "--model", "tiny"], 1, "x: there is no such file"),
    (["evaluate.py", "--video", "{empty}", "--labels", "a", "--model", "tiny"], 1, "empty contains no video"),
    (["evaluate.py", "--video", "x.mp4", "--labels", "a", "--embeddings", "--out", "x"], 2, "--video cannot be"),
    (["prompt.py", "--ctx", "0", "0"], 2, "nothing to train: --ctx 0 0"),
    (["prompt.py", "--ctx", "1", "70", "--frames", "1", "--out", "{}"], 1, "tokens; the model reads 7: "),
    (["prompt.py", "--depth", "9", "3", "--frames", "1", "--out", "{}"], 1, "--depth [9, 3]: the encoders have [3, 3]"),
])
def test_a_wrong_call(arguments, status, message, call, monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    (tmp_path / "empty").mkdir()
    folders = {"{}": tmp_path / "run", "{empty}": tmp_path / "empty"}
    found, _, errors = call(*(folders.get(argument, argument) for argument in arguments))
    assert found == status
    assert message in only_line(arguments[0], errors)


@pytest.mark.parametrize(("arguments", "status"), [(["train.py", "--lr", "x"], 2), (["data.py", "tests"], 1)])
def test_errors_go_to_stderr_with_their_status(arguments, status, home):
    process = script(*arguments, home=home, check=False)
    assert (process.returncode, process.stdout) == (status, "")
    only_line(arguments[0], process.stderr)


@pytest.mark.parametrize(("file", "line", "mistake", "message"), [
    ("clip.py", "q, k, v = self.project(x)", "q, k = self.project(x)", "ValueError: too many values to unpack"),
    ("data.py", "(listed, label[name])", "(listed, label[name.upper()])", "KeyError: 'BLUE CONE BLINKING'"),
    ("data.py", "center_crop(video, self.image_size)[None]", "center_crop(video, 2.5)[None]", "TypeError"),
])
def test_a_mistake_in_the_code_shows_where_it_is(file, line, mistake, message, home, tmp_path):
    for name in ("clip.py", "data.py", "evaluate.py", "toy"):
        copy = shutil.copytree if name == "toy" else shutil.copy
        copy(PROJECT / name, tmp_path / name)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(line) == 1
    (tmp_path / file).write_text(text.replace(line, mistake), encoding="utf-8")
    number = text[: text.index(line)].count("\n") + 1
    command = [sys.executable, "evaluate.py", "--workers", "1", "--frames", "1"]
    process = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                             env={**os.environ, "HOME": str(home)})
    assert process.returncode == 1
    assert f'{file}", line {number}, in ' in process.stderr
    assert message in process.stderr


@pytest.mark.parametrize(("name", "missing", "how"), [
    ("ucf101", "ucfTrainTestlist/classInd.txt", "unrar x UCF101.rar"),
    ("hmdb51", "testTrainMulti_7030_splits", "unrar x hmdb51_org.rar"),
    ("k400", "train.csv", "curl -O https://s3.amazonaws.com/kinetics/400/annotations/$half.csv"),
    ("k600", "train.csv", "https://github.com/cvdfoundation/kinetics-dataset"),
    ("ssv2", "labels.json", "Register"),
    (".", "train", "train/<class>/* and val/<class>/*"),
])
def test_the_data_set_is_not_there(name, missing, how, call, monkeypatch, tmp_path):
    """The one error of several lines, where there are commands to be copied. It names the folder in them."""
    monkeypatch.chdir(tmp_path)
    status, _, errors = call("data.py", name)
    folder = tmp_path if name == "." else tmp_path / "datasets" / name
    assert status == 1
    assert f"the data set is not in {folder}: {missing} is missing. " in errors
    assert how in errors
    assert len(errors.splitlines()) == {"ucf101": 4, "hmdb51": 4, "k400": 6, "k600": 6, "ssv2": 3, ".": 1}[name]
    assert name == "." or f"cd {folder}" in errors


def test_no_gpu(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    status, out, errors = call("train.py", "--data", "ucf101", "--gpus", "2")
    assert (status, out) == (2, "")
    assert only_line("train.py", errors).startswith("--gpus 2: this machine has 0")
    status, out, errors = call("train.py", "--data", "ucf101", "--gpus", "1")
    assert (status, out) == (1, "warning: --gpus 1, but there is no GPU here: running on the CPU\n")
    assert "the data set is not in " in errors


def test_a_batch_is_not_a_multiple_of_the_processes(call, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    status, _, errors = call("train.py", "--gpus", "2", "--amp", "off", "--batch-size", "5")
    assert status == 2
    assert only_line("train.py", errors).startswith("--batch-size 5 must be a multiple of the 2 processes")


def test_no_weights_and_no_network(call, monkeypatch, home):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    status, _, errors = call("evaluate.py", "--model", "ViT-B/16")
    message = only_line("evaluate.py", errors)
    assert status == 1
    assert message.startswith("cannot download ViT-B-16.pt: ")
    assert all(part in message for part in (clip.MODELS["ViT-B/16"], clip.VOCABULARY, str(home / ".cache" / "clip")))


@pytest.fixture
def toy_copy(tmp_path):
    """A copy of the toy that can be damaged, as arguments of a script."""
    samples, _ = data.load_samples("toy")
    shutil.copytree(samples[0][0].parents[2], tmp_path / "toy")
    return "--data", "ucf101", "--root", tmp_path / "toy", "--model", "tiny", "--frames", "1"


def test_a_few_videos_cannot_be_read(toy_copy, run, tmp_path):
    """Training takes others in their place and lists them; evaluation counts them as wrong."""
    damage = (lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_text("no video"),
              lambda path: path.write_bytes(path.read_bytes()[:500]), lambda path: (path.unlink(), path.mkdir()))
    broken = {}
    for training in (True, False):
        samples, _ = data.load_samples("ucf101", tmp_path / "toy", train=training, classes="novel")
        broken[training] = [path for path, _ in samples[: 25 * len(damage) : 25]]
        for spoil, path in zip(damage, broken[training]):
            spoil(path)
    novel = (*toy_copy, "--classes", "novel")
    out = run("train.py", *novel, "--epochs", "1", "--out", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = {error for record in records for error in record.get("unreadable", [])}
    replaced = re.findall("^unreadable, replaced by another video: (.*)$", out, re.MULTILINE)
    wrong = re.findall("^unreadable, counted as wrong: (.*)$", out, re.MULTILINE)
    listed = {*replaced, *wrong}
    assert listed == logged
    assert len(listed) == len(replaced) + len(wrong)  # each once
    names = {error.split(": ")[0] for error in listed}
    assert {str(path) for path in broken[False]} <= names <= {str(path) for path in broken[True] + broken[False]}
    assert len(names) >= 8  # an epoch leaves out up to a batch of videos
    run("evaluate.py", *novel, "--out", tmp_path / "zero-shot")
    results = read_results(tmp_path / "zero-shot")
    assert results["count"] == 144
    assert {error.split(": ")[0] for error in results["unreadable"]} == {str(path) for path in broken[False]}


def test_no_video_can_be_read(toy_copy, call, tmp_path):
    for path, _ in data.load_samples("ucf101", tmp_path / "toy", train=True)[0]:
        path.write_bytes(b"")
    status, _, errors = call("train.py", *toy_copy, "--workers", "0", "--out", tmp_path / "run")
    assert status == 1
    assert "over 5% of the videos cannot be read, such as " in only_line("train.py", errors)
    for path, _ in data.load_samples("ucf101", tmp_path / "toy")[0]:
        path.write_bytes(b"")
    status, out, errors = call("train.py", *toy_copy, "--workers", "0", "--out", tmp_path / "second")
    assert (status, "parameters to train" in out) == (1, False)  # at the first validation
    assert "over 5% of the videos cannot be read, such as " in only_line("train.py", errors)
    status, _, errors = call("evaluate.py", *toy_copy, "--workers", "0", "--out", tmp_path)
    results = read_results(tmp_path)
    assert (status, errors) == (0, "")
    assert (results["top1"], results["count"], len(results["unreadable"])) == (0, 352, 352)
    shutil.rmtree(tmp_path / "toy" / "UCF-101")
    for name in ("train.py", "evaluate.py", "data.py"):
        status, _, errors = call(name, *(("ucf101", "--root", tmp_path / "toy") if name == "data.py" else toy_copy))
        assert status == 1
        assert re.search(r"no (training|validation) video is on disk \(see --root\); looked for .*/v_.*avi",
                         only_line(name, errors))


def test_videos_of_unusual_kinds_are_read(run, tmp_path):
    """What is in them is compared in test_video.py."""
    kinds = {"short.mkv": dict(frames=numbered_frames(3)), "one.mkv": dict(frames=numbered_frames(1)),
             "odd.mkv": dict(frames=numbered_frames(40, 25, 33)),
             "grey.mkv": dict(frames=numbered_frames(40), pix_fmt="gray"),
             "ten.mp4": dict(frames=numbered_frames(40), codec="libx264", pix_fmt="yuv420p10le"),
             "alpha.mkv": dict(frames=numbered_frames(40), pix_fmt="bgra"),
             "turned.mp4": dict(frames=numbered_frames(40), codec="libx264", pix_fmt="yuv420p", rotation=90),
             "endless.h264": dict(frames=numbered_frames(40), codec="libx264", pix_fmt="yuv420p", format="h264")}
    for half in ("train", "val"):
        (tmp_path / half / "a class").mkdir(parents=True)
        for name, options in kinds.items():
            write_video(tmp_path / half / "a class" / f"{name}.mkv", **options)
    out = run("data.py", tmp_path, "--out", tmp_path / "sheet.png")
    assert out.count("8 tried: 0 unreadable") == 2


def test_the_loss_is_not_finite(call, tmp_path):
    few = ("--shots", "2", "--frames", "1", "--workers", "0", "--out", tmp_path / "run")
    status, _, errors = call("train.py", "--lr", "1e30", "--warmup-epochs", "0", "--epochs", "3", *few)
    message = only_line("train.py", errors)
    assert status == 1
    assert "the loss is nan and its gradient nan at step 2; try a lower --lr or --amp off" in message
    assert all(value.isfinite().all() for value in clip.load(tmp_path / "run" / "last.pt").state_dict().values())


FEW = ("--classes", "novel", "--shots", "2", "--frames", "1", "--epochs", "2", "--batch-size", "16", "--workers", "0")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *FEW, "--out", str(folder)])
        train.main()
    return folder


@pytest.fixture
def finished(short_run, tmp_path):
    """The folder of a short run: a copy."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


def test_the_disk_is_full_while_saving(finished, call, run):
    """No file may grow over 4 MB, as on a full disk: the model alone is larger. The next call goes on."""
    before = torch.load(finished / "last.pt", weights_only=True)
    before["step"] = 1  # as if the run had been stopped there
    before["losses"].pop(), before["validations"].pop()
    torch.save(before, finished / "last.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        status, _, errors = call("train.py", "--resume", finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    message = only_line("train.py", errors)
    assert re.match(f"cannot write {finished}/(best|last).pt; is the disk full", message)
    assert torch.load(finished / "last.pt", weights_only=True)["step"] == 1
    assert not list(finished.glob("unfinished-*"))
    clip.load(finished / "best.pt")
    run("train.py", "--resume", finished)
    assert torch.load(finished / "last.pt", weights_only=True)["step"] == 2


def test_a_run_and_its_options_disagree(finished, call):
    status, _, errors = call("prompt.py", "--resume", finished)
    message = f"{finished} is not a run of prompt.py but of train.py"
    assert (status, message in only_line("prompt.py", errors)) == (2, True)
    for flag, saved, given in (("--lr", "0.0008", "1.0"), ("--frames", "1", "4"), ("--seed", "1024", "7")):
        status, _, errors = call("train.py", "--resume", finished, flag, given)
        assert status == 2
        assert f"--resume cannot change {flag}: {finished} has {saved}, not {given}" in only_line("train.py", errors)
    status, _, errors = call("train.py", "--out", finished)
    assert status == 2
    assert f"--out {finished} holds a run: choose another folder, or" in only_line("train.py", errors)
    content = torch.load(finished / "last.pt", weights_only=True)
    torch.save(content | {"classes": content["classes"][1:]}, finished / "last.pt")
    status, _, errors = call("train.py", "--resume", finished, "--micro-batch", "4", "--workers", "1")  # these may
    assert status == 1
    assert "was trained on other data: 24 videos of 11 classes, not these 24 of 12" in only_line("train.py", errors)


@pytest.mark.parametrize(("flag", "message"), [
    ("--out", "holds a run: choose another folder, or --resume it if it has last.pt"),
    ("--resume", "last.pt is not there, so there is nothing to continue")])
def test_a_folder_whose_last_checkpoint_is_lost_stays_as_it_is(flag, message, call, tmp_path):
    contents = {"best.pt": "weights", "log.jsonl": "records", "args.json": "settings"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    status, _, errors = call("train.py", *FEW, flag, tmp_path)
    assert status == 2
    assert message in only_line("train.py", errors)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


def test_a_last_checkpoint_is_not_one_of_a_run(call, tmp_path):
    for content in (b"no weights", Path(clip.MODELS["tiny"]).read_bytes()):
        (tmp_path / "last.pt").write_bytes(content)
        status, _, errors = call("train.py", "--resume", tmp_path)
        assert status in (1, 2)
        assert str(tmp_path) in only_line("train.py", errors)


def test_weights_of_two_kinds_cannot_be_blended(reference, call, home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(home / ".cache", tmp_path / ".cache")
    torch.save(reference.state_dict(), tmp_path / ".cache" / "clip" / "ViT-B-16.pt")
    status, _, errors = call("evaluate.py", "--weights", "tiny", "--model", "ViT-B/16", "--blend", "0.5")
    assert status == 1
    assert "--blend: text_projection is not in both models in the same shape" in only_line("evaluate.py", errors)


def test_a_refused_resume_leaves_the_run_as_it_was(finished, call):
    content = torch.load(finished / "last.pt", weights_only=True)
    torch.save(content | {"videos": 25}, finished / "last.pt")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for arguments, expected in ((["--data", PROJECT / "nothing"], 2), (["--workers", "1"], 1)):  # this needs the data
        status, _, errors = call("train.py", "--resume", finished, *arguments)
        assert status == expected
        only_line("train.py", errors)
        assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("values", [("3", "4"), ("", ""), ("0", "1")])
def test_variables_of_a_cluster_mean_nothing_without_torchrun(values, run, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("RANK", values[0])
    monkeypatch.setenv("LOCAL_RANK", values[0])
    monkeypatch.setenv("WORLD_SIZE", values[1])
    [(video, _), *_], _ = data.load_samples("toy")
    out = run("evaluate.py", "--video", video, "--labels", "red ball,blue cone", "--model", "tiny", "--frames", "1",
              "--workers", "0")
    assert "red ball" in out
    assert "blue cone" in out


@pytest.mark.parametrize("arguments", [
    ("train.py", *FEW), ("evaluate.py", "--classes", "novel", "--frames", "1", "--workers", "0")])
def test_a_folder_that_cannot_be_made_is_named(arguments, call, tmp_path):
    """As root may write anywhere, a file stands where the folder would be."""
    (tmp_path / "file").touch()
    status, _, errors = call(*arguments, "--out", tmp_path / "file" / "out")
    assert status == 1
    assert only_line(arguments[0], errors).startswith(f"cannot write {tmp_path / 'file' / 'out'}: ")


@pytest.mark.parametrize(("script", "file"), [
    ("train.py", "args.json"), ("train.py", "best.pt"), ("train.py", "last.pt"), ("train.py", "curves.png"),
    ("evaluate.py", "results.json"), ("evaluate.py", "predictions.csv"), ("evaluate.py", "embeddings.npz"),
    ("evaluate.py", "embeddings.png"), ("evaluate.py", "attention-1-*.png"), ("data.py", "picture.png")])
def test_the_disk_is_full_for_any_file(script, file, call, tmp_path):
    """Writing to /dev/full is writing to a full disk. Each file is first written under another name beside it."""
    videos, _ = data.load_samples("toy", classes="novel")
    file = file.replace("*", videos[0][0].stem)
    (tmp_path / f"unfinished-{file}").symlink_to("/dev/full")
    arguments = {
        "train.py": (*FEW, "--out", tmp_path),
        "evaluate.py": ("--classes", "novel", "--frames", "1", "--attention", "--embeddings", "--out", tmp_path),
        "data.py": ("toy", "--out", tmp_path / "picture.png"),
    }
    status, _, errors = call(script, *arguments[script])
    assert status == 1
    assert only_line(script, errors).startswith(f"cannot write {tmp_path / file}")
    assert not (tmp_path / file).exists()


def test_the_disk_is_full_for_the_log(finished, call):
    (finished / "log.jsonl").unlink()
    (finished / "log.jsonl").symlink_to("/dev/full")
    status, _, errors = call("train.py", "--resume", finished)
    assert status == 1
    assert only_line("train.py", errors).startswith(f"cannot write {finished / 'log.jsonl'}: No space left")
