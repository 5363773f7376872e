"""The gradient, however a batch is cut, and runs that are killed and resumed."""
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, distance, script
from torch.nn.parallel import DistributedDataParallel

import clip
import data
import train


def gradient(micro_batch, world=1, rank=0, **given):
    """The gradient of the first batch of 8 toy videos, from compute_gradient: {name: tensor}."""
    args = types.SimpleNamespace(**dict(batch_size=8, micro_batch=micro_batch, augment="mix", amp="off", seed=3,
                                        label_smoothing=0.1, tune="both", fusion="embedding") | given)
    samples, classes = data.read_dataset("toy", train=True)
    model = clip.load("tiny").train()
    model.fusion = args.fusion
    train.choose_parameters(model, args.tune)
    dataset = data.VideoDataset(samples[::29], 4, model.image_size, train=True, seed=3, augment=args.augment)
    batches = data.Batches(len(dataset), 8, 3, rank, world, micro_batch)
    network = DistributedDataParallel(model) if world > 1 else model
    tokens = model.tokenizer(classes)
    loader = iter(data.make_loader(dataset, batches, 0))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.compute_gradient(args, network, tokens, loader, scaler, epoch=0, step=5)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(a, b):
    assert {name for name in a if a[name] is None} == {name for name in b if b[name] is None}
    return max(distance(a[name], b[name]) for name in a if a[name] is not None)


def torchrun(folder, code, *options):
    """Runs some lines of Python in two processes."""
    file = folder / "code.py"
    file.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", file],
                   env=environment, check=True, timeout=300)


@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(fusion):
    whole = gradient(8, fusion=fusion)
    assert whole["token_embedding.weight"] is None
    assert all(whole[name].any() for name in whole if name != "token_embedding.weight")
    for micro_batch in (4, 2):
        assert worst(gradient(micro_batch, fusion=fusion), whole) < 1e-5


def test_nor_on_the_number_of_processes(tmp_path):
    torchrun(tmp_path, f"""
import torch, torch.distributed as dist
from test_train import gradient
dist.init_process_group("gloo")
rank = dist.get_rank()
gradients = [gradient(micro, 2, rank) for micro in (4, 2)]
if rank == 0:
    torch.save(gradients, {str(tmp_path / "gradients.pt")!r})
dist.destroy_process_group()
""")
    whole = gradient(8)
    for cut in torch.load(tmp_path / "gradients.pt"):
        assert worst(cut, whole) < 1e-5


@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_the_gradient_is_that_of_the_loss_written_out(fusion):
    """With frames and crops as in evaluation, and the texts encoded within the one graph."""
    samples, classes = data.read_dataset("toy", train=True)
    model = clip.load("tiny")
    chosen = samples[::29]
    order = data.Batches(len(chosen), 8, 3)
    picked = [chosen[index] for _, index in next(iter(order))]
    video = torch.stack([data.center_crop(data.read_video(path, 4), 64) for path, _ in picked])
    label = torch.tensor([label for _, label in picked])
    frames = F.normalize(model.encode_image(video.flatten(0, 1)), dim=-1)
    text = F.normalize(model.encode_text(model.tokenizer(classes)), dim=-1)
    scale = model.logit_scale.exp()
    if fusion == "embedding":
        mean = model.encode_image(video.flatten(0, 1)).reshape(8, 4, -1).mean(1)
        logits = scale * (mean / mean.norm(dim=-1, keepdim=True)) @ text.T
    elif fusion == "decision":
        logits = (scale * frames @ text.T).reshape(8, 4, -1).mean(1)
    else:
        logits, label = scale * frames @ text.T, label.repeat_interleave(4)
    smooth = 0.9 * F.one_hot(label, len(classes)) + 0.1 / len(classes)
    loss = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    names = [name for name, _ in model.named_parameters() if name != "token_embedding.weight"]
    parameters = dict(model.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names])))
    ours = gradient(4, augment="none", fusion=fusion)
    assert max(distance(ours[name], expected[name]) for name in names) < 1e-5


