"""Two processes on one machine: a mistake is told once, and no process waits for one that has failed."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, without_leaks

import clip
import evaluate

SHORT = "--gpus 0 --classes novel --shots 2 --frames 1 --epochs 1 --batch-size 16 --workers 0 --out run"
# Runs train.py in two processes as `--gpus 2` does, in each of some folders. In those of some ranks, a function fails.
PARENT = f"""
import json, os, sys, time
import evaluate

for folder in sys.argv[1:]:
    os.chdir(folder)
    os.dup2(os.open("errors", os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = ["child.py", *{SHORT.split()}]
    begin = time.perf_counter()
    status = evaluate.run_torchrun(2)
    with open("result.json", "w") as file:
        json.dump([status, time.perf_counter() - begin], file)
"""
CHILD = """
import os, sys, torch
import clip, data, evaluate, train

def fail(*args, **options):
    raise {error}

class Aborts:  # as a thread of gloo may when Python finalizes
    __del__ = lambda self: os.abort()

aborts = Aborts()

if os.environ["RANK"] in {ranks!r}:
    {function} = fail
sys.argv[0] = "train.py"
data.run(train.main, clip.InputError)
"""


TOLD, MISTAKE = "data.UserError('the reason')", "KeyError('mistake')"
FAILURES = [
    ("train.learning_rate", "1", MISTAKE),
    ("data.load_train_val", "01", TOLD),  # a mistake that both find
    ("clip.load", "1", TOLD),
    ("evaluate.predict", "1", TOLD),  # the first validation
    ("train.learning_rate", "1", TOLD),  # a step
    ("torch.save", "0", TOLD),
]


@pytest.fixture(scope="module")
def failed(home, tmp_path_factory):
    """Exit status, what was written to stderr, and the seconds that it took, of each of the failures: in turns, as the
    parent takes long to start."""
    folders = [tmp_path_factory.mktemp("failure") for _ in FAILURES]
    for folder, (function, ranks, error) in zip(folders, FAILURES):
        (folder / "child.py").write_text(CHILD.format(function=function, ranks=ranks, error=error), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HOME": str(home)}
    subprocess.run([sys.executable, "-c", PARENT, *folders], env=environment, stdout=subprocess.DEVNULL, check=True,
                   timeout=400)
    found = {}
    for folder, failure in zip(folders, FAILURES):
        status, seconds = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found[failure] = status, without_leaks((folder / "errors").read_text(encoding="utf-8")), seconds
    return found


@pytest.mark.parametrize("failure", FAILURES[1:], ids=str)
def test_an_error_is_told_once_and_ends_all_processes(failure, failed):
    status, errors, seconds = failed[failure]
    assert (status, errors) == (1, "train.py: error: the reason\n")
    assert seconds < 60


def test_a_process_that_is_killed_is_told(tmp_path):
    (tmp_path / "child.py").write_text("""if True:
        import os, sys
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        sys.exit(1)  # as a process that notices that it is alone
    """)
    parent = "import data, evaluate, sys; data.run(lambda: sys.exit(evaluate.run_torchrun(2)))"
    (tmp_path / "train.py").write_text(f"import sys; sys.argv = ['child.py']; {parent}")
    process = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT)},
                             capture_output=True, text=True, timeout=60)
    assert (process.returncode, without_leaks(process.stderr)) == (
        1, "child.py: error: a process was ended by SIGKILL; the system sends SIGKILL if memory runs out\n")


def test_a_mistake_in_the_code_shows_its_traceback(failed):
    status, errors, seconds = failed[FAILURES[0]]
    assert status == 1
    assert errors.count("Traceback") == errors.count("KeyError: 'mistake'") == 1
    assert seconds < 60


@pytest.mark.parametrize("name", ["train.py", "prompt.py", "evaluate.py"])
def test_weights_are_downloaded_before_the_processes_start(name, call, monkeypatch):
    """Or each of them would download the same file."""
    done = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(clip, "fetch", done.append)
    monkeypatch.setattr(evaluate, "run_torchrun", lambda processes: done.append(processes) or 0)
    status, _, errors = call(name, "--data", "ucf101", "--model", "ViT-B/32", "--gpus", "2", "--amp", "off")
    assert (status, errors, done) == (0, "", [clip.MODELS["ViT-B/32"], clip.VOCABULARY, 2])


def test_a_resumed_run_downloads_no_weights(call, run, monkeypatch, tmp_path):
    run("train.py", *SHORT.split()[:-2], "--out", tmp_path)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    last["args"]["model"] = "ViT-B/32"
    torch.save(last, tmp_path / "last.pt")
    done = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(clip, "fetch", done.append)
    monkeypatch.setattr(evaluate, "run_torchrun", lambda processes: done.append(processes) or 0)
    status, _, errors = call("train.py", "--resume", tmp_path, "--gpus", "2")
    assert (status, errors, done) == (0, "", [2])
