"""Fixtures: a home with OpenAI's vocabulary, a small random model, small videos, and the scripts to be run."""
import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import clip
import data

PROJECT = Path(__file__).parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests run at once as there are cores: one thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it runs in the background


def pytest_collection_modifyitems(items):
    """The files that take longest go first, or one process would be left with one of them at the end."""
    longest = ["test_train.py", "test_scripts.py", "test_portability.py", "test_processes.py", "test_bad_input.py",
               "test_readme.py", "test_clip.py", "test_devices.py", "test_interrupt.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home directory whose cache holds OpenAI's vocabulary, from open_clip's wheel, and no weights."""
    home = tmp_path_factory.mktemp("home")
    cache = home / ".cache" / "clip"
    cache.mkdir(parents=True)
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    shutil.copy(package / "bpe_simple_vocab_16e6.txt.gz", cache)
    return home


@pytest.fixture(autouse=True)
def set_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))


def small_clip(quick_gelu):
    """open_clip's CLIP, small, with OpenAI's vocabulary."""
    import open_clip  # takes two seconds, which the processes of a test need not spend

    vision = open_clip.model.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=16, image_size=64)
    text = open_clip.model.CLIPTextCfg(context_length=77, vocab_size=49408, width=128, heads=2, layers=3)
    return open_clip.model.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()


@pytest.fixture(scope="session")
def reference():
    """A small CLIP of open_clip with OpenAI's activation; no weight is left at its initial 0 or 1."""
    torch.manual_seed(0)
    model = small_clip(quick_gelu=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def distance(a, b):
    """The relative distance of two tensors."""
    return ((a - b).norm() / b.norm()).item()


def write_video(path, frames, codec="ffv1", pix_fmt="bgr0", format=None, rotation=0, times=None, title="", **options):
    """Writes uint8 [T, h, w, 3] at 25 frames/s, or frame i at the time times[i] / 25 s; lossless unless another codec
    is named, to which the `options` go."""
    with av.open(str(path), "w", format) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = times[i] if times else i, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def numbered_frames(n, height=24, width=32):
    """n frames that carry their number: frame i is filled with the grey value 2 * i (n <= 128)."""
    return np.broadcast_to(2 * np.arange(n, dtype=np.uint8)[:, None, None, None], (n, height, width, 3)).copy()


def without_leaks(errors):
    """What a process wrote to stderr without the leaks of Triton, which it reports when Python ends (PyTorch 2.15)."""
    return re.sub(r"nanobind: leaked.*?refleaks.html\n?", "", errors, flags=re.DOTALL)


def script(*arguments, home, cwd=PROJECT, check=True, **environment):
    """Runs one of the scripts as a user would. Returns the finished process with stdout and stderr as text."""
    name, *arguments = map(str, arguments)
    process = subprocess.run([sys.executable, str(PROJECT / name), *arguments], cwd=cwd, capture_output=True, text=True,
                             env={**os.environ, "HOME": str(home), **environment}, timeout=600)
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def torchrun(processes):
    """The command that starts a script in so many processes, also where the machine does not know its own name."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
            f"--nproc-per-node={processes}"]


def in_processes(number, function, *arguments):
    """Calls a function in so many processes that know of each other as those of torchrun do, without its start."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": number, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}

    def start(rank):
        os.environ.update({name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()})
        torch.set_num_threads(1)
        assert torch.distributed.is_torchelastic_launched()
        function(*arguments)

    processes = [multiprocessing.get_context("fork").Process(target=start, args=[rank]) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * number


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs one of the scripts in this process: its exit status, what it printed, and the errors it told."""
    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status, told = 0, ""
        try:
            data.run(importlib.import_module(name.removesuffix(".py")).main, clip.InputError)
        except SystemExit as end:  # with a text, Python prints it and exits with 1
            status, told = (1, end.code + "\n") if isinstance(end.code, str) else (end.code, "")
        out, errors = capsys.readouterr()
        return status, out, errors + told

    return call


@pytest.fixture
def run(call):
    """Runs one of the scripts in this process to its good end: what it printed."""
    def run(name, *arguments):
        status, out, errors = call(name, *arguments)
        assert (status, errors) == (0, "")
        return out

    return run


def read_log(folder):
    """The last record of each step and of each validation in the log of a run: two lists of dicts."""
    steps, validations = {}, {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off by a kill
            record = json.loads(line)
            if "step" in record:
                (validations if "top1" in record else steps)[record["step"]] = record
    return list(steps.values()), list(validations.values())


def read_results(folder):
    """What evaluate.py with --out has found, for its only split and kind of classes."""
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    return run
