"""The gradient, however a batch is cut, and runs that are killed and resumed."""
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, distance, in_processes, read_log, torchrun

import clip
import data
import evaluate
import train

ONE_STEP = ("--shots", "4", "--frames", "4", "--batch-size", "16", "--seed", "3", "--workers", "0")


class FirstStep(Exception):
    """Ends a run before its first optimizer step."""


def gradient(folder, *arguments):
    """The gradient of the first batch of a run of train.py on the toy: {name: tensor, or None}."""
    models = []

    def stop(gradients):
        raise FirstStep

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *ONE_STEP, "--out", str(folder / "run"), *arguments])
        patch.setattr(train, "validate", lambda *args: None)
        patch.setattr(train, "describe", lambda args, model, state: models.append(model))
        patch.setattr(train, "get_total_norm", stop)
        with pytest.raises(FirstStep):
            train.main()
    return {name: parameter.grad for name, parameter in models[0].named_parameters()}


def worst(a, b):
    assert {name for name in a if a[name] is None} == {name for name in b if b[name] is None}
    return max(distance(a[name], b[name]) for name in a if a[name] is not None)


MIX = ("--augment", "mix", "--micro-batch")


@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(fusion, tmp_path):
    whole = gradient(tmp_path, *MIX, "16", "--fusion", fusion)
    assert whole["token_embedding.weight"] is None
    assert all(whole[name].any() for name in whole if name != "token_embedding.weight")
    for micro_batch in ("8", "4"):
        assert worst(gradient(tmp_path, *MIX, micro_batch, "--fusion", fusion), whole) < 1e-5


@pytest.mark.parametrize(("processes", "micro_batch"), [(2, 12), (3, 4)])
def test_nor_on_the_number_of_processes(processes, micro_batch, tmp_path):
    def save():
        folder = tmp_path / os.environ["RANK"]
        arguments = (*MIX, str(micro_batch), "--batch-size", "24", "--gpus", "0")
        torch.save(gradient(folder, *arguments), f"{folder}.pt")
        assert torch.distributed.get_world_size() == processes

    in_processes(processes, save)
    whole = gradient(tmp_path, *MIX, "24", "--batch-size", "24", "--gpus", "0")
    for rank in range(processes):
        assert worst(torch.load(tmp_path / f"{rank}.pt"), whole) < 1e-5


@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_the_gradient_is_that_of_the_loss_written_out(fusion, tmp_path):
    """With frames and crops as in evaluation, in one graph."""
    samples, classes = data.load_samples("toy", train=True, shots=4, seed=3)
    model = clip.load("tiny")
    picked = [samples[index] for _, index in next(data.training_batches(len(samples), 16, 1, 3))]
    video = torch.stack([data.center_crop(data.read_video(path, 4), 64) for path, _ in picked])
    label = torch.tensor([label for _, label in picked])
    embeddings = model.encode_image(video.flatten(0, 1))
    frames = F.normalize(embeddings, dim=-1)
    text = F.normalize(model.encode_text(model.tokenizer([f"a photo of a {name}." for name in classes])), dim=-1)
    scale = model.logit_scale.exp()
    if fusion == "embedding":
        mean = embeddings.reshape(16, 4, -1).mean(1)
        logits = scale * (mean / mean.norm(dim=-1, keepdim=True)) @ text.T
    elif fusion == "decision":
        logits = (scale * frames @ text.T).reshape(16, 4, -1).mean(1)
    else:
        logits, label = scale * frames @ text.T, label.repeat_interleave(4)
    smooth = 0.9 * F.one_hot(label, len(classes)) + 0.1 / len(classes)
    loss = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    names = [name for name, _ in model.named_parameters() if name != "token_embedding.weight"]
    parameters = dict(model.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names])))
    ours = gradient(tmp_path, "--micro-batch", "8", "--augment", "none", "--fusion", fusion)
    assert max(distance(ours[name], expected[name]) for name in names) < 1e-5


