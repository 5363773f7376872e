"""CLIP for videos: the model of ViFi-CLIP, from the text tokenizer to loading OpenAI's weights.

CLIP (Radford et al., 2021, arXiv 2103.00020) has two transformers, one for images and one for text, that embed both in
one space. ViFi-CLIP (arXiv 2212.03640, section 3) takes it as it is, encodes every frame of a video on its own and
averages over time; the class whose name lies nearest wins:

    v = 1/T * sum over t of encode_image(frame t)         the video embedding, [D]
    logits_c = exp(logit_scale) * cos(v, encode_text(name of class c))

Nothing is added: no layer looks across time. The parameters have OpenAI's own names, so OpenAI's weights fit as is.

Shapes: B videos of T frames, N images, S pixels a side, C texts of L tokens, D the width of the common space.
"""
import collections
import contextlib
import fcntl
import functools
import gzip
import hashlib
import html
import http.client
import os
import pickle
import re
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# From text to tokens

TINY_VOCABULARY = 2 * 256 + 2  # bytes, bytes that end a word, start and end: no merges


class Tokenizer:
    """CLIP's tokenizer: byte-pair encoding of lower-case text, as in github.com/openai/CLIP, clip/simple_tokenizer.py.

    Starts from the 256 bytes, then the 256 bytes at the end of a word, and joins pairs in the order in which `merges`
    lists them. OpenAI's vocabulary has 48,894 merges (49,408 tokens with start and end), the one of `tiny` has none.
    """

    def __init__(self, merges=(), context_length=77):
        # Each byte has a printable character: itself, or, for the 68 that are not printable, one from 256 on.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        self.character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        alphabet = list(self.character.values())
        tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.start, self.end = len(tokens), len(tokens) + 1
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.context_length = context_length
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def encode(self, text):
        """The token ids of one text, a list of int without start and end."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        return [token for word in self.words.findall(text) for token in self.encode_word(word)]

    def encode_word(self, word):
        """The token ids of one word: of the pairs in it, the one that comes first in the merges is joined, again and
        again, until none of them is a merge."""
        parts = [self.character[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):  # join every occurrence of the best pair, from the left
                n = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + n]))
                i += n
            parts = joined
        return [self.ids[part] for part in parts]

    def __call__(self, texts, truncate=False):
        """Tokens of C texts, int64 [C, L], with start and end and then zeros; L is the longest text of the call.

        L is not always the full context length because nothing after the end token can matter: attention is causal and
        the text is read out at its end token. For short class names most of the 77 tokens would be computed in vain.

        Raises ValueError for a text of more than `context_length` tokens, unless `truncate`, which keeps the first.
        """
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > self.context_length - 2 and not truncate:
                raise ValueError(f"a text of {len(ids) + 2} tokens; the model reads {self.context_length}: {text!r}")
            rows.append([self.start, *ids[: self.context_length - 2], self.end])
        tokens = torch.zeros(len(rows), max(map(len, rows), default=2), dtype=torch.int64)
        for row, ids in zip(tokens, rows):
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------------------------------------------------------------
# The transformers


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention, batch first. Heads are 64 wide."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x):
        """x [N, L, width] to queries, keys and values, [3, N, heads, L, 64]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [N, L, 3 * width]
        return qkv.unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)

    def forward(self, x, causal):  # [N, L, width]
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        return F.silu(1.702 * x) / 1.702  # x * sigmoid(1.702 x), with one tensor kept for the way back, not two


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, causal):
        super().__init__()
        self.causal = causal
        self.checkpointing = False  # keep only what enters each block, and compute the rest again on the way back
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, prompts=None, at=None):
        """x [N, L, width] to the same shape.

        Of `prompts`, [depth, n_ctx, width], prompts[0] is already in x, at the positions `at` to `at + n_ctx`; before
        block i these positions are overwritten with prompts[i], up to the depth (section 3.2, and VPT, 2203.12119).
        """
        for i, block in enumerate(self.resblocks):
            if prompts is not None and 0 < i < len(prompts):
                x = torch.cat([x[:, :at], prompts[i].expand(len(x), -1, -1), x[:, at + prompts.shape[1] :]], dim=1)
            x = checkpoint(block, x, self.causal, use_reentrant=False) if self.checkpointing else block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    """An image is cut into patches; the class token, the first of the sequence, becomes its embedding."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        patches = (image_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)

    def forward(self, images, prompts=None):  # [N, 3, S, S], [depth, n_ctx, width] -> [N, D]
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [N, patches, width]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        at = x.shape[1]
        if prompts is not None:  # behind the patches, without position
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)
        x = self.transformer(self.ln_pre(x), prompts, at)
        return self.ln_post(x[:, 0]) @ self.proj


PROMPTS = ("visual_prompts", "text_prompts")  # the parameters that OpenAI's models do not have


class CLIP(nn.Module):
    """The two encoders and the scale of their similarity.

    Beside its parameters it keeps what its weights are used to: `mean` and `std` of the pixels, OpenAI's until a
    checkpoint says otherwise, the `template` that makes a sentence of a class name, the bare name until then, and the
    `fusion` over time.
    """

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers):
        super().__init__()
        self.image_size, self.vocab_size = image_size, vocab_size
        self.visual = VisionTransformer(image_size, patch_size, vision_width, vision_layers, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # Prompts [depth, n_ctx, width] of the two encoders (section 3.2), None in a model without.
        self.register_parameter("visual_prompts", None)
        self.register_parameter("text_prompts", None)
        # Not persistent: a state dict has OpenAI's entries and no others. On the CPU: `load` builds on the device meta.
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073], device="cpu"), persistent=False)
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711], device="cpu"), persistent=False)
        self.template, self.fusion = "{}", "embedding"
        self.backbone = None  # of prompts that are kept alone: where the other weights are, {"path", "sha256"}

    @functools.cached_property
    def tokenizer(self):
        merges = [] if self.vocab_size == TINY_VOCABULARY else read_merges(self.vocab_size)
        prompts = 0 if self.text_prompts is None else self.text_prompts.shape[1]  # they need positions too
        return Tokenizer(merges, len(self.positional_embedding) - prompts)

    def add_prompts(self, vision, text):
        """Gives the encoders new prompts: each (n_ctx, depth), n_ctx of 0 for none. Normal with std 0.02, but as few
        text prompts as "a photo of a" has tokens, four with OpenAI's vocabulary, start in the first layer as its words.
        """
        device = self.logit_scale.device
        words = self.token_embedding(self.tokenizer(["a photo of a"]).to(device))[0, 1:-1].detach()  # [words, width]
        for name, (n_ctx, depth), width in (("visual_prompts", vision, len(self.visual.proj)),
                                            ("text_prompts", text, len(self.text_projection))):
            prompts = torch.randn(depth, n_ctx, width).to(device) * 0.02
            if name == "text_prompts" and 0 < n_ctx <= len(words):
                prompts[0] = words[:n_ctx]
            setattr(self, name, nn.Parameter(prompts) if n_ctx else None)
        del self.tokenizer  # it is made again for the positions that are left

    def normalize(self, pixels):
        """Pixels of any dtype in 0..255, [..., 3, S, S], to float with the mean and std that the weights know."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return (pixels / 255 - mean) / std

    def encode_image(self, images):
        """Images [N, 3, S, S], raw uint8 or normalised float, to embeddings [N, D], not normalised."""
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        return self.visual(images, self.visual_prompts)

    def encode_video(self, video):
        """Videos [B, T, 3, S, S] to embeddings [B, D], not normalised: the mean of their frames' (section 3.1)."""
        frames = self.encode_image(video.flatten(0, 1))  # [B * T, D]
        return frames.unflatten(0, video.shape[:2]).mean(dim=1)

    def encode_text(self, tokens):
        """Tokens [C, L], as `tokenizer` makes them, to embeddings [C, D], not normalised."""
        x = self.token_embedding(tokens)  # [C, L, width]
        end = tokens.argmax(dim=-1)  # the end token has the highest id of the vocabulary
        if self.text_prompts is not None:  # between the start token and the text
            x = torch.cat([x[:, :1], self.text_prompts[0].expand(len(x), -1, -1), x[:, 1:]], dim=1)
            end = end + self.text_prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer(x, self.text_prompts, at=1))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def logits(self, video, text):
        """Scaled cosines of video embeddings [..., D] and text embeddings [C, D]: [..., C], always in float32, since
        in bfloat16 a logit near 30 is only good to 0.1."""
        with torch.autocast(video.device.type, enabled=False):
            video, text = F.normalize(video.float(), dim=-1), F.normalize(text.float(), dim=-1)
            return self.logit_scale.float().exp() * video @ text.T

    def compare(self, frames, text):
        """Embeddings of the frames of videos, [B, T, D], and of texts, [C, D], to logits [B, C].

        `fusion` says what is averaged over time (the paper's ablation): "embedding", the embeddings of the frames;
        "decision", their logits; "image", their probabilities, and when training nothing: [B * T, C], an example each.
        """
        if self.fusion == "embedding":
            return self.logits(frames.mean(dim=1), text)
        logits = self.logits(frames, text)  # [B, T, C]
        if self.fusion == "decision":
            return logits.mean(dim=1)
        # A logarithm of the mean probability, up to a constant.
        return logits.flatten(0, 1) if self.training else logits.log_softmax(dim=-1).logsumexp(dim=1)

    def forward(self, video, tokens):
        """Videos [B, T, 3, S, S] and the tokens [C, L] of C classes, or their embeddings [C, D], to logits [B, C]."""
        text = tokens if tokens.is_floating_point() else self.encode_text(tokens)
        frames = self.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2])  # [B, T, D]
        return self.compare(frames, text)


