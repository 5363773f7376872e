"""The model and its tokenizer against open_clip and against formulas written out."""
import functools
import json
import os
import shutil
import subprocess
import sys
import time

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torchvision.transforms.v2.functional import normalize

import clip

TEXTS = [
    "a photo of a dog.", "ApplyEyeMakeup", "  spaces \t and\nlines  ", "don't we'll I'M they've it's", "naïve café ﬁne",
    "smile 😀👍🏽 日本語 한국어", "&lt;b&gt; &amp;amp; &eacute;", "snake_case under__score", "3.14 and 1,000,000",
    "", "!!!???", "â€œquotedâ€\x9d",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3, "x" * 60,
]

LONG = 20_000  # tokens


@pytest.fixture
def model(reference, tmp_path):
    """Our CLIP with the weights of the reference, through a file."""
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    return clip.load(tmp_path / "weights.pt")


@functools.cache
def their_tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture
def tokens():
    return their_tokenizer()(["a photo of archery.", "a dog", "a longer description of one video"])


def assert_tokens_are_those_of_open_clip(tokenizer, texts):
    """With a context that is long enough for all."""
    tokenizer.context_length = LONG
    ours, theirs = tokenizer(texts), their_tokenizer()(texts, context_length=LONG)
    assert torch.equal(F.pad(ours, (0, LONG - ours.shape[1])), theirs)


def test_tokens_are_those_of_open_clip(model):
    assert_tokens_are_those_of_open_clip(model.tokenizer, TEXTS)


def test_tokens_are_as_long_as_the_longest_text_of_the_call(model):
    tokens = model.tokenizer(["dog", "a dog"])
    assert tokens.shape == (2, 4)
    assert tokens[0].tolist()[2:] == [49407, 0]


def test_a_text_that_is_too_long_is_shown(model):
    with pytest.raises(ValueError, match="a text of 82 tokens; the model reads 77: 'dog dog"):
        model.tokenizer(["dog " * 80])
    assert model.tokenizer(["dog " * 75]).shape == (1, 77)


def test_tiny_vocabulary_is_one_token_a_byte():
    tokenizer = clip.load("tiny").tokenizer
    ids = tokenizer(["ab é"])[0].tolist()
    # printable ASCII comes first, from "!" on; a word ends with the token 256 higher. é is the bytes C3 A9.
    latin = {0xC3: 94 + 12 + 0xC3 - 0xAE, 0xA9: 94 + 0xA9 - 0xA1}
    assert ids == [512, ord("a") - 33, 256 + ord("b") - 33, latin[0xC3], 256 + latin[0xA9], 513]
    assert len(tokenizer.ids) == 512


def test_attention_is_the_formula_written_out():
    torch.manual_seed(0)
    attention = clip.Attention(128)
    attention.in_proj_bias.data.normal_()
    x = torch.randn(2, 5, 128)
    q, k, v = (x @ w.T + b for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))
    for causal in (False, True):
        heads = []
        for h in range(2):
            part = slice(64 * h, 64 * h + 64)
            scores = torch.einsum("nqd,nkd->nqk", q[..., part], k[..., part]) / 8
            if causal:
                scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            heads.append(torch.einsum("nqk,nkd->nqd", scores.exp() / scores.exp().sum(-1, keepdim=True), v[..., part]))
        expected = torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
        assert distance(attention(x, causal), expected) < 1e-5


def test_embeddings_and_logits_are_those_of_open_clip(model, reference, tokens):
    video = torch.randn(2, 3, 3, 64, 64)
    frames = torch.stack([reference.encode_image(video[:, t]) for t in range(3)])
    assert distance(model.encode_image(video[:, 0]), frames[0]) < 1e-5
    assert distance(model.encode_video(video), frames.mean(0)) < 1e-5
    assert distance(model.encode_text(tokens), reference.encode_text(tokens)) < 1e-5
    cosine = F.cosine_similarity(frames.mean(0)[:, None], reference.encode_text(tokens)[None], dim=-1)
    assert distance(model(video, tokens), reference.logit_scale.exp() * cosine) < 1e-5


def test_uint8_is_normalised_with_the_mean_and_std_of_the_model(model):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert distance(model.encode_image(pixels), model.encode_image(normalize(pixels / 255, mean, std))) < 1e-5


