"""The commands of the README, run as a user runs them."""
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, read_results, script
from PIL import Image

import clip
import data
import evaluate
import prompt
import train


@pytest.fixture(scope="session")
def run(home, tmp_path_factory):
    """The default run of train.py: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "toy"
    return folder, script("train.py", "--out", folder, home=home).stdout


@pytest.fixture(scope="session")
def results(run, home):
    """The results of evaluate.py on the model of that run."""
    out = run[0].parent / "evaluation"
    script("evaluate.py", "--weights", run[0] / "best.pt", "--out", out, home=home)
    return read_results(out)


def test_zero_shot_clip_does_not_know_the_actions(home, tmp_path):
    script("evaluate.py", "--zero-shot", "--out", tmp_path, home=home)
    zero_shot = read_results(tmp_path)
    assert zero_shot["top1"] < 25
    assert zero_shot["count"] == 352
    assert zero_shot["unreadable"] == []


def test_fine_tuning_learns_them(run, results):
    assert results["top1"] >= 90
    assert results["top5"] >= 99
    assert f"fine-tuned     {results['top1']:.1f}" in run[1]


def test_a_run_leaves_its_checkpoints_log_arguments_and_curves(run):
    folder, _ = run
    assert {path.name for path in folder.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "args.json", "curves.png"}
    arguments = json.loads((folder / "args.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, validations = [r for r in log if "loss" in r], [r for r in log if "top1" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert [r["epoch"] for r in validations] == list(range(arguments["epochs"] + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] / 1.5
    assert all({"lr", "videos_per_second", "data_wait"} <= r.keys() for r in steps)
    assert Image.open(folder / "curves.png").size[0] > 800
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    assert checkpoint["template"] == "a photo of a {}."
    assert checkpoint["args"]["seed"] == arguments["seed"]
    assert len(checkpoint["classes"]) == 25


def test_a_run_is_never_overwritten(run, home):
    process = script("train.py", "--out", run[0], home=home, check=False)
    assert process.returncode == 2
    message = f"--out {run[0]} holds a run already; go on with it by --resume"
    assert process.stderr == f"train.py: error: {message} (see --help)\n"


def test_word_embeddings_are_not_trained_and_the_rest_is(run):
    before, after = clip.load("tiny").state_dict(), clip.load(run[0] / "last.pt").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == ["token_embedding.weight"]
    assert after["logit_scale"] <= math.log(100)


def test_two_processes_count_the_same_as_one(run, results, home, tmp_path):
    """Seven videos a process and batch, 352 videos: the last batches are short."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, PROJECT / "evaluate.py", "--weights", run[0] / "best.pt", "--batch-size", "14",
                    "--workers", "1", "--out", tmp_path], check=True, timeout=300)
    two = read_results(tmp_path)
    assert [two[key] for key in ("top1", "top5", "count")] == [results[key] for key in ("top1", "top5", "count")]


