"""Two processes on one machine: a mistake is told once, and no process waits for one that has failed."""
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT, without_leaks

import clip
import evaluate

SHORT = "--gpus 0 --classes novel --shots 2 --frames 1 --epochs 1 --batch-size 16 --workers 0 --out run"
# Runs train.py in two processes as `--gpus 2` does. In those of some ranks, a function fails.
PARENT = f"import sys, evaluate; sys.argv = ['child.py', *{SHORT.split()}]; sys.exit(evaluate.run_torchrun(2))"
CHILD = """
import os, sys, torch
import clip, data, evaluate, train

def fail(*args, **options):
    raise {error}

if os.environ["RANK"] in {ranks!r}:
    {function} = fail
sys.argv[0] = "train.py"
data.run(train.main, clip.InputError)
"""


def fail(folder, function, ranks, error):
    """Exit status, what was written to stderr, and the seconds that it took."""
    (folder / "child.py").write_text(CHILD.format(function=function, ranks=ranks, error=error), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", PARENT], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, timeout=120)
    return process.returncode, without_leaks(process.stderr), time.perf_counter() - begin


@pytest.mark.parametrize(("function", "ranks"), [
    ("data.load_train_val", "01"),  # a mistake that both find
    ("clip.load", "1"),
    ("evaluate.predict", "1"),  # the first validation
    ("train.learning_rate", "1"),  # a step
    ("torch.save", "0"),
])
def test_an_error_is_told_once_and_ends_all_processes(function, ranks, tmp_path):
    status, errors, seconds = fail(tmp_path, function, ranks, "data.UserError('the reason')")
    assert (status, errors) == (1, "train.py: error: the reason\n")
    assert seconds < 60


def test_a_mistake_in_the_code_shows_its_traceback(tmp_path):
    status, errors, seconds = fail(tmp_path, "train.learning_rate", "1", "KeyError('mistake')")
    assert status == 1
    assert errors.count("Traceback") == errors.count("KeyError: 'mistake'") == 1
    assert seconds < 60


@pytest.mark.parametrize("name", ["train.py", "prompt.py", "evaluate.py"])
def test_weights_are_downloaded_before_the_processes_start(name, call, monkeypatch):
    """Or each of them would download the same file."""
    done = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(clip, "load", done.append)
    monkeypatch.setattr(evaluate, "run_torchrun", lambda processes: done.append(processes) or 0)
    status, _, errors = call(name, "--data", "ucf101", "--model", "ViT-B/32", "--gpus", "2", "--amp", "off")
    assert (status, errors, done) == (0, "", ["ViT-B/32", 2])
