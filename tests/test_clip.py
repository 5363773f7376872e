"""The model and its tokenizer against open_clip and against formulas written out."""
import json
import zipfile

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import normalize

import clip

TEXTS = [
    "a photo of a dog.", "ApplyEyeMakeup", "  spaces \t and\nlines  ", "don't we'll I'M they've it's", "naïve café ﬁne",
    "smile 😀👍🏽 日本語 한국어", "&lt;b&gt; &amp;amp; &eacute;", "snake_case under__score", "3.14 and 1,000,000",
    "", "!!!???", "â€œquotedâ€\x9d",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3, "x" * 60,
]


@pytest.fixture
def model(reference, tmp_path):
    """Our CLIP with the weights of the reference, through a file."""
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    return clip.load(tmp_path / "weights.pt")


@pytest.fixture
def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a photo of archery.", "a dog", "a longer description of one video"])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_tokens_are_those_of_open_clip(model):
    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    ours = model.tokenizer(TEXTS, truncate=True)
    assert torch.equal(F.pad(ours, (0, 77 - ours.shape[1])), expected)


def test_tokens_are_as_long_as_the_longest_text_of_the_call(model):
    tokens = model.tokenizer(["dog", "a dog"])
    assert tokens.shape == (2, 4)
    assert tokens[0].tolist()[2:] == [49407, 0]


def test_a_text_that_is_too_long_is_shown(model):
    with pytest.raises(ValueError, match="a text of 82 tokens; the model reads 77: 'dog dog"):
        model.tokenizer(["dog " * 80])
    assert model.tokenizer(["dog " * 80], truncate=True).shape == (1, 77)


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


def test_openai_archive_loads(reference, tmp_path, tokens):
    """OpenAI's files are TorchScript archives in half precision with three entries that are no parameters."""

    class Archive(torch.nn.Module):
        def forward(self, x):
            return x

    archive = Archive()
    state = {name: value.half() for name, value in reference.state_dict().items()}
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        state[name] = torch.tensor(value)
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module = archive
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Archive())
            module = getattr(module, parent)
        module.register_buffer(leaf, value)
    torch.jit.script(archive).save(tmp_path / "ViT.pt")
    model = clip.load(tmp_path / "ViT.pt")
    assert model.logit_scale.dtype == torch.float32
    assert distance(model.encode_text(tokens), reference.encode_text(tokens)) < 1e-2  # half precision in the file


def test_what_is_no_clip_is_told_in_one_line(tmp_path):
    (tmp_path / "text.pt").write_text(json.dumps({"no": "weights"}))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name in ("text.pt", "other.pt", "zip.pt"):
        with pytest.raises(ValueError, match=name) as error:
            clip.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="ViT-B/16"):
        clip.load(tmp_path / "nothing.pt")


def test_weights_that_are_not_there_say_where_to_get_them():
    with pytest.raises(FileNotFoundError, match=r"ViT-B-16.pt is missing; get it from https://.*/ViT-B-16.pt"):
        clip.load("ViT-B/16")
