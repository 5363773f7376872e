"""Prompt learning: exactly the prompts are trained, and a checkpoint is the whole model with them."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read_results

import clip
import data
import prompt

SHORT = ("--data", "toy", "--classes", "novel", "--shots", "2", "--frames", "2", "--batch-size", "8", "--epochs", "2",
         "--workers", "0")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of prompt.py on weights that are tiny's, in a file of their own: its folder."""
    folder = tmp_path_factory.mktemp("prompts")
    shutil.copy(clip.MODELS["tiny"], folder / "backbone.pt")
    weights = ("--model", "tiny", "--weights", str(folder / "backbone.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prompt.py", *SHORT, *weights, "--out", str(folder / "run")])
        prompt.main()
    return folder / "run"


def test_exactly_the_prompts_are_trained(learned):
    before, after = clip.load("tiny").state_dict(), clip.load(learned / "best.pt").state_dict()
    prompts = {"visual_prompts", "text_prompts"}
    assert set(after) - set(before) == prompts
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = torch.load(learned / "last.pt", weights_only=True)
    assert len(last["optimizer"]["state"]) == 2
    model = clip.load("tiny")
    prompt.add_prompts(model, SimpleNamespace(weights=None, ctx=[1, 9], depth=[3, 3], seed=1024))
    assert all((after[name] - getattr(model, name)).abs().min() > 0 for name in prompts)


def test_accuracy_before_is_that_of_the_weights_without_prompts(learned, run, tmp_path):
    before = json.loads((learned / "log.jsonl").read_text().splitlines()[0])
    run("evaluate.py", "--weights", learned.parent / "backbone.pt", "--model", "tiny", "--classes", "novel", "--frames",
        "2", "--out", tmp_path)
    assert before["top1"] == read_results(tmp_path)["top1"]


def test_a_checkpoint_is_the_whole_model(learned, run, tmp_path):
    (learned.parent / "backbone.pt").rename(tmp_path / "elsewhere.pt")
    run("evaluate.py", "--weights", learned / "best.pt", "--classes", "novel", "--out", tmp_path)
    (tmp_path / "elsewhere.pt").rename(learned.parent / "backbone.pt")
    model = clip.load(learned / "best.pt")
    assert (model.frames, model.classes) == (2, data.load_samples("toy", classes="novel")[1])
    assert (clip.load("tiny").frames, clip.load("tiny").classes) == (None, None)
    log = (learned / "log.jsonl").read_text().splitlines()[1:]
    assert read_results(tmp_path)["top1"] == max(json.loads(line)["top1"] for line in log if "top1" in line)


@pytest.mark.parametrize(("ctx", "missing"), [((0, 2), "visual_prompts"), ((1, 0), "text_prompts")])
def test_one_encoder_alone_may_have_prompts(ctx, missing, run, tmp_path):
    run("prompt.py", *SHORT, "--epochs", "1", "--warmup-epochs", "0", "--ctx", *ctx, "--out", tmp_path / "run")
    model = clip.load(tmp_path / "run" / "best.pt")
    assert {name for name in ("visual_prompts", "text_prompts") if getattr(model, name) is None} == {missing}
    assert model.template == "{}."


@pytest.mark.parametrize(("vocabulary", "words"), [(49408, 4), (clip.TINY_VOCABULARY, 9)])
def test_as_few_text_prompts_as_a_photo_of_a_has_tokens_start_as_its_words(vocabulary, words):
    model = clip.CLIP(8, 32, 16, 64, 1, 77, vocabulary, 64, 2)
    embeddings = model.token_embedding(model.tokenizer(["a photo of a"]))[0, 1:-1]
    visual, text = prompt.make_prompts(model, (0, words), (1, 2), seed=1)
    assert visual is None
    assert torch.equal(text[0], embeddings)
    assert text[1].std() < 0.03
    visual, text = prompt.make_prompts(model, (3, words + 1), (1, 2), seed=1)
    assert text.std() < 0.03  # token embeddings have 1
    assert (visual.shape, text.shape) == ((1, 3, 64), (2, words + 1, 64))
    assert 0.01 < visual.std() < 0.03


def test_tuning_the_image_encoder_alone_leaves_the_prompts_of_the_text(run, tmp_path):
    short = "--classes novel --shots 1 --frames 1 --epochs 1 --batch-size 4 --workers 0".split()
    run("prompt.py", *short, "--out", tmp_path / "prompts")
    start = tmp_path / "prompts" / "best.pt"
    run("train.py", *short, "--warmup-epochs", "0", "--tune", "image", "--weights", start, "--out", tmp_path / "run")
    before, after = (torch.load(path, weights_only=True)["model"] for path in (start, tmp_path / "run" / "best.pt"))
    trained = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert trained == {"visual", "visual_prompts"}


def test_prompts_are_not_learned_on_top_of_prompts(learned, call):
    """And the corrected call may use the folder again."""
    arguments = ["prompt.py", *SHORT, "--epochs", "1", "--warmup-epochs", "0", "--out", learned / "again", "--weights"]
    status, _, errors = call(*arguments, learned / "best.pt")
    assert status == 1
    assert "has prompts already: give the weights that they were learned for" in errors
    status, out, _ = call(*arguments, learned.parent / "backbone.pt")
    assert (status, "the best model is" in out) == (0, True)
    assert (learned / "again" / "log.jsonl").read_text().count('"step": 0,') == 1


def test_prompts_take_places_of_the_text():
    model = clip.load("tiny")
    model.set_prompts(None, torch.zeros(2, 4, 128))
    assert model.tokenizer.context_length == 77 - 4
    with pytest.raises(clip.InputError, match="the model reads 73"):
        model.tokenizer(["x" * 72])
    model.set_prompts(None, None)
    assert model.tokenizer(["x" * 72]).shape == (1, 74)
