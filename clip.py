"""CLIP for videos: the model of ViFi-CLIP, from the text tokenizer to loading weights.

CLIP (Radford et al., 2021, arXiv 2103.00020) has two transformers, one for images and one for text, that embed both in
one space. ViFi-CLIP (arXiv 2212.03640, section 3) takes it as it is, encodes every frame of a video on its own and
averages the frame embeddings over time; the class whose name is nearest wins:

    v = 1/T * sum over t of encode_image(frame t)                          the video embedding, [D]
    logit of class c = exp(logit_scale) * cos(v, encode_text(name of class c))

Nothing is added: no layer looks across time. The parameters have OpenAI's names, so OpenAI's weights load directly.

Shapes: B videos of T frames, N images, S pixels a side, C texts of L tokens, D the width of the common space.
"""
import errno
import gzip
import html
import http.client
import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """A file that holds no CLIP, a failed download or a text that is too long. The message is one line for the user."""


# ---- From text to tokens --------------------------------------------------------------------------------------------

TINY_VOCABULARY = 2 * 256 + 2  # bytes, bytes that end a word, start and end: no merges


class Tokenizer:
    """CLIP's tokenizer: byte-pair encoding of lower-case text, as in github.com/openai/CLIP, clip/simple_tokenizer.py.
    The vocabulary is the 256 bytes, the 256 bytes at the end of a word, a token for each pair that is merged, start and
    end. OpenAI's has 49,408 tokens, 48,894 of them merges (lines of a file, after a comment), `tiny` has no merges."""

    def __init__(self, vocab_size, context_length=77):
        merges = []
        if vocab_size > TINY_VOCABULARY:
            with gzip.open(fetch(VOCABULARY), "rt", encoding="utf-8") as file:
                merges = [tuple(line.split()) for line in file.readlines()[1 : vocab_size - TINY_VOCABULARY + 1]]
        # Each byte has a printable character: itself, or, for the 68 that are not printable, one from 256 on.
        printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
        others = [byte for byte in range(256) if byte not in printable]
        self.character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        tokens = [c + end for end in ("", "</w>") for c in self.character.values()] + ["".join(pair) for pair in merges]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.start, self.end = len(tokens), len(tokens) + 1
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.context_length = context_length
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def encode_word(self, word):
        """The token ids of one word: joins the pair that comes first in the merges until no pair is a merge."""
        parts = [self.character[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while merges := self.rank.keys() & zip(parts, parts[1:]):
            first = min(merges, key=self.rank.get)
            for i in range(len(parts)):  # which gets shorter meanwhile; slices beyond the end are no pairs
                if tuple(parts[i : i + 2]) == first:
                    parts[i : i + 2] = ["".join(first)]
        return [self.ids[part] for part in parts]

    def __call__(self, texts):
        """Tokens of C texts, int64 [C, L], with start, end and zeros, L of the longest: attention is causal and a text
        is read out at its end token, so nothing after it matters. Raises InputError for a text that is too long."""
        rows = []
        for text in texts:
            words = self.words.findall(html.unescape(html.unescape(ftfy.fix_text(text))).lower())
            row = [self.start, *(token for word in words for token in self.encode_word(word)), self.end]
            if len(row) > self.context_length:
                raise InputError(f"a text of {len(row)} tokens; the model reads {self.context_length}: {text!r}")
            rows.append(torch.tensor(row))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- The transformers -----------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention, batch first. Heads are 64 wide."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x):
        """x [N, L, width] to queries, keys and values, each [N, heads, L, 64]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [N, L, 3 * width]
        return qkv.unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)

    def forward(self, x, causal):  # [N, L, width]
        q, k, v = self.project(x)
        # softmax(Q Kᵀ / √64) V; with `causal`, a token sees itself and those before it
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [N, heads, L, 64]
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        # x * sigmoid(1.702 x). Written with silu(y) = y * sigmoid(y), autograd stores one tensor instead of two.
        return F.silu(1.702 * x) / 1.702


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, causal):
        super().__init__()
        self.causal = causal
        self.checkpointing = False  # True: store the input of each block only, and compute the rest again in backward
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, prompts=None, start=None):
        """x [N, L, width] to the same shape. Of `prompts` [depth, n_ctx, width] the first is in x from position `start`
        on. Before block i, 0 < i < depth, prompts[i] replaces it there (section 3.2; VPT, arXiv 2203.12119)."""
        for i, block in enumerate(self.resblocks):
            if prompts is not None and 0 < i < len(prompts):
                x[:, start : start + prompts.shape[1]] = prompts[i]
            x = checkpoint(block, x, self.causal, use_reentrant=False) if self.checkpointing else block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    """Cuts an image into patches; the class token, the first of the sequence, becomes the embedding of the image."""

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
        start = x.shape[1]
        if prompts is not None:  # [class | patches | P_v], the prompts without position embeddings
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)
        x = self.transformer(self.ln_pre(x), prompts, start)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """The two encoders and the scale of their similarity, and what the weights were trained with: `mean` and `std` of
    the pixels, OpenAI's by default; the `template` that makes a sentence of a class name; and `fusion`, what is
    averaged over time (the paper's ablation): "embedding", "decision" or "image", see `forward`."""

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers):
        super().__init__()
        self.image_size = image_size
        self.visual = VisionTransformer(image_size, patch_size, vision_width, vision_layers, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.tokenizer = Tokenizer(vocab_size, context_length)
        self.set_prompts(None, None)
        # persistent=False keeps the entries of the state dict OpenAI's. device="cpu": `load` builds on the meta device.
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073], device="cpu"), persistent=False)
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711], device="cpu"), persistent=False)
        self.template, self.fusion = "{}", "embedding"

    def set_prompts(self, visual, text):
        """Gives the encoders learned prompts (prompt.py): tensors [depth, n_ctx, width], None for none."""
        self.visual_prompts = None if visual is None else nn.Parameter(visual)
        self.text_prompts = None if text is None else nn.Parameter(text)
        # Text prompts take positions from the text.
        self.tokenizer.context_length = len(self.positional_embedding) - (0 if text is None else text.shape[1])

    def normalize(self, pixels):
        """Pixels 0..255 of any dtype, [..., 3, S, S], to float with the mean and std that the weights expect."""
        return (pixels / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def encode_image(self, images):
        """Images [N, 3, S, S], raw uint8 or normalised float, to embeddings [N, D], not normalised."""
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        return self.visual(images, self.visual_prompts)

    def encode_frames(self, video):
        """Videos [B, T, 3, S, S] to the embeddings of their frames [B, T, D], each encoded on its own."""
        return self.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def encode_video(self, video):
        """Videos [B, T, 3, S, S] to embeddings [B, D], not normalised: the mean of their frames' (section 3.1)."""
        return self.encode_frames(video).mean(dim=1)

    def encode_text(self, tokens):
        """Tokens [C, L] of `tokenizer` to embeddings [C, D], not normalised."""
        x = self.token_embedding(tokens)  # [C, L, width]
        end = tokens.argmax(dim=-1)  # the end token has the highest id of the vocabulary
        if self.text_prompts is not None:  # [start | P_t | name | end], the prompts with position embeddings
            x = torch.cat([x[:, :1], self.text_prompts[0].expand(len(x), -1, -1), x[:, 1:]], dim=1)
            end = end + self.text_prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer(x, self.text_prompts, start=1))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def logits(self, images, texts):
        """Scaled cosines of embeddings [..., D] and [C, D]: [..., C]. In bfloat16 a logit of 30 would be 0.1 off."""
        with torch.autocast(images.device.type, enabled=False):
            images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
            return self.logit_scale.float().exp() * images @ texts.T

    def forward(self, video, tokens):
        """Videos [B, T, 3, S, S] and tokens [C, L] of the class names to logits [B, C], or [B * T, C], see below."""
        text = self.encode_text(tokens)
        if self.fusion == "embedding":
            return self.logits(self.encode_video(video), text)
        logits = self.logits(self.encode_frames(video), text)  # [B, T, C], of each frame
        if self.fusion == "decision":
            return logits.mean(dim=1)
        if self.training:  # "image": each frame is an example, [B * T, C] ...
            return logits.flatten(0, 1)
        return logits.log_softmax(dim=-1).logsumexp(dim=1)  # ... and log of the sum of their probabilities, [B, C]


