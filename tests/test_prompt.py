"""Prompt learning: exactly the prompts are trained, and their checkpoints find the frozen rest again."""
import json
import shutil

import pytest
import torch
from conftest import read_results, script

import clip
import train

SHORT = ("--data", "toy", "--classes", "novel", "--shots", "2", "--frames", "2", "--batch-size", "8", "--epochs", "2")


@pytest.fixture(scope="module")
def learned(home, tmp_path_factory):
    """A run of prompt.py on weights that are tiny's, in a file of their own: its folder."""
    folder = tmp_path_factory.mktemp("prompts")
    shutil.copy(clip.MODELS["tiny"], folder / "backbone.pt")
    script("prompt.py", *SHORT, "--weights", folder / "backbone.pt", "--out", folder / "run", home=home)
    return folder / "run"


def test_exactly_the_prompts_are_trained(learned):
    before, after = clip.load("tiny").state_dict(), clip.load(learned / "best.pt").state_dict()
    assert set(after) - set(before) == {"visual_prompts", "text_prompts"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = torch.load(learned / "last.pt", weights_only=True)
    assert set(last["model"]) == {"visual_prompts", "text_prompts"}
    assert len(last["optimizer"]["state"]) == 2
    model = clip.load("tiny")
    torch.manual_seed(1024)
    model.add_prompts((1, 3), (9, 3))
    assert all((after[name] - getattr(model, name)).abs().min() > 0 for name in ("visual_prompts", "text_prompts"))
    train.choose_parameters(model, "prompts")
    logits = model(torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8), model.tokenizer(["a", "b"]))
    logits[0, 0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"visual_prompts", "text_prompts"}


def test_accuracy_before_is_that_of_the_weights_without_prompts(learned, run, tmp_path):
    before = json.loads((learned / "log.jsonl").read_text().splitlines()[0])
    run("evaluate.py", "--weights", learned.parent / "backbone.pt", "--model", "tiny", "--classes", "novel", "--frames",
        "2", "--out", tmp_path)
    assert before["top1"] == read_results(tmp_path)["top1"]


def test_a_checkpoint_is_small_and_finds_the_frozen_weights(learned, run, tmp_path):
    assert (learned / "best.pt").stat().st_size < 300_000
    run("evaluate.py", "--weights", learned / "best.pt", "--classes", "novel", "--out", tmp_path)
    results = read_results(tmp_path)
    log = (learned / "log.jsonl").read_text().splitlines()[1:]
    best = max(json.loads(line)["top1"] for line in log if "top1" in line)
    assert results["top1"] == best
    # Moved together, they find each other; alone, or with other weights, the prompts say what they lack.
    backbone = learned.parent / "backbone.pt"
    shutil.copy(learned / "best.pt", tmp_path)
    shutil.copy(backbone, tmp_path)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    sha256 = content["backbone"]["sha256"]
    content["backbone"]["path"] = "/nowhere/backbone.pt"
    torch.save(content, tmp_path / "best.pt")
    assert torch.equal(clip.load(tmp_path / "best.pt").visual.proj, clip.load("tiny").visual.proj)
    (tmp_path / "backbone.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"/nowhere/backbone.pt with the SHA-256 {sha256}, are neither there nor"):
        clip.load(tmp_path / "best.pt")


@pytest.mark.parametrize("encoder", ["vision", "text"])
def test_one_encoder_alone_may_have_prompts(encoder, run, tmp_path):
    run("prompt.py", *SHORT, "--epochs", "1", "--weights", "tiny", f"--ctx-{encoder}", "0", "--merge", "--out",
        tmp_path / "run")
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    other = {"vision": "text_prompts", "text": "visual_prompts"}[encoder]
    assert set(state["model"]) - set(clip.load("tiny").state_dict()) == {other}  # merged: all the others are there
    assert state["template"] == {"vision": "{}.", "text": "a photo of a {}."}[encoder]
    assert clip.load(tmp_path / "run" / "best.pt").template == state["template"]


@pytest.mark.parametrize(("vocabulary", "words"), [(49408, 4), (clip.TINY_VOCABULARY, 9)])
def test_as_few_text_prompts_as_a_photo_of_a_has_tokens_start_as_its_words(vocabulary, words):
    model = clip.CLIP(8, 32, 16, 64, 1, 77, vocabulary, 64, 2)
    embeddings = model.token_embedding(model.tokenizer(["a photo of a"]))[0, 1:-1]
    model.add_prompts((0, 1), (words, 2))
    assert model.visual_prompts is None
    assert torch.equal(model.text_prompts[0], embeddings)
    assert model.text_prompts[1].std() < 0.03
    model.add_prompts((0, 1), (words + 1, 2))
    assert model.text_prompts.std() < 0.03  # token embeddings have 1


def test_prompts_are_not_learned_on_top_of_prompts(learned, call):
    status, _, errors = call("prompt.py", *SHORT, "--weights", learned / "best.pt")
    assert status == 1
    assert "has prompts already: give the weights that they were learned for" in errors


def test_prompts_take_places_of_the_text():
    model = clip.load("tiny")
    model.add_prompts((0, 1), (4, 2))
    assert model.tokenizer.context_length == 77 - 4
    with pytest.raises(ValueError, match="the model reads 73"):
        model.tokenizer(["x" * 72])