# ---------------------------------------------------------------------------------------------------------------------
# Getting weights

ADDRESS = "https://openaipublic.azureedge.net/clip/models"  # below it, each file is in a folder named by its SHA-256
MODELS = {
    "ViT-B/32": f"{ADDRESS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{ADDRESS}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{ADDRESS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": f"{ADDRESS}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
    "tiny": str(Path(__file__).parent / "toy" / "tiny.pt"),
}
VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
TIMEOUT = 20  # seconds without a byte after which a connection counts as broken
ATTEMPTS = 3  # in a row without a new byte, after which a download is given up


def fetch(address):
    """The path of the file at an address, which for OpenAI's is in the cache folder of their own package. What is not
    there is downloaded; what has no "://" is a path already.

    A download grows in NAME.part, which a later call resumes, and takes its name once its SHA-256 is right. Raises
    OSError that says what to put where by hand if that fails.
    """
    if "://" not in address:
        return Path(address)
    sha256 = VOCABULARY_SHA256 if address == VOCABULARY else address.split("/")[-2]
    path = Path.home() / ".cache" / "clip" / address.split("/")[-1]
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of two processes one downloads and the other waits here, until ...
            if path.exists():  # ... it finds the file
                part.unlink(missing_ok=True)
                return path
            download(address, file)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                file.truncate(0)
                raise OSError("what came has the wrong SHA-256")
            part.rename(path)
    except (OSError, http.client.HTTPException) as error:
        files = " and ".join(dict.fromkeys((address, VOCABULARY)))
        raise OSError(f"cannot download {path.name}: {error}. By hand: put {files} into {path.parent}") from error
    return path


