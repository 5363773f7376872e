"""Tensors on a GPU and on the CPU are not mixed, which shows without a GPU; and the precision suits the GPU."""
import copy
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import clip
import data
import evaluate
import prompt
import train

ITEM = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Gpu(TorchDispatchMode):
    """A GPU in name only. Tensors on it have no values, and each number that is asked of them is 1. Tensors on the CPU
    are real. An operation that mixes the two raises, as does float64 on the GPU, which some kinds do not have. To be
    entered within a FakeTensorMode."""

    has_float64 = False

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        if not any(isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs or {})
        if func in ITEM:
            return 1.0 if args[0].is_floating_point() else 1
        output = func(*tree_map(self.fake, args), **tree_map(self.fake, kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda and tensor.dtype == torch.float64 and not (
                    self.has_float64):
                raise TypeError(f"float64 on the GPU: {func}")
        return output

    @staticmethod
    def fake(x):
        """A stand-in for a real tensor."""
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@pytest.fixture(scope="module")
def tiny():
    """The tiny CLIP as a checkpoint would hold it, and as a model."""
    content = clip.read("tiny") | clip.IMAGENET
    return content, clip.load("tiny")


@pytest.fixture
def gpu(tiny, monkeypatch):
    """The only GPU of this machine, which has bf16. All files of weights are `tiny`."""
    monkeypatch.setattr(clip, "read", lambda *_: tiny[0])
    set_accelerator(monkeypatch, "cuda")
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU in name only")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None, raising=False)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)  # one mode for all
    monkeypatch.setattr(torch.Tensor, "backward", give_gradients)
    with FakeTensorMode(), Gpu(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Dd]isabling")  # mixed precision
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # torch's own deepcopy
        yield torch.device("cuda", 0)


def set_accelerator(monkeypatch, kind):
    """This machine has one GPU of a kind, or none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(kind is not None))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: kind and torch.device(kind))


def give_gradients(loss):
    """A gradient for each parameter that the loss depends on: autograd itself needs a real GPU."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.ones_like(node.variable)


def pixels(*shape):
    """Real pixels on the CPU."""
    return torch.randint(256, shape, dtype=torch.uint8)


def loader(*views, batches=2):
    """Batches as the workers hand them over: 4 videos of 3 frames."""
    return [(pixels(4, *views, 3, 3, 64, 64), torch.arange(4), torch.arange(4), [""] * 4) for _ in range(batches)]


@pytest.fixture
def model(gpu, tiny):
    return copy.deepcopy(tiny[1]).to(gpu)


@pytest.fixture
def tokens(model):
    return evaluate.class_tokens(model, ["box", "moon", "red ball"])


def test_the_check_notices_a_mixture_and_float64(model, tokens):
    video = pixels(2, 3, 3, 64, 64)
    for wrong in ((video.cuda, tokens.cpu), (video.cpu, tokens.cuda)):
        with pytest.raises(RuntimeError, match="device"):
            model(*(to() for to in wrong))
    for wrong in (torch.zeros(2, dtype=torch.float64).cuda, model.logit_scale.double):
        with pytest.raises(TypeError, match="float64"):
            wrong()


def test_a_model_is_on_one_device_whole(gpu, model):
    for loaded in (model, clip.load("tiny", gpu)):
        tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
        assert {"mean", "std", "logit_scale"} < tensors.keys()
        assert {tensor.device for tensor in tensors.values()} == {gpu}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_videos_and_class_names_meet_on_the_device(gpu, model, tokens, fusion, training):
    """The logits are float32 in any precision."""
    model.fusion = fusion
    model.train(training)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with evaluate.autocast(amp, gpu):
            logits = model(pixels(2, 3, 3, 64, 64).to(gpu), tokens)
            embedding = model.encode_image(pixels(2, 3, 64, 64).to(gpu))
        assert (logits.device, logits.dtype) == (gpu, torch.float32)
        assert logits.shape == (6 if training and fusion == "image" else 2, 3)
        assert (embedding.device, embedding.dtype) == (gpu, dtype)


def test_videos_are_augmented_and_normalised_on_the_device(gpu, model):
    video, target = pixels(16, 2, 3, 64, 64).to(gpu), torch.nn.functional.one_hot(torch.arange(16).to(gpu)).float()
    changed = data.change_colors(video, 0, 0, range(16))
    assert (changed.device, changed.dtype, changed.shape) == (gpu, torch.uint8, video.shape)
    normal = model.normalize(changed)
    for step in range(4):  # both mixup and CutMix
        mixed, targets = data.mix(normal, target, 0, step)
        assert (mixed.device, mixed.dtype, mixed.shape) == (gpu, torch.float32, video.shape)
        assert (targets.device, targets.dtype, targets.shape) == (gpu, torch.float32, target.shape)


def test_predictions_come_back_from_the_device(model, tokens):
    """Of several views."""
    scores, labels, _ = evaluate.predict(model, loader(6), tokens)
    assert (scores.device.type, labels.device.type) == ("cpu", "cpu")
    assert scores.shape == (8, 3)
    assert evaluate.evaluate(model, loader(1), tokens)["count"] == 8


def test_a_video_is_classified_on_the_device_of_the_model(model):
    answer = evaluate.classify(model, pixels(3, 3, 72, 80), ["box", "moon"])
    assert sorted(answer) == [("box", 1), ("moon", 1)]


def test_attention_comes_back_from_the_device(gpu, model, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "save_grid", lambda rows, _: drawn.extend(rows))
    monkeypatch.setattr(data, "read_video", lambda path, frames, rng, short_side: pixels(frames, 3, 72, 80))
    clips = data.VideoDataset([(Path("video.mp4"), 1)], 3, 64, train=False)
    evaluate.draw_attention({"one": model, "two": model}, None, [""], ["blue", "red ball"], clips, Path("attention"))
    assert [title for title, _ in drawn] == ["red ball", "one", "two"]
    assert {picture.device.type for _, picture in drawn} == {"cpu"}
    with evaluate.autocast("fp16", gpu):
        assert evaluate.attention(model, pixels(5, 3, 64, 64).to(gpu)).shape == (5, 4, 4)


def test_embeddings_come_back_from_the_device(gpu, model, tokens):
    with evaluate.autocast("bf16", gpu):
        videos, texts = evaluate.embed(model, loader(6), tokens)
    assert (videos.shape, texts.shape) == ((8, 128), (3, 128))
    assert (videos.device.type, texts.device.type) == ("cpu", "cpu")
    assert (videos.dtype, texts.dtype) == (torch.float32, torch.float32)


def test_models_are_blended_on_the_device(gpu):
    args = types.SimpleNamespace(weights="tuned.pt", before="tiny", before_activation=None, activation=None,
                                 template=None, blend=[0, 0.25])
    models = evaluate.load_models(args, gpu)
    assert list(models) == ["blend 0", "blend 0.25"]
    assert {parameter.device for model in models.values() for parameter in model.parameters()} == {gpu}


def test_prompts_are_made_and_used_on_the_device(gpu, model, tokens):
    for ctx in ((2, 3), (2, 12), (0, 3), (2, 0)):
        prompts = prompt.make_prompts(model, ctx, (3, 2), seed=0)
        assert {made.device for made in prompts if made is not None} == {gpu}
        model.set_prompts(*prompts)
        assert model(pixels(2, 3, 3, 64, 64).to(gpu), tokens).device == gpu


SAMPLES, CLASSES = [("video.avi", 0)] * 8, list("abcd")


def replace_files(monkeypatch, saved):
    """Batches for the workers', and checkpoints go to `saved`, {name: what they are made of}."""
    monkeypatch.setattr(data, "Loader", lambda clips, *_: loader(batches=4) if clips.train else loader(1))
    monkeypatch.setattr(train, "save", lambda path, *parts: saved.update({path.name: parts}))
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("script", [train, prompt])
def test_training_keeps_to_the_device(script, amp, gpu, tmp_path, monkeypatch):
    """Whole runs, from the flags to the last step, without what autograd does, reading and writing."""
    saved = {}
    monkeypatch.setattr(Gpu, "has_float64", amp == "fp16")  # for torch's GradScaler
    monkeypatch.setattr(data, "load_train_val", lambda _: (SAMPLES, SAMPLES, CLASSES))
    replace_files(monkeypatch, saved)
    flags = "--batch-size 8 --micro-batch 4 --frames 3 --augment mix --epochs 2 --out"
    monkeypatch.setattr("sys.argv", ["train.py", "--amp", amp, *flags.split(), str(tmp_path)])
    script.main()
    args, model, state, optimizer, scaler = saved["last.pt"]
    assert (state.step, args.gpus, scaler.is_enabled()) == (2, 1, amp == "fp16")
    assert {tensor.device for tensor in model.state_dict().values()} == {gpu}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(optimizer.state) == len(trained) == (2 if script is prompt else len(list(model.parameters())) - 1)
    assert {tensor.device for moments in optimizer.state.values() for tensor in moments.values()} == {gpu}


def test_a_resumed_run_is_on_the_device_whole(gpu, monkeypatch, tmp_path):
    """Its checkpoint is read to the CPU."""
    on_cpu = clip.load("tiny")
    train.freeze(on_cpu, "both")
    parameters = [parameter for parameter in on_cpu.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    content = dict(step=1, losses=[0.5], validations=[{"top1": 25}] * 2, unreadable=[], seconds=1.0, videos=8,
                   classes=CLASSES, model=on_cpu.state_dict(), optimizer=optimizer.state_dict(), scaler={})
    saved = {}
    monkeypatch.setattr(torch, "load", lambda path, **_: content)
    replace_files(monkeypatch, saved)
    (tmp_path / "last.pt").touch()
    settings = dict(out=tmp_path, gpus=1, world=1, amp="off", batch_size=8, micro_batch=4, frames=3, epochs=2)
    args = evaluate.choose_settings(settings, {}, train.PAPER, train.TINY)
    model, state = train.open_run(args, gpu, SAMPLES, CLASSES)
    assert (state.step, state.losses) == (1, [0.5])
    train.freeze(model, args.tune)
    train.train(args, model, state, SAMPLES, loader(1))
    *_, optimizer, _ = saved["last.pt"]
    assert state.step == 2
    assert {tensor.device for tensor in model.state_dict().values()} == {gpu}
    assert {tensor.device for moments in optimizer.state.values() for tensor in moments.values()} == {gpu}


@pytest.mark.parametrize(("kind", "has_bf16", "amp"), [
    ("cuda", True, "bf16"),  # H100
    ("cuda", False, "fp16"),  # Tesla T4, which emulates bf16; torch counts that by default
    ("xpu", False, "bf16"), ("mps", False, "off"), (None, False, "off")])
def test_the_precision_suits_the_gpu(kind, has_bf16, amp, monkeypatch):
    set_accelerator(monkeypatch, kind)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: has_bf16 or including_emulation and kind == "cuda")

    def choose(**given):
        args = types.SimpleNamespace(**dict(gpus=None, amp=None) | given)
        evaluate.choose_device(None, args)
        return args.gpus, args.amp, args.world

    found = int(kind is not None)
    assert choose() == (found, amp, 1)
    assert choose(gpus=0) == (0, "off", 1)  # the CPU of the same machine
    assert choose(amp="fp16") == (found, "fp16", 1)  # what is asked for