def test_learning_rate_rises_from_zero_and_falls_to_a_hundredth():
    rates = [train.learning_rate(step, steps=100, warmup_steps=20, peak=1.0) for step in range(101)]
    assert rates[:20] == [step / 20 for step in range(20)]
    assert rates[20:] == [pytest.approx(0.01 + 0.99 * math.cos(math.pi * step / 200) ** 2) for step in range(20, 101)]
    assert rates[100] == pytest.approx(0.01)


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["train.py", "--epochs", "0"], 2, "--epochs: 0 is not a number from 1 on"),
    (["train.py", "--lr", "fast"], 2, "--lr: invalid number value: 'fast'"),
    (["train.py", "--lr", "nan"], 2, "--lr: nan is not a number"),
    (["train.py", "--data", "nosuch"], 2, "--data: 'nosuch' is neither a folder nor one of toy, ucf101,"),
    (["train.py", "--gpus", "64"], 2, "--gpus 64: this machine has"),
    (["train.py", "--template", "a photo"], 2, "--template: 'a photo' has no {} for the class name"),
    (["evaluate.py", "--views", "4x2"], 2, "--views: '4x2' is not a number of clips x 1 or 3 crops"),
    (["data.py", "--val-list", "LICENSE"], 2, "--train-list (for training), --val-list and --labels go together"),
    (["data.py", "--out", "no/where.png"], 2, "--out no/where.png is no PNG in a folder that is there"),
    (["train.py", "--augment", "mix", "--batch-size", "5"], 2, "--augment mix takes clips in pairs, but 5 are"),
    (["train.py", "--micro-batch", "5"], 2, "--micro-batch 5 does not divide the 32 videos of a batch on each GPU"),
    (["train.py", "--resume", "nowhere"], 2, "--resume: there is no run in nowhere"),
    (["train.py", "--label-smoothing", "2"], 2, "--label-smoothing: 2 is not a number from 0 to 1"),
    (["train.py", "--root", "LICENSE"], 1, "Not a directory: "),
    (["train.py", "--out", "LICENSE/run"], 1, "--out LICENSE/run: Not a directory"),
    (["data.py", "--resolution", "1000000"], 1, "out of memory"),
    (["train.py", "--val-list", "a.txt"], 2, "--train-list (for training), --val-list and --labels go together"),
    (["train.py", "--data", "hmdb51", "--root", "tests"], 1, "hmdb51 is not in"),
    (["train.py", "--data", "tests"], 1, "train is missing. Your own videos: train/<class>/* and val/<class>/*"),
    (["train.py", "--data", "tests", "--split", "2"], 1, "tests has no official splits"),
    (["evaluate.py", "--labels", "a,b"], 2, "--val-list and --labels go together"),
    (["evaluate.py", "--video", "x.mp4"], 2, "--video needs --labels"),
    (["evaluate.py", "--video", "x", "--labels", "a", "--model", "tiny"], 1, "--video x: there is no such file"),
    (["evaluate.py", "--video", ".ci", "--labels", "a", "--model", "tiny"], 1, ".ci: no videos lie in this folder"),
    (["evaluate.py", "--video", "x.mp4", "--labels", "a", "--embeddings"], 2, "--video does not go with --embeddings"),
    (["evaluate.py", "--blend", "0.5"], 2, "--blend needs --weights"),
    (["evaluate.py", "--blend", "2", "--weights", "tiny"], 2, "--blend: 2 is not a number from 0 to 1"),
    (["evaluate.py", "--attention", "a.txt"], 2, "--attention a.txt is no file name that ends in .png or .gif"),
    (["evaluate.py", "--classes", "base", "base"], 2, "--classes names something twice"),
    (["prompt.py", "--weights", "tiny", "--ctx-text", "70"], 1, "--ctx-text 70 leaves no room for the class names"),
    (["prompt.py", "--weights", "tiny", "--depth", "9"], 1, "--depth 9: the vision encoder of tiny has 3 layers"),
    (["prompt.py", "--ctx", "0"], 2, "no prompts are left to be learned"),
    (["train.py", "--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
    (["train.py", "--weights", "nosuch.pt"], 1, "'nosuch.pt' is neither a file nor a model"),
    (["train.py", "--batch-size", "5000"], 1, "880 training videos do not fill a batch of 5000: choose"),
    (["evaluate.py", "--zero-shot", "--weights", "x.pt"], 2, "--zero-shot is about plain CLIP"),
    (["evaluate.py", "--weights", "LICENSE"], 1, "LICENSE is damaged or not a file of weights"),
    (["evaluate.py", "--model", "ViT-B/16"], 1, "cannot download ViT-B-16.pt"),
    (["evaluate.py", "--split", "4"], 2, "--split: invalid choice"),
])
def test_a_wrong_call_is_told_in_one_line(arguments, status, message, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # as good as no network
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", arguments)
    main = {"data.py": data, "evaluate.py": evaluate, "train.py": train, "prompt.py": prompt}[arguments[0]].main
    with pytest.raises(SystemExit) as end:
        data.run(main)
    error = capsys.readouterr().err
    if isinstance(end.value.code, str):  # Python prints it and exits with 1
        error, end.value.code = error + end.value.code, 1
    lines = [line for line in error.splitlines() if line.strip()]
    assert end.value.code == status
    assert message in lines[-1]
    assert lines[-1].startswith(f"{arguments[0]}: error: ")
    assert len(lines) == 1


@pytest.mark.parametrize(("arguments", "status"), [(["train.py", "--lr", "x"], 2), (["data.py", "tests"], 1)])
def test_errors_go_to_stderr_with_their_status(arguments, status, home):
    process = script(*arguments, home=home, check=False)
    assert (process.returncode, process.stdout) == (status, "")
    assert len(process.stderr.splitlines()) == 1


def test_ucf101_without_data_and_without_gpu(home, tmp_path):
    arguments = ("train.py", "--data", "ucf101", "--gpus", "1")
    process = script(*arguments, home=home, cwd=tmp_path, check=False, CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 1
    assert process.stdout == "warning: --gpus 1, but there is no GPU here: running on the CPU\n"
    assert f"ucf101 is not in {tmp_path / 'datasets' / 'ucf101'}: ucfTrainTestlist/classInd.txt is" in process.stderr
    assert "unrar x UCF101.rar" in process.stderr
    assert "Traceback" not in process.stderr


def test_videos_that_are_not_there_stop_training_and_count_as_wrong(home, tmp_path):
    samples, _ = data.read_dataset("toy")
    root = samples[0][0].parents[2]
    shutil.copytree(root / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    arguments = ("--data", "ucf101", "--root", tmp_path, "--model", "tiny")
    process = script("train.py", *arguments, "--out", tmp_path / "run", home=home, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "videos cannot be read, over 5%: " in process.stderr
    assert "Traceback" not in process.stderr
    script("evaluate.py", *arguments, "--out", tmp_path, home=home)
    results = read_results(tmp_path)
    assert (results["top1"], results["count"], len(results["unreadable"])) == (0, 352, 352)


def test_a_few_unreadable_videos_are_replaced_and_listed(home, tmp_path):
    samples, _ = data.read_dataset("toy", train=True)
    shutil.copytree(samples[0][0].parents[2], tmp_path / "toy")
    broken = [tmp_path / "toy" / path.relative_to(samples[0][0].parents[2]) for path, _ in samples[:300:60]]
    for path in broken:
        path.write_bytes(b"")
    arguments = ("--data", "ucf101", "--root", tmp_path / "toy", "--model", "tiny", "--frames", "1", "--epochs", "1")
    out = script("train.py", *arguments, "--out", tmp_path / "run", home=home).stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    listed = sorted({error for record in records if "loss" in record for error in record.get("unreadable", [])})
    assert set(listed) <= {f"{path}: Invalid data found when processing input" for path in broken}
    assert len(listed) >= 3  # an epoch leaves out up to a batch of videos
    assert [line.removeprefix("unreadable ") for line in out.splitlines() if line.startswith("unreadable")] == listed


def test_clips_are_augmented_or_not_and_seen_in_one_view_or_nine(home, tmp_path):
    arguments = ("--shots", "8", "--epochs", "1", "--frames", "2")
    losses = {}
    for augment in ("none", "mix"):
        script("train.py", "--augment", augment, *arguments, "--out", tmp_path / augment, home=home)
        losses[augment] = json.loads((tmp_path / augment / "log.jsonl").read_text().splitlines()[1])["loss"]
    assert losses["none"] != losses["mix"]
    script("evaluate.py", "--weights", tmp_path / "mix" / "best.pt", "--views", "3x3", "--out", tmp_path, home=home)
    results = read_results(tmp_path)
    one_view = json.loads((tmp_path / "mix" / "log.jsonl").read_text().splitlines()[-1])
    assert results["count"] == one_view["count"]
    assert 0 < abs(results["top1"] - one_view["top1"]) < 10


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    arguments = ("train.py", "--lr", "1e30", "--warmup-epochs", "0", "--out", tmp_path / "run")
    process = script(*arguments, home=home, check=False)
    assert process.returncode == 1
    assert "the loss is nan and its gradient nan at step 2" in process.stderr
    assert "Traceback" not in process.stderr