def download(address, file):
    """Appends to an open file what it still lacks of an address, over as many connections as that takes."""
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            request = urllib.request.Request(address, headers={"Range": f"bytes={before}-"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status != 206:  # not the rest but the whole
                    file.truncate(0)
                total = file.seek(0, os.SEEK_END) + int(answer.headers.get("Content-Length", 0))
                name = address.split("/")[-1]
                with tqdm(desc=name, total=total, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := answer.read(2 ** 20):
                        bar.update(file.write(chunk))
                if file.tell() >= total:
                    return
                raise OSError(f"the connection broke after {file.tell()} of {total} bytes")
        except (OSError, http.client.HTTPException) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if status == 416:  # nothing lies behind what is here already
                return
            failures = 0 if file.tell() > before else failures + 1
            if failures == ATTEMPTS or status == 404:
                raise
            time.sleep(failures)


def read_merges(vocab_size):
    """The merges of a vocabulary of that size: pairs of tokens, from OpenAI's vocabulary file."""
    with gzip.open(fetch(VOCABULARY), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [tuple(line.split()) for line in lines[1 : vocab_size - TINY_VOCABULARY + 1]]  # the first line is a comment


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights

# The original ViFi-CLIP normalises pixels like this, and not as CLIP does.
IMAGENET = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}
NO_PARAMETERS = ("input_resolution", "context_length", "vocab_size")  # three more entries of OpenAI's archives
SUPPORTED = ("supported are CLIPs with a ViT from OpenAI, Hugging Face and OpenCLIP, and checkpoints of this project "
             "and of the original ViFi-CLIP")


def unpack(path):
    """The content of a file of weights. Nothing but tensors and plain containers is unpickled.

    Raises ValueError if it is no such file, or a damaged one.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional dependency

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if scripted:  # OpenAI's own files are TorchScript, which torch.load refuses
                with warnings.catch_warnings(action="ignore"):  # it is deprecated, and there is no other way
                    return torch.jit.load(path, map_location="cpu").state_dict()
        # Checkpoints of the original ViFi-CLIP hold their settings in a CfgNode of the package yacs, a kind of dict.
        with torch.serialization.safe_globals([(collections.OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        code = re.search(r"GLOBAL (\S+)|global (\S+)", str(error))
        reason = f": it wants to run {code[1] or code[2]}" if code else ""
        raise ValueError(f"{path} is damaged or not a file of weights{reason} ({SUPPORTED})") from error
    except PermissionError:
        raise
    except Exception as error:  # torch and safetensors raise almost anything for a damaged file
        raise ValueError(f"{path} is damaged or not a file of weights ({SUPPORTED})") from error


# OpenAI's names for parts of the names in Hugging Face's CLIPModel, to be replaced in this order
HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # spelled like that
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "self_attn.": "attn.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def from_hugging_face(state):
    """The state dict of a CLIPModel of Hugging Face's transformers in OpenAI's names and layout."""
    ours = {}
    for name, value in state.items():
        for theirs, openai in HUGGING_FACE.items():
            name = name.replace(theirs, openai)
        ours[name] = value.T if name in ("visual.proj", "text_projection") else value
    for name in [name for name in ours if ".q_proj." in name]:  # three matrices there are one here
        parts = [ours.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        ours[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return {name: value for name, value in ours.items() if not name.endswith("position_ids")}


def from_vifi_clip(state, base):
    """The state dict of the original ViFi-CLIP code in OpenAI's names. The word embeddings, not trained there and not
    stored, come from `base`. Prompts, which lie in the blocks there, become `visual_prompts` and `text_prompts`."""
    ours = {}
    for name, value in state.items():
        if not name.startswith("prompt_learner.") and "VPT" not in name:
            ours[name.replace("image_encoder.", "visual.").replace("text_encoder.", "")] = value
    for prompts, first, encoder in (("visual_prompts", "image_encoder.VPT", "image_encoder"),
                                    ("text_prompts", "prompt_learner.ctx", "text_encoder")):
        if first in state:
            layers = [state[first]]
            while (name := f"{encoder}.transformer.resblocks.{len(layers)}.VPT_shallow") in state:
                layers.append(state[name])
            ours[prompts] = torch.stack(layers)
    if base is None:
        width_and_positions = ours["visual.positional_embedding"].shape[::-1]
        base = {(768, 50): "ViT-B/32", (768, 197): "ViT-B/16", (1024, 257): "ViT-L/14",
                (1024, 577): "ViT-L/14@336px"}.get(width_and_positions)
        if base is None:
            raise ValueError("a checkpoint of the original ViFi-CLIP needs the CLIP that it was made from as `base`")
    ours["token_embedding.weight"] = read(base)["model"]["token_embedding.weight"]
    return ours


def locate(weights):
    """The path of a name in MODELS, which is downloaded if need be, or of a file."""
    path = fetch(MODELS[weights]) if weights in MODELS else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is neither a file nor a model; the models are {', '.join(MODELS)}")
    return path


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_backbone(path, backbone):
    """What is in the file of weights that the prompts in `path` were learned for: beside it, or where it was."""
    for weights in (str(path.parent / Path(backbone["path"]).name), backbone["path"]):
        with contextlib.suppress(FileNotFoundError):
            if sha256(locate(weights)) == backbone["sha256"]:
                return read(weights)
    raise ValueError(f"{path} holds prompts alone; the weights that they belong to, {backbone['path']} with the "
                     f"SHA-256 {backbone['sha256']}, are neither there nor beside it")


def read(weights, base=None):
    """What is in a file of weights: a dict with the state dict, in OpenAI's names, as "model", and of a checkpoint also
    "mean", "std", "template", "fusion", "classes", "args" and, of prompts that were kept alone, "backbone". The
    arguments and errors are those of `load`."""
    path = locate(weights)
    content = unpack(path)
    state = next((content[key] for key in ("model", "state_dict") if key in content), content)
    if not (isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
        raise ValueError(f"{path} holds no state dict ({SUPPORTED})")
    told = {key: content[key] for key in ("mean", "std", "template", "fusion", "classes", "args", "backbone")
            if key in content}
    if "backbone" in told:
        state = read_backbone(path, told["backbone"])["model"] | state
    # "module." is of DataParallel, "text." of some of OpenCLIP's models.
    state = {name.removeprefix("module.").removeprefix("text."): value for name, value in state.items()
             if name not in NO_PARAMETERS}
    if "vision_model.embeddings.class_embedding" in state:
        state = from_hugging_face(state)
    elif "image_encoder.class_embedding" in state:
        told = {**IMAGENET, "template": "{}." if "prompt_learner.ctx" in state else "a photo of a {}."}
        state = from_vifi_clip(state, base)
    elif "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{path} holds a CLIP with a ResNet ({SUPPORTED})")
    return {"model": state, **told}


def dimensions(state):
    """The arguments of CLIP for a state dict. Raises KeyError for one that is not of a CLIP with a ViT."""

    def layers(prefix):
        return len([name for name in state if name.startswith(prefix) and name.endswith(".ln_1.weight")])

    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    context_length, text_width = state["positional_embedding"].shape
    return dict(embed_dim=state["text_projection"].shape[1], image_size=grid * patch_size, patch_size=patch_size,
                vision_width=vision_width, vision_layers=layers("visual.transformer."), context_length=context_length,
                vocab_size=len(state["token_embedding.weight"]), text_width=text_width,
                text_layers=layers("transformer."))


def resize_positions(embedding, grid):
    """Position embeddings [1 + g * g, width] of the class token and g x g patches, for another grid: bicubic."""
    first, patches = embedding[:1], embedding[1:]
    side = round(len(patches) ** 0.5)
    patches = patches.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, width, g, g]
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([first, patches[0].flatten(1).T])


def load(weights, device="cpu", base=None, image_size=None):
    """The CLIP of a name in MODELS or of a file, in float32.

    The file may be OpenAI's TorchScript archive; a state dict with OpenAI's names, alone or under "model" or
    "state_dict"; one of OpenCLIP for the same architectures (QuickGELU, heads 64 wide: the file does not tell); one of
    Hugging Face's CLIPModel, .bin or .safetensors; a checkpoint of ours; or one of the original ViFi-CLIP, whose word
    embeddings come from `base`, a name or path, by default OpenAI's model of the same dimensions.

    `image_size` is the side of the input in pixels, a multiple of the patch size, if it is to be another than that of
    the weights: their position embeddings are interpolated.

    Raises FileNotFoundError if there is no such file, OSError if it cannot be downloaded, and ValueError if it holds
    something else.
    """
    content = read(weights, base)
    try:
        state = {name: value.float() for name, value in content["model"].items()}
        sizes = dimensions(state)
        if image_size not in (None, sizes["image_size"]):
            grid, rest = divmod(image_size, sizes["patch_size"])
            if rest or not grid:
                raise ValueError(f"image size {image_size} is no multiple of the patch size {sizes['patch_size']}")
            state["visual.positional_embedding"] = resize_positions(state["visual.positional_embedding"], grid)
        with torch.device("meta"):  # nothing is initialised only to be overwritten
            model = CLIP(**sizes | {"image_size": image_size or sizes["image_size"]})
            for name in PROMPTS:
                if name in state:
                    setattr(model, name, nn.Parameter(torch.empty_like(state[name])))
        model.load_state_dict(state, assign=True)
        damaged = next((name for name, value in state.items() if not value.isfinite().all()), None)
        if damaged:
            raise ValueError(f"{weights} is damaged: {damaged} has values that are not finite")
    except (KeyError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise ValueError(f"{weights} does not hold a CLIP: {reason} ({SUPPORTED})") from error
    for name in ("mean", "std", "template", "fusion", "backbone"):
        if name in content:
            setattr(model, name, content[name])
    _ = model.tokenizer  # so that a missing vocabulary is told now
    return model.to(device)
