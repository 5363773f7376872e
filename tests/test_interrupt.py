"""Ctrl-C ends a script soon and in one line; it leaves no process and nothing half done."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, without_leaks
from test_train import until
from torch.utils.data import DataLoader

import data

TRAINING = ("train.py", "--shots", "2", "--frames", "1", "--workers", "2")


def members(group):
    """The number of processes of a group that are running."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, number, *_ = file.read_text().rpartition(") ")[2].split()
            count += int(number) == group and state != "Z"
    return count


def press(arguments, home, moment, times=1, status=130, **environment):
    """Runs a script and presses Ctrl-C when moment(its group) is true. Returns what it wrote to stderr. A script needs
    a second to end by itself."""
    command = [sys.executable, PROJECT / arguments[0], *arguments[1:]]
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, env=environment, start_new_session=True, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until(lambda: process.poll() is not None or moment(process.pid))
        begin = time.perf_counter()
        for _ in range(times):
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
        errors = without_leaks(process.communicate(timeout=60)[1])
        until(lambda: members(process.pid) == 0)
        seconds = time.perf_counter() - begin
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, seconds < 3) == (status, True), errors
    return errors


@pytest.mark.parametrize("name", ["data.py", "evaluate.py", "train.py", "prompt.py"])
def test_there_is_no_traceback_while_pytorch_is_imported(name, home):
    def importing(group):
        return "libtorch" in Path(f"/proc/{group}/maps").read_text()

    assert press([name], home, importing, status=-signal.SIGINT) == ""


@pytest.mark.parametrize("times", [1, 2])
def test_nothing_is_left_of_a_toy_that_was_being_drawn(times, home, tmp_path):
    def drawing(_):
        return any(tmp_path.glob("toy-unfinished-*/UCF-101/*/*.avi"))

    arguments = (*TRAINING, "--root", tmp_path / "toy", "--out", tmp_path / "run")
    assert press(arguments, home, drawing, times) == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_the_first_validation(method, home, tmp_path):
    """There is no checkpoint yet, so the line does not say how to go on."""
    def working(group):
        return (tmp_path / "run/args.json").exists() and members(group) >= 3

    site = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"  # run before all else
    (tmp_path / "sitecustomize.py").write_text(site)
    arguments = (*TRAINING, "--out", tmp_path / "run")
    assert press(arguments, home, working, PYTHONPATH=str(tmp_path)) == "interrupted\n"


def test_after_a_checkpoint_the_line_says_how_to_go_on(home, tmp_path):
    arguments = (*TRAINING, "--epochs", "500", "--out", tmp_path)
    errors = press(arguments, home, lambda _: (tmp_path / "last.pt").exists())
    assert errors == f"interrupted; to go on: python train.py --resume {tmp_path}\n"


def test_ctrl_c_is_not_lost_while_workers_are_forked(monkeypatch):
    def start(loader, whole=DataLoader.__iter__):
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in what it calls for a fork
            signal.raise_signal(signal.SIGINT)
        return whole(loader)

    monkeypatch.setattr(DataLoader, "__iter__", start)
    with pytest.raises(KeyboardInterrupt):
        iter(data.Loader([], [], workers=0))