# ---- Downloads, and reading a file of weights without running what it contains --------------------------------------

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


def fetch(address):
    """The path of a file of OpenAI's, downloaded if need be to where their own package looks. Raises InputError."""
    sha256 = VOCABULARY_SHA256 if address == VOCABULARY else address.split("/")[-2]
    path = Path.home() / ".cache" / "clip" / address.split("/")[-1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, path, hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the SHA-256 differs
            by_hand = f"put {' and '.join(dict.fromkeys((address, VOCABULARY)))} into {path.parent}"
            raise InputError(f"cannot download {path.name}: {error}. By hand: {by_hand}") from error
    return path


class Inert:
    """Stands in for what is no data in a file, such as a configuration or hostile code: takes all, does nothing."""

    __init__ = __setstate__ = __setitem__ = append = extend = add = lambda self, *args, **options: None


class SafePickle:
    """A `pickle_module` for `torch.load` that rebuilds tensors and plain containers; all else becomes `Inert`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            known = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
            return super().find_class(module, name) if f"{module}.{name}" in known else Inert

    @staticmethod
    def load(file, **options):
        return SafePickle.Unpickler(file, **options).load()


def unpack(path):
    """The content of a file of weights. Raises InputError if it is no such file, or a damaged one."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional dependency

            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # OpenAI's archives are TorchScript, which is deprecated
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
        return content.state_dict() if isinstance(content, torch.jit.ScriptModule) else content
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # torch and safetensors raise almost anything for a damaged file
        raise InputError(f"{path} is damaged or not a file of weights ({type(error).__name__})") from error


# Each kind of model has one of these names. What precedes it, such as "module.", precedes all names of the model.
HUGGING_FACE, VIFI_CLIP = "vision_model.embeddings.class_embedding", "image_encoder.class_embedding"
MARKS = ("visual.class_embedding", HUGGING_FACE, VIFI_CLIP)
OTHERS = {"message_": "an X-CLIP, which has layers across time", "layer1.0.conv1": "a CLIP with a ResNet",
          "vision_model.head": "a SigLIP", "visual.trunk": "a SigLIP or another model of timm"}  # not supported
SUPPORTED = "supported are CLIPs with a ViT of OpenAI, OpenCLIP and Hugging Face, and checkpoints of ViFi-CLIP"


def tensors(content, *keys):
    """Yields the tensors of dicts in dicts as (name, tensor), where the name is the keys joined by dots."""
    if torch.is_tensor(content):
        yield ".".join(map(str, keys)), content
    elif isinstance(content, dict) and len(keys) < 4:  # a dict may contain itself
        for key, value in content.items():
            yield from tensors(value, *keys, key)


def find_state(path, content):
    """The state dict of the first CLIP in the content of a file. Raises InputError without one."""
    found = dict(tensors(content))
    prefixes = [name.removesuffix(mark) for name in found for mark in MARKS if name.endswith(mark)]
    others = [kind for part, kind in OTHERS.items() if any(part in name for name in found)]
    if others or not prefixes:
        names = ", ".join(name[:30] for name in list(found)[:2]) or "no tensors"
        raise InputError(f"{path} holds {others[0] if others else 'something else'} ({names}); {SUPPORTED}")
    return {name.removeprefix(prefixes[0]).removeprefix("text."): tensor for name, tensor in found.items()
            if name.startswith(prefixes[0])}


# OpenAI's names for parts of the names in Hugging Face's CLIPModel ("layrnorm" is its own), replaced in this order
HUGGING_FACE_NAMES = {
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "", "encoder.layers": "transformer.resblocks",
    "patch_embedding": "conv1", "position_embedding.weight": "positional_embedding",
    "self_attn.": "attn.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "layer_norm": "ln_",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}


def from_hugging_face(state):
    """The state dict of a CLIPModel of Hugging Face's transformers in OpenAI's names and layout."""
    ours = {}
    for name, value in state.items():
        for theirs, openai in HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, openai)
        ours[name] = value.T if name in ("visual.proj", "text_projection") else value
    for name in [name for name in ours if ".q_proj." in name]:  # three matrices there are one here
        parts = [ours.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        ours[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return ours


def from_vifi_clip(state, base):
    """The state dict of the original ViFi-CLIP code in OpenAI's names. The word embeddings, not trained there and not
    stored, come from `base`. Prompts, which are in the blocks there, become `visual_prompts` and `text_prompts`."""
    ours = {name.replace("image_encoder.", "visual.").replace("text_encoder.", ""): value
            for name, value in state.items() if "VPT" not in name}
    for prompts, first, encoder in (("visual_prompts", "image_encoder.VPT", "image_encoder"),
                                    ("text_prompts", "prompt_learner.ctx", "text_encoder")):
        deeper = (f"{encoder}.transformer.resblocks.{i}.VPT_shallow" for i in range(1, 24))  # no model has more layers
        layers = [state[name] for name in (first, *deeper) if name in state]
        if layers:
            ours[prompts] = torch.stack(layers)
    models = {50: "ViT-B/32", 197: "ViT-B/16", 257: "ViT-L/14", 577: "ViT-L/14@336px"}  # by the number of positions
    base = base or models.get(len(ours["visual.positional_embedding"]))
    if base is None:
        raise InputError("a checkpoint of the original ViFi-CLIP needs the CLIP that it was made from as `base`")
    ours["token_embedding.weight"] = read(base)["model"]["token_embedding.weight"]
    return ours


# What a checkpoint of ours has beside the weights (`save` in train.py), and the original's normalisation, ImageNet's
MORE = {"mean": torch.Tensor, "std": torch.Tensor, "template": str, "fusion": str, "classes": list, "args": dict}
IMAGENET = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}


def read(weights, base=None):
    """The content of a file of weights: the state dict in OpenAI's names as "model", and what it has of MORE."""
    path = MODELS.get(weights, weights)
    path = fetch(path) if str(path).startswith("https://") else Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"this is neither a file nor a model ({', '.join(MODELS)})", str(path))
    content = unpack(path)
    state = find_state(path, content)
    if HUGGING_FACE in state:
        return {"model": from_hugging_face(state)}
    if VIFI_CLIP in state:
        template = "{}." if "prompt_learner.ctx" in state else "a photo of a {}."
        return {"model": from_vifi_clip(state, base), **IMAGENET, "template": template}
    return {"model": state} | {key: content[key] for key, kind in MORE.items() if isinstance(content.get(key), kind)}


def dimensions(state):
    """The arguments of CLIP for a state dict. Raises KeyError if an entry that they are inferred from is missing."""
    encoders = [name.split(".")[0] for name in state if name.endswith(".ln_1.weight")]  # one for each block
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    context_length, text_width = state["positional_embedding"].shape
    return dict(embed_dim=state["text_projection"].shape[1], image_size=grid * patch_size, patch_size=patch_size,
                vision_width=vision_width, vision_layers=encoders.count("visual"), context_length=context_length,
                vocab_size=len(state["token_embedding.weight"]), text_width=text_width,
                text_layers=encoders.count("transformer"))


def load(weights, device="cpu", base=None, image_size=None):
    """The CLIP of a name in MODELS or of a file, in float32.

    The file may be OpenAI's TorchScript archive; a state dict with OpenAI's names, alone or anywhere in a checkpoint;
    one of OpenCLIP or of Hugging Face's CLIPModel (.bin, .safetensors) for the same architectures; or a checkpoint of
    the original ViFi-CLIP, whose word embeddings come from `base`, a name or path, by default OpenAI's model of the
    same dimensions. Files do not record the activation: QuickGELU is assumed (OpenCLIP has it in models named so). For
    another `image_size`, a multiple of the patch size in pixels, position embeddings are interpolated. Raises
    FileNotFoundError if there is no such file, InputError if it cannot be downloaded or holds something else."""
    content = read(weights, base)
    state = {name: value.float() for name, value in content["model"].items()}
    try:
        sizes = dimensions(state)
    except (KeyError, ValueError, IndexError) as error:
        what = f"visual.conv1.weight or another is missing or of another shape ({error})"
        raise InputError(f"{weights} holds no whole CLIP: {what}; {SUPPORTED}") from error
    vision, text = sizes["vision_width"], sizes["text_width"]
    if vision > 1024 or vision % 64 or text % 64:  # wider ones, such as ViT-H-14 (1280), have heads of 80 and more
        raise InputError(f"{weights}: encoders {vision} and {text} wide are not supported, their heads are not 64 wide")
    if image_size not in (None, sizes["image_size"]):
        if image_size % sizes["patch_size"]:
            raise InputError(f"image size {image_size} is no multiple of the patch size {sizes['patch_size']}")
        old, new = sizes["image_size"] // sizes["patch_size"], image_size // sizes["patch_size"]  # patches a side
        class_token, patches = state["visual.positional_embedding"].split([1, old ** 2])
        patches = patches.T.unflatten(1, (old, old))[None]  # [1, width, old, old]
        patches = F.interpolate(patches, (new, new), mode="bicubic", antialias=True)
        state["visual.positional_embedding"] = torch.cat([class_token, patches[0].flatten(1).T])
        sizes["image_size"] = image_size
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = CLIP(**sizes)
    model.set_prompts(state.get("visual_prompts"), state.get("text_prompts"))
    # Other entries do not matter, unless they are in a block: adapters, layers across time
    names = model.state_dict().keys()
    state = {name: value for name, value in state.items() if name in names or ".resblocks." in name}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # its second line begins with what is missing, unknown or of another shape
        what = str(error).splitlines()[1].strip()[:90]
        raise InputError(f"{weights} holds no whole CLIP, or another kind: {what}; {SUPPORTED}") from error
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{weights} is damaged: it has values that are not finite")
    for name in {"mean", "std", "template", "fusion"} & content.keys():
        setattr(model, name, content[name])
    return model.to(device)