def test_fusions_in_evaluation_are_averages_over_time():
    model = clip.load("tiny").eval()
    video = torch.randint(256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    tokens = model.tokenizer(["red ball", "blue cone", "a star", "nothing"])
    with torch.inference_mode():
        text = model.encode_text(tokens)
        frames = torch.stack([model.logits(model.encode_image(video[:, t]), text) for t in range(3)])
        model.fusion = "decision"
        torch.testing.assert_close(model(video, tokens), frames.mean(0))
        model.fusion = "image"
        torch.testing.assert_close(model(video, tokens).softmax(-1), frames.softmax(-1).mean(0))


@pytest.mark.parametrize(("arguments", "expected"), [
    ("--model ViT-B/16 --batch-size 256", 8),
    ("--model ViT-B/16 --batch-size 12", 4),
    ("--model ViT-B/16 --batch-size 4", 4),
    ("--model ViT-B/16 --batch-size 12 --augment color", 6),
    ("--model ViT-B/16 --batch-size 24 --micro-batch 23", 12),
    ("--model tiny --batch-size 256", 32),
    ("--model tiny --batch-size 32 --micro-batch 5", 4),
    ("--model tiny --batch-size 35 --micro-batch 30", 7),
])
def test_a_gpu_takes_as_many_videos_at_once_as_divide_its_share(arguments, expected, monkeypatch):
    """At most --micro-batch, by default eight, of tiny 32; with --augment mix whole groups of four."""
    monkeypatch.setattr("sys.argv", ["train.py", *arguments.split()])
    assert train.parse_args(train.make_parser(None, train.PAPER, train.TINY)).micro_batch == expected


@pytest.mark.parametrize("tune", ["image", "text"])
def test_one_encoder_alone_can_be_tuned(tune, tmp_path):
    """Without logit_scale, as in the original code."""
    whole, part = gradient(tmp_path), gradient(tmp_path, "--tune", tune)
    expected = {name for name in whole if name.startswith("visual.") == (tune == "image")}
    assert {name for name in part if part[name] is not None} == expected - {"token_embedding.weight", "logit_scale"}
    assert max(distance(part[name], whole[name]) for name in part if part[name] is not None) < 1e-5


def test_checkpointed_activations_give_the_same_gradient(tmp_path):
    assert worst(gradient(tmp_path, "--checkpoint-activations"), gradient(tmp_path)) < 1e-6


SHORT = ("--classes", "novel", "--shots", "8", "--frames", "2", "--batch-size", "16", "--micro-batch", "8", "--augment",
         "mix", "--epochs", "3")  # 18 steps


def until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def interrupt(arguments, folder, lines, sign, home):
    """Runs train.py and sends a signal to it and its workers when its log has so many lines. Returns the exit status.
    """
    process = subprocess.Popen([sys.executable, PROJECT / "train.py", *map(str, arguments)], start_new_session=True,
                               stdout=subprocess.DEVNULL, env={**os.environ, "HOME": str(home)})
    log = folder / "log.jsonl"
    until(lambda: process.poll() is not None or log.exists() and len(log.read_text().splitlines()) >= lines)
    os.killpg(process.pid, sign)
    return process.wait(timeout=60)


def test_nothing_goes_on_before_the_first_checkpoint(call, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "get_total_norm", mock.Mock(side_effect=KeyboardInterrupt))
    status, out, errors = call("train.py", *SHORT, "--out", tmp_path)
    assert (status, errors) == (130, "interrupted\n")
    assert "to go on" not in out


def test_a_resumed_run_equals_an_uninterrupted_one(run, call, home, tmp_path):
    """To the bit, after SIGTERM in one epoch and SIGKILL in the next, with other numbers of workers."""
    alone, folder = tmp_path / "alone", tmp_path / "killed"
    run("train.py", *SHORT, "--out", alone)
    every_step = ["--save-minutes", "0"]
    arguments = [*SHORT, "--out", folder, "--workers", "2", *every_step]
    assert interrupt(arguments, folder, 5, signal.SIGTERM, home) == -signal.SIGTERM
    resume = ["--resume", folder, "--workers", "3", *every_step]
    assert interrupt(resume, folder, 13, signal.SIGKILL, home) == -signal.SIGKILL
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 9')  # a line that was being written
    assert 3 < torch.load(folder / "last.pt", weights_only=True)["step"] < 18
    (folder / "args.json").unlink()  # last.pt is enough
    run("train.py", "--resume", folder, "--workers", "1")
    one, other = (torch.load(path / "last.pt", weights_only=True) for path in (alone, folder))
    assert one["step"] == other["step"] == 18
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    moments = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    timing = {"videos_per_second", "data_wait"}
    logs = [[[{key: value for key, value in record.items() if key not in timing} for record in records]
             for records in read_log(path)] for path in (alone, folder)]
    assert logs[0] == logs[1]
    assert [len(records) for records in logs[0]] == [18, 4]
    best = max(record["top1"] for record in logs[0][1][1:])
    assert torch.load(alone / "best.pt", weights_only=True)["validations"][-1]["top1"] == best
    assert one["losses"] == other["losses"] == [record["loss"] for record in logs[0][0]]
    assert one["validations"] == other["validations"]
    torch.save(one | {"args": one["args"] | {"shots": 9}}, folder / "last.pt")
    status, _, errors = call("train.py", "--resume", folder)
    assert status == 1
    assert "was trained on other data: 96 videos of 12 classes, not these 108 of 12" in errors


def test_two_runs_at_once_get_two_folders(home, tmp_path):
    """Without --out, and on the same data."""
    command = [sys.executable, PROJECT / "train.py", *SHORT, "--epochs", "1", "--workers", "0", "--frames", "1"]
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in runs] == [0, 0]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"toy", "toy-2"}
    for folder in (tmp_path / "runs").iterdir():
        assert len((folder / "log.jsonl").read_text().splitlines()) == 8  # six steps, two validations
        assert torch.load(folder / "last.pt", weights_only=True)["args"]["out"] == f"runs/{folder.name}"