def test_text_after_the_end_token_does_not_matter(model, tokens):
    """Cut after the longest prompt or padded to 77: the same embeddings and the same gradients."""
    length = int((tokens != 0).sum(-1).max())
    assert length < 77
    results = []
    for cut in (tokens, tokens[:, :length]):
        model.zero_grad()
        embedding = model.encode_text(cut)
        embedding.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((embedding, grads))
    (full, full_grads), (short, short_grads) = results
    assert distance(short, full) < 1e-5
    assert full_grads.keys() == short_grads.keys()
    assert "token_embedding.weight" in full_grads
    for name, grad in full_grads.items():
        assert distance(short_grads[name], grad) < 1e-5, name


NASTY = st.text(st.sampled_from("aZé ß'_&;<#0½日한😀ﬁ\u0301\n\u200d-.tsrvemld"), max_size=60)


@given(st.lists(st.one_of(st.text(max_size=60), NASTY), min_size=1, max_size=50))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_tokens_of_any_text_are_those_of_open_clip(texts):
    assert_tokens_are_those_of_open_clip(tokenizer(), texts)


@functools.cache
def tokenizer():
    return clip.Tokenizer(49408, LONG)


def test_a_very_long_word_takes_no_time_to_speak_of():
    begin = time.perf_counter()
    tokenizer()(["qzjxk" * 2000])
    assert time.perf_counter() - begin < 10  # it was minutes when joining was quadratic


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"])
def test_the_four_models_are_those_of_open_clip(name, tmp_path, monkeypatch):
    """Of the size of OpenAI's, with random weights; biases and norms are spread too, so that a swapped one shows. The
    last differs from the third by its larger images: two of its layers stand for all."""
    torch.manual_seed(0)
    for function in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, function, lambda tensor, *args, **kwargs: tensor)  # saves half a minute
    config = open_clip.get_model_config(name)
    if name == "ViT-L-14-336":
        assert config["vision_cfg"] | {"image_size": 224} == open_clip.get_model_config("ViT-L-14")["vision_cfg"]
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    theirs = open_clip.CLIP(**config, quick_gelu=True)
    with torch.no_grad():
        for weight_name, weight in theirs.named_parameters():
            weight.uniform_(-0.05, 0.05).add_("ln_" in weight_name)
        theirs.logit_scale.fill_(3)
    monkeypatch.setattr(clip, "unpack", lambda path: theirs.state_dict())  # 1.7 GB for the larger ones: not on disk
    (tmp_path / "weights.pt").touch()
    ours = clip.load(tmp_path / "weights.pt")
    assert ours.image_size == theirs.visual.image_size[0]
    frames = 1 if "L" in name else 2  # these take long
    video = torch.randn(1, frames, 3, ours.image_size, ours.image_size)
    tokens = ours.tokenizer(["a photo of archery.", "somebody is juggling balls"])
    with torch.no_grad():
        frames, text = theirs.encode_image(video[0]), theirs.encode_text(F.pad(tokens, (0, 77 - tokens.shape[1])))
        logits = theirs.logit_scale.exp() * F.cosine_similarity(frames.mean(0)[None], text)
        assert distance(ours.encode_image(video[0]), frames) < 1e-5
        assert distance(ours.encode_text(tokens), text) < 1e-5
        assert distance(ours(video, tokens), logits[None]) < 1e-5  # by encode_video


@torch.no_grad()
def test_mixed_precision_is_close_and_logits_stay_in_float32(model, tokens):
    video = torch.randn(2, 3, 3, 64, 64)
    exact, text = model(video, tokens), model.encode_text(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(video, tokens)
        assert distance(model.encode_text(tokens).float(), text) < 2e-2
    assert mixed.dtype == torch.float32
    assert distance(mixed, exact) < 2e-2


def blocks_written_out(x, resblocks, prompts, at, causal):
    """A transformer whose tokens at `at` ... are overwritten with prompts before each of its first blocks, a loop."""
    for i, block in enumerate(resblocks):
        rows = [[prompts[i][t - at] if i < len(prompts) and at <= t < at + prompts.shape[1] else row[t]
                 for t in range(len(row))] for row in x]
        x = torch.stack([torch.stack(row) for row in rows])
        normed = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias)
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1) if causal else None
        x = x + F.multi_head_attention_forward(
            *[normed.transpose(0, 1)] * 3, x.shape[-1], x.shape[-1] // 64, block.attn.in_proj_weight,
            block.attn.in_proj_bias, None, None, False, 0.0, block.attn.out_proj.weight, block.attn.out_proj.bias,
            need_weights=False, attn_mask=mask)[0].transpose(0, 1)
        x = x + block.mlp(F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias))
    return x


