"""Every form of weights that clip.load reads, what it refuses, and downloads over a bad line."""
import gzip
import hashlib
import http.server
import os
import pickle
import sys
import threading
import types

import pytest
import torch
import transformers
from conftest import distance, small_clip

import clip


@pytest.fixture(scope="module")
def state(reference):
    return reference.state_dict()


@pytest.fixture
def base(state, tmp_path):
    torch.save(state, tmp_path / "base.pt")
    return tmp_path / "base.pt"


def archive(state, path):
    """Saves a state dict as OpenAI does: a TorchScript archive in half precision with three more entries."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    root = Module()
    more = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    for name, value in {**{name: value.half() for name, value in state.items()}, **more}.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value)
    torch.jit.script(root).save(str(path))


TEN_MORE = torch.tensor([0.0, 10.0])[:, None, None]


def vifi_clip(state, depth=0, n_ctx=0):
    """The state dict of the original code: "module." before all names, the encoders renamed, no word embeddings."""
    theirs = {"prompt_learner.complete_text_embeddings": torch.zeros(3, 77, 128)}
    for name, value in state.items():
        if name.startswith("visual."):
            theirs[name.replace("visual.", "image_encoder.")] = value
        elif name == "logit_scale":
            theirs[name] = value
        elif name != "token_embedding.weight":
            theirs[f"text_encoder.{name}"] = value
    if depth:
        del theirs["prompt_learner.complete_text_embeddings"]
        theirs["prompt_learner.ctx"], theirs["image_encoder.VPT"] = torch.full((2, n_ctx, 128), 10.0) + TEN_MORE
        theirs["prompt_learner.token_prefix"] = torch.zeros(3, 1, 128)
        theirs["prompt_learner.token_suffix"] = torch.zeros(3, 9, 128)
        for i in range(1, depth):
            theirs[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] = torch.full((n_ctx, 128), 10.0 + i)
            theirs[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"] = torch.full((n_ctx, 128), 20.0 + i)
    return {f"module.{name}": value for name, value in theirs.items()}


@pytest.fixture
def yacs(monkeypatch):
    """A stand-in for the package yacs while a checkpoint is written; it is gone when the checkpoint is read."""
    module, CfgNode = types.ModuleType("yacs.config"), type("CfgNode", (dict,), {})
    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = "yacs.config", "CfgNode", CfgNode

    def save(content, path):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            config = CfgNode(DATA=CfgNode(NUM_FRAMES=32), MODEL=CfgNode(ARCH="ViT-B/16"))
            config.__dict__["__immutable__"] = True
            torch.save({**content, "config": config}, path)

    return save


def assert_equal(model, state, precision=0.0):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for name, value in state.items():
        assert ours[name].dtype == torch.float32
        assert torch.allclose(ours[name], value.float(), rtol=precision, atol=precision), name


def test_openai_archive(state, tmp_path):
    archive(state, tmp_path / "ViT.pt")
    assert_equal(clip.load(tmp_path / "ViT.pt"), state, precision=2e-3)


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {}},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"epoch": 1, "state_dict": {f"module.{name}": value.half() for name, value in state.items()}},
    lambda state: {name if name.startswith(("visual", "logit")) else f"text.{name}": v for name, v in state.items()},
])
def test_state_dicts_of_openai_and_openclip(wrap, state, tmp_path):
    torch.save(wrap(state), tmp_path / "weights.pt")
    assert_equal(clip.load(tmp_path / "weights.pt"), state, precision=2e-3)


@pytest.mark.parametrize("safe", [True, False])
def test_hugging_face(safe, tmp_path):
    torch.manual_seed(0)
    size = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, hidden_act="quick_gelu")
    config = transformers.CLIPConfig(
        text_config=dict(size, num_hidden_layers=3, vocab_size=49408), projection_dim=64,
        vision_config=dict(size, num_hidden_layers=2, image_size=64, patch_size=16))
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if safe:
        theirs.save_pretrained(tmp_path)
        ours = clip.load(tmp_path / "model.safetensors")
    else:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        ours = clip.load(tmp_path / "pytorch_model.bin")
    images, tokens = torch.randn(3, 3, 64, 64), ours.tokenizer(["a photo of a dog", "archery"])
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=images, attention_mask=torch.ones_like(tokens))
        embedding = theirs.visual_projection(theirs.vision_model(images).pooler_output)
        text = theirs.text_projection(theirs.text_model(tokens).last_hidden_state[range(2), tokens.argmax(-1)])
        assert distance(ours.encode_image(images), embedding) < 1e-5
        assert distance(ours.encode_text(tokens), text) < 1e-5
        assert distance(ours(images[:, None], tokens), output.logits_per_image) < 1e-5


def test_vifi_clip(state, base, yacs, tmp_path):
    yacs({"model": vifi_clip(state), "optimizer": {}, "epoch": 9, "max_accuracy": 76.8}, tmp_path / "vifi.pth")
    model = clip.load(tmp_path / "vifi.pth", base=base)
    assert_equal(model, state)
    assert model.template == "a photo of a {}."
    black_and_white = model.normalize(torch.tensor([0, 255]).expand(3, 1, 2))[:, 0]
    expected = [[-m / s, (255 - m) / s] for m, s in ((123.675, 58.395), (116.28, 57.12), (103.53, 57.375))]
    assert torch.allclose(black_and_white, torch.tensor(expected), atol=1e-5)
    with pytest.raises(ValueError, match="needs the CLIP that it started from"):
        clip.load(tmp_path / "vifi.pth")


def test_prompted_vifi_clip(state, base, yacs, tmp_path):
    yacs({"model": vifi_clip(state, depth=2, n_ctx=5)}, tmp_path / "vifi.pth")
    model = clip.load(tmp_path / "vifi.pth", base=base)
    assert model.text_prompts[..., 0].tolist() == [[10.0] * 5, [11.0] * 5]
    assert model.visual_prompts[..., 0].tolist() == [[20.0] * 5, [21.0] * 5]
    assert model.template == "{}."


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_what_is_no_clip_is_told_in_one_line(state, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "resnet.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"model": torch.nn.Linear(1, 1)}, "module.pt")  # a pickled module, which holds no state dict
    torch.save({name: value for name, value in state.items() if "ln_final" not in name}, "incomplete.pt")
    torch.save(state, "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, text in {"truncated.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"no weights\n",
                       "truncated.safetensors": b"\x80\0\0\0\0\0\0\0{", "evil.pt": pickle.dumps(Malicious())}.items():
        (tmp_path / name).write_bytes(text)
    torch.save({"model": Malicious()}, "evil_zip.pt")
    for name in ("resnet", "other", "list", "module", "incomplete", "truncated", "empty", "text", "evil", "evil_zip"):
        with pytest.raises(ValueError, match=f"{name}.pt") as error:
            clip.load(f"{name}.pt")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="truncated.safetensors is damaged"):
        clip.load("truncated.safetensors")
    with pytest.raises(ValueError, match=r"resnet.pt is not a CLIP with a ViT \(visual.layer1.0.conv1.weight\); "):
        clip.load("resnet.pt")
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a model \(ViT-B/32.*: 'nothing.pt'"):
        clip.load("nothing.pt")
    assert not os.path.exists("harm")


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        clip.load(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

CONTENT = gzip.compress(os.urandom(300_000), 0)


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /<its SHA-256>/file.pt; `fault` says what is wrong with the next answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.requests = None, 0
        self.address = f"http://127.0.0.1:{self.server_port}/{hashlib.sha256(CONTENT).hexdigest()}/file.pt"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fault, self.server.fault = self.server.fault, None
        self.server.requests += 1
        if fault == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = bytes(len(CONTENT)) if fault == "wrong" else CONTENT
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    server = Server()
    yield server
    server.shutdown()


@pytest.mark.parametrize(("fault", "reason"), [("cut", "hash|retrieval|read"), ("wrong", "hash"), ("missing", "404")])
def test_a_file_takes_its_name_when_all_of_it_is_there(fault, reason, server, tmp_path):
    server.fault = fault
    message = f"cannot download file.pt: .*({reason}).* By hand: put {server.address} and"
    with pytest.raises(clip.InputError, match=message):
        clip.fetch(server.address)
    assert list((tmp_path / ".cache" / "clip").iterdir()) == []
    assert clip.fetch(server.address).read_bytes() == CONTENT
    assert clip.fetch(server.address) == tmp_path / ".cache" / "clip" / "file.pt"
    assert server.requests == 2


def test_without_a_network_both_files_and_their_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(clip.InputError, match="cannot download ViT-B-16.pt: <urlopen error") as error:
        clip.load("ViT-B/16")
    for part in (clip.MODELS["ViT-B/16"], clip.VOCABULARY, str(tmp_path / ".cache" / "clip")):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = clip.load("tiny").state_dict()
    state["visual.conv1.weight"][3, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(clip.InputError, match=r"nan\.pt is damaged: it has values that are not finite"):
        clip.load(tmp_path / "nan.pt")


@pytest.fixture(scope="module")
def gelu(state):
    """open_clip's CLIP with the weights of `reference` and the activation of LAION's and DataComp's."""
    model = small_clip(quick_gelu=False)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("file", "content", "activation"), [
    ("open_clip_config.json", '{"model_cfg": {"quick_gelu": true}}', "quick_gelu"),
    ("open_clip_config.json", '{"model_cfg": {}}', "gelu"),
    ("config.json", '{"vision_config": {"hidden_act": "gelu"}}', "gelu"),
    ("config.json", '{"vision_config": {"hidden_act": "quick_gelu"}}', "quick_gelu"),
    ("config.json", '{"mean": [], "std": ["a", 2], "image_mean": null}', "quick_gelu"),  # of something else
    ("other.json", "{}", "quick_gelu"),
])
def test_the_activation_is_that_of_the_configuration(file, content, activation, base, reference, gelu):
    base.with_name(file).write_text(content)
    model = clip.load(base)
    theirs, other = (gelu, reference) if activation == "gelu" else (reference, gelu)
    images = torch.randn(2, 3, 64, 64)
    tokens = model.tokenizer(["archery", "a dog."])
    with torch.no_grad():
        assert distance(model.encode_image(images), theirs.encode_image(images)) < 1e-5
        assert distance(model.encode_image(images), other.encode_image(images)) > 1e-4
        padded = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
        assert distance(model.encode_text(tokens), theirs.encode_text(padded)) < 1e-5