def test_fusions_in_evaluation_are_averages_over_time():
    model = clip.load("tiny").eval()
    video = torch.randint(256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    text = torch.randn(5, model.text_projection.shape[1])
    with torch.inference_mode():
        frames = torch.stack([model.logits(model.encode_image(video[:, t]), text) for t in range(3)])
        model.fusion = "decision"
        torch.testing.assert_close(model(video, text), frames.mean(0))
        model.fusion = "image"
        torch.testing.assert_close(model(video, text).softmax(-1), frames.softmax(-1).mean(0))


@pytest.mark.parametrize(("tune", "frozen", "trained"), [("image", "transformer.", "visual."),
                                                         ("text", "visual.", "transformer.")])
def test_one_encoder_alone_can_be_tuned(tune, frozen, trained):
    whole, part = gradient(8), gradient(4, tune=tune)
    assert {name for name in part if part[name] is not None} == {
        name for name in whole if name == "logit_scale" or (whole[name] is not None and (
            name.startswith("visual.") == (tune == "image")))}
    assert any(name.startswith(trained) for name in part)
    assert all(part[name] is None for name in part if name.startswith(frozen))
    assert max(distance(part[name], whole[name]) for name in part if part[name] is not None) < 1e-5


def test_checkpointed_activations_give_the_same_gradient(monkeypatch):
    whole, load = gradient(8), clip.load

    def load_checkpointing(weights):
        model = load(weights)
        model.visual.transformer.checkpointing = model.transformer.checkpointing = True
        return model

    monkeypatch.setattr(clip, "load", load_checkpointing)
    assert worst(gradient(8), whole) < 1e-6


SHORT = ("--shots", "8", "--frames", "2", "--batch-size", "16", "--micro-batch", "8", "--augment", "mix",
         "--epochs", "3")


def until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def interrupt(arguments, folder, lines, sign, home):
    """Runs train.py and sends a signal to it and its workers when its log has so many lines. Returns the exit status
    and the output."""
    process = subprocess.Popen([sys.executable, PROJECT / "train.py", *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HOME": str(home)},
                               start_new_session=True)
    log = folder / "log.jsonl"
    until(lambda: process.poll() is not None or log.exists() and len(log.read_text().splitlines()) >= lines)
    os.killpg(process.pid, sign)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


def test_ctrl_c_saves_too(home, tmp_path):
    status, output = interrupt([*SHORT, "--out", tmp_path, "--workers", "2"], tmp_path, 4, signal.SIGINT, home)
    assert status == 130
    assert f"to go on: python train.py --resume {tmp_path}" in output
    assert "Traceback" not in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == steps[-1]


def test_a_resumed_run_equals_an_uninterrupted_one(home, tmp_path):
    """To the bit, after SIGTERM in one epoch and SIGKILL in the next, with other numbers of workers."""
    alone, folder = tmp_path / "alone", tmp_path / "killed"
    script("train.py", *SHORT, "--out", alone, home=home)
    status, output = interrupt([*SHORT, "--out", folder, "--workers", "2"], folder, 6, signal.SIGTERM, home)
    assert status == 0
    assert f"to go on: python train.py --resume {folder}" in output
    resume = ["--resume", folder, "--workers", "3", "--save-minutes", "0"]
    status, output = interrupt(resume, folder, 18, signal.SIGKILL, home)
    assert status == -signal.SIGKILL
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 9')  # a line that was being written
    output = script("train.py", "--resume", folder, "--workers", "1", home=home).stdout
    assert "goes on after step " in output
    (folder / "args.json").write_text((folder / "args.json").read_text().replace('"shots": 8', '"shots": 9'))
    process = script("train.py", "--resume", folder, home=home, check=False)
    assert process.returncode == 1
    assert "is of a run on 200 videos of 25 classes, not these 225 of 25" in process.stderr
    one, other = (torch.load(path / "last.pt", weights_only=True) for path in (alone, folder))
    assert one["step"] == other["step"] == 36
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    moments = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    timing = {"videos_per_second", "data_wait"}
    records = [[{key: value for key, value in json.loads(line).items() if key not in timing}
                for line in (path / "log.jsonl").read_text().splitlines()] for path in (alone, folder)]
    assert records[0] == records[1]
    best = max(record["top1"] for record in records[0][1:] if "top1" in record)
    assert torch.load(alone / "best.pt", weights_only=True)["top1"] == best


def test_fp16_skips_steps_until_the_scale_fits(home, tmp_path):
    script("train.py", *SHORT, "--epochs", "1", "--amp", "fp16", "--out", tmp_path / "run", home=home)
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "loss" in line]
    skipped = [record["step"] for record in steps if "skipped" in record]
    assert len(skipped) < len(steps) / 2
    assert all(torch.isfinite(torch.tensor(record["gradient_norm"])) for record in steps if "skipped" not in record)
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights["model"].values())
    assert "scale" in weights["scaler"]


def test_two_nodes_are_two_torchruns(home, tmp_path):
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
    assert ["fine-tuned" in output for output in outputs] == [True, False]
    script("train.py", *SHORT, "--epochs", "1", "--tensorboard", "--out", tmp_path / "one", home=home)
    assert list((tmp_path / "one").glob("events.out.tfevents.*"))
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
               if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_process_that_dies_ends_the_run(home, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROJECT / "train.py",
         *SHORT, "--epochs", "500", "--workers", "0", "--out", tmp_path / "run"], start_new_session=True,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    begin = time.time()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert time.time() - begin < 60
    assert "train.py: error: another process has ended" in errors or "SIGKILL" in errors