@pytest.mark.parametrize("depth", [1, 2])
def test_text_prompts_are_a_plain_loop(model, depth):
    """They stand between start token and text, with the positions of their place; deeper ones overwrite them."""
    prompts, tokens = torch.randn(depth, 4, 128), model.tokenizer(["archery.", "a dog."])
    model.text_prompts = torch.nn.Parameter(prompts)
    word, position = model.token_embedding.weight[tokens], model.positional_embedding
    rows = [torch.cat([w[:1], prompts[0], w[1:]]) + position[: 4 + len(w)] for w in word]
    deeper = torch.cat([prompts[:1] + position[1:5], prompts[1:]])  # the first block's keep their positions
    x = blocks_written_out(torch.stack(rows), model.transformer.resblocks, deeper, 1, causal=True)
    ends = torch.stack([row[4 + ids.tolist().index(49407)] for row, ids in zip(x, tokens)])
    expected = F.layer_norm(ends, (128,), model.ln_final.weight, model.ln_final.bias) @ model.text_projection
    assert distance(model.encode_text(tokens), expected) < 1e-5


@pytest.mark.parametrize("depth", [1, 2])
def test_visual_prompts_are_a_plain_loop(model, depth):
    """They stand behind the patches without position, the first go through ln_pre, deeper ones overwrite them."""
    prompts, images, vit = torch.randn(depth, 3, 128), torch.randn(2, 3, 64, 64), model.visual
    model.visual_prompts = torch.nn.Parameter(prompts)

    def ln_pre(x):
        return F.layer_norm(x, (128,), vit.ln_pre.weight, vit.ln_pre.bias)

    patches = F.unfold(images, 16, stride=16).transpose(1, 2) @ vit.conv1.weight.flatten(1).T  # [2, 16, 128]
    first = torch.cat([vit.class_embedding.expand(2, 1, -1), patches], dim=1) + vit.positional_embedding
    rows = [torch.cat([image, prompts[0]]) for image in first]
    deeper = torch.cat([ln_pre(prompts[:1]), prompts[1:]])
    x = blocks_written_out(ln_pre(torch.stack(rows)), vit.transformer.resblocks, deeper, 17, causal=False)
    expected = F.layer_norm(x[:, 0], (128,), vit.ln_post.weight, vit.ln_post.bias) @ vit.proj
    assert distance(model.encode_image(images), expected) < 1e-5


def test_prompts_are_part_of_the_state_dict_and_load_again(model, tmp_path):
    assert not [name for name in model.state_dict() if "prompts" in name]
    model.text_prompts = torch.nn.Parameter(torch.randn(2, 4, 128))
    torch.save(model.state_dict(), tmp_path / "prompted.pt")
    again = clip.load(tmp_path / "prompted.pt")
    assert torch.equal(again.text_prompts, model.text_prompts)
    assert again.visual_prompts is None


def test_the_file_alone_works_in_another_project(tmp_path):
    """A copy of clip.py needs nothing else of this project."""
    shutil.copy(clip.__file__, tmp_path)
    shutil.copy(clip.MODELS["tiny"], tmp_path / "weights.pt")
    code = """\
import clip, torch
model = clip.load("weights.pt")
tokens = model.tokenizer(["a red ball", "a blue cone"])
print(model(torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), tokens).tolist())
try:
    clip.load("tiny")
except FileNotFoundError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
                         check=True).stdout.splitlines()
    model = clip.load("tiny")
    logits = model(torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), model.tokenizer(["a red ball", "a blue cone"]))
    assert json.loads(out[0]) == [pytest.approx(row, rel=1e-4) for row in logits.tolist()]
    assert "neither a file nor a model" in out[1]
    assert out[1].endswith(f"'{tmp_path / 'toy' / 'tiny.pt'}'")


def test_the_encoders_compile_whole_and_not_again_for_other_classes():
    """One graph each, without breaks; a second one, of any size, when the sizes change for the first time."""
    model, graphs = clip.load("tiny"), {"text": CompileCounter(), "image": CompileCounter()}
    model.transformer.compile(backend=graphs["text"], fullgraph=True)
    model.visual.compile(backend=graphs["image"], fullgraph=True)
    for i, (classes, length, images) in enumerate([(5, 7, 16), (6, 9, 8), (101, 12, 24), (40, 8, 4)]):
        model.encode_text(torch.randint(1, 500, (classes, length))).sum().backward()
        model.encode_image(torch.randn(images, 3, 64, 64)).sum().backward()
        assert [counter.frame_count for counter in graphs.values()] == [min(i + 1, 2)] * 2