@pytest.mark.parametrize(("file", "content"), [
    ("open_clip_config.json", '{"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [\n0.25, 0.5, 0.25]}}'),
    ("preprocessor_config.json", '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25,0.5,0.25]}')])
def test_pixels_are_normalised_as_the_configuration_says(file, content, base):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    std = torch.tensor([0.25, 0.5, 0.25])[:, None, None]
    expected = (pixels / 255 - 0.5) / std
    assert not torch.allclose(clip.load(base).normalize(pixels), expected)
    base.with_name(file).write_text(content)
    torch.testing.assert_close(clip.load(base).normalize(pixels), expected)


def test_a_vocabulary_that_is_not_openais_is_refused(state, tmp_path):
    words = torch.cat([state["token_embedding.weight"], torch.zeros(1, 128)])
    torch.save({**state, "token_embedding.weight": words}, tmp_path / "words.pt")
    with pytest.raises(clip.InputError, match="has 49409 tokens, not the 49408 of OpenAI's tokenizer"):
        clip.load(tmp_path / "words.pt")


def test_weights_that_may_not_be_read_are_not_called_damaged(base, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError):
        clip.load(base)


def test_the_activation_may_be_said_and_is_stored(base, gelu, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert distance(clip.load(base, activation="gelu").encode_image(images), gelu.encode_image(images)) < 1e-5
    checkpoint = {"model": gelu.state_dict(), "template": "{}", "activation": "gelu", "args": {}}
    torch.save(checkpoint, tmp_path / "ours.pt")
    assert clip.load(tmp_path / "ours.pt").activation == "gelu"
