"""A run on the toy: what it learns, what it leaves; and the help of the scripts."""
import json
import math
import re

import pytest
import torch
from conftest import read_results, script
from PIL import Image

import clip
import train


@pytest.fixture(scope="module")
def toy_run(home, tmp_path_factory):
    """A run of train.py with half as many frames and two fifths of the epochs of the default one, but smaller batches:
    its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "toy"
    arguments = ("--frames", "4", "--epochs", "4", "--batch-size", "8", "--out", folder)
    return folder, script("train.py", *arguments, home=home).stdout


def test_zero_shot_clip_does_not_know_the_actions(run, tmp_path):
    run("evaluate.py", "--zero-shot", "--frames", "4", "--out", tmp_path)
    zero_shot = read_results(tmp_path)
    assert zero_shot["top1"] < 25
    assert zero_shot["count"] == 352
    assert zero_shot["unreadable"] == []


def test_fine_tuning_learns_them(toy_run, run, tmp_path):
    run("evaluate.py", "--weights", toy_run[0] / "best.pt", "--out", tmp_path)
    results = read_results(tmp_path)
    assert results["top1"] >= 90
    assert results["top5"] >= 99
    assert re.search(rf"^best: epoch \d+ +top-1  {results['top1']:.1f} %", toy_run[1], re.MULTILINE)


def test_a_run_leaves_its_checkpoints_log_arguments_and_curves(toy_run):
    folder, _ = toy_run
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


def test_word_embeddings_are_not_trained_and_the_rest_is(toy_run):
    before, after = clip.load("tiny").state_dict(), clip.load(toy_run[0] / "last.pt").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == ["token_embedding.weight"]
    assert after["logit_scale"] <= math.log(100)


def test_learning_rate_rises_from_zero_and_falls_to_a_hundredth():
    rates = [train.learning_rate(step, steps=100, warmup_steps=20, peak=1.0) for step in range(101)]
    assert rates[:20] == [step / 20 for step in range(20)]
    assert rates[20:] == [pytest.approx(0.01 + 0.99 * math.cos(math.pi * step / 200) ** 2) for step in range(20, 101)]
    assert rates[100] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["data.py", "evaluate.py", "train.py", "prompt.py"])
def test_help_fits_on_two_screens(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(name, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 100
    assert out.count("default: ") + out.count("by default") >= (4 if name == "data.py" else 9)


def test_clips_are_augmented_or_not_and_seen_in_one_view_or_nine(run, tmp_path):
    arguments = ("--classes", "novel", "--shots", "8", "--epochs", "1", "--frames", "2")
    losses = {}
    for augment in ("none", "mix"):
        run("train.py", "--augment", augment, *arguments, "--out", tmp_path / augment)
        losses[augment] = json.loads((tmp_path / augment / "log.jsonl").read_text().splitlines()[1])["loss"]
    assert losses["none"] != losses["mix"]
    run("evaluate.py", "--weights", tmp_path / "mix" / "best.pt", "--classes", "novel", "--views", "3x3", "--out",
        tmp_path)
    results = read_results(tmp_path)
    one_view = json.loads((tmp_path / "mix" / "log.jsonl").read_text().splitlines()[-1])
    assert results["count"] == one_view["count"]
    assert 0 < abs(results["top1"] - one_view["top1"]) < 10