def test_fp16_skips_steps_until_the_scale_fits(run, monkeypatch, tmp_path):
    too_high = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 19)
    monkeypatch.setattr(torch.amp, "GradScaler", too_high)
    monkeypatch.setattr(evaluate, "evaluation_loader", lambda samples, *options, whole=evaluate.evaluation_loader:
                        whole(samples[:8], *options))  # fp16 is slow on a CPU
    run("train.py", *SHORT, "--frames", "1", "--epochs", "1", "--amp", "fp16", "--out", tmp_path / "run")
    steps, _ = read_log(tmp_path / "run")
    skipped = [record["step"] for record in steps if record["skipped"]]
    assert 0 < len(skipped) < len(steps) / 2
    assert all(math.isfinite(record["gradient_norm"]) for record in steps if not record["skipped"])
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights["model"].values())
    assert weights["scaler"]["scale"] == 2 ** (19 - len(skipped))


def test_two_nodes_are_two_torchruns(run, home, tmp_path):
    """And the same run as one process, to rounding; only one process prints and writes."""
    def agent(node):
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--master-addr=localhost", "--master-port=29513", PROJECT / "train.py", *SHORT, "--epochs", "1",
             "--workers", "1", "--out", tmp_path / "two"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"})

    agents = [agent(0), agent(1)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    assert ["the best model is" in output for output in outputs] == [True, False]
    run("train.py", *SHORT, "--epochs", "1", "--out", tmp_path / "one")
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
               if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_process_that_dies_ends_the_run(home, tmp_path):
    process = subprocess.Popen(
        [*torchrun(2), PROJECT / "train.py", *SHORT, "--epochs", "500", "--workers", "0", "--out", tmp_path / "run"],
        start_new_session=True, env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
        text=True)
    log = tmp_path / "run" / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    begin = time.time()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert time.time() - begin < 60
    assert "SIGKILL" in errors
