"""CLIP for videos: the model of ViFi-CLIP, from the text tokenizer to loading weights.

CLIP (Radford et al., 2021, arXiv 2103.00020) embeds images and texts in one space, with a transformer for each.
ViFi-CLIP (arXiv 2212.03640, section 3) uses it unchanged: it encodes every frame of a video separately and averages
the frame embeddings over time. The class whose name is most similar to that average is the prediction:

    v = 1/T * sum over t of encode_image(frame t)                          the video embedding, [D]
    logit of class c = exp(logit_scale) * cos(v, encode_text(name of class c))

No layer is added and none looks across time. The parameters have OpenAI's names, so OpenAI's weights load directly.

Shapes: B videos of T frames, N images, S pixels per side, C texts of L tokens, D the width of the common space.
"""
import errno
import gzip
import html
import http.client
import pickle
import re
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
    """A file that is not a CLIP, a failed download or a text that is too long. The message is one line for the user."""


class MissingFile(FileNotFoundError, InputError):
    """A name that is neither a file nor a model."""


# ---- From text to tokens --------------------------------------------------------------------------------------------

TINY_VOCABULARY = 2 * 256 + 2  # bytes, bytes at the end of a word, start and end: no merges


class Tokenizer:
    """CLIP's tokenizer: byte-pair encoding of lower-case text, as in github.com/openai/CLIP, clip/simple_tokenizer.py.

    The vocabulary is 256 bytes, 256 bytes at the end of a word, one token for each merge of two tokens, start and end.
    OpenAI's has 49,408 tokens, of which 48,894 are merges. The vocabulary of `tiny` has no merges."""

    def __init__(self, vocab_size, context_length):
        merges = []
        if vocab_size > TINY_VOCABULARY:
            with gzip.open(fetch(VOCABULARY), "rt", encoding="utf-8") as file:
                lines = list(file)[1 : vocab_size - TINY_VOCABULARY + 1]  # the first line is a comment
            merges = [tuple(line.split()) for line in lines]
        # Bytes become characters: a printable byte its own (as in Latin-1), the 68 others those from 256 on.
        others = [*range(33), *range(127, 161), 173]
        self.characters = dict(zip(others, range(256, 324)))
        characters = [chr(code) for code in range(324) if code not in others]
        tokens = characters + [character + "</w>" for character in characters] + list(map("".join, merges))
        self.ids = dict(zip(tokens, range(vocab_size)))
        self.start = vocab_size - 2
        self.end = vocab_size - 1
        self.merges = dict(zip(merges, range(vocab_size)))  # in the order in which they apply
        self.context_length = context_length
        self.words = regex.compile(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

    def encode_word(self, word):
        """The token ids of one word. Merges the pair that comes first in the list until no pair is in the list."""
        parts = list(word.encode().decode("latin-1").translate(self.characters))
        parts[-1] += "</w>"
        while True:
            pairs = self.merges.keys() & zip(parts, parts[1:])
            if not pairs:
                return list(map(self.ids.get, parts))
            first = min(pairs, key=self.merges.get)
            for i in range(len(parts)):  # the list shrinks on the way; slices past its end never match
                if tuple(parts[i : i + 2]) == first:
                    parts[i : i + 2] = ["".join(first)]

    def __call__(self, texts):
        """C texts (a str is one) to tokens, int64 [C, L]: start, text, end, and zeros up to the longest text of this
        call. Attention is causal and a text is read out at its end token, so what follows has no effect. Raises
        InputError for a text that is too long."""
        if isinstance(texts, str):
            texts = [texts]
        rows = []
        for text in texts:
            text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
            row = [self.start]
            for word in self.words.findall(text):
                row += self.encode_word(word)
            row.append(self.end)
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
        # softmax(Q Kᵀ / √64) V; with `causal`, a token attends to itself and to earlier tokens only
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [N, heads, L, 64]
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        # x * sigmoid(1.702 x). Written with silu(y) = y * sigmoid(y), autograd stores one tensor instead of two.
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's weights; LAION's and DataComp's


class Block(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(4 * width, width),
        ))

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, causal, activation):
        super().__init__()
        self.causal = causal
        self.checkpointing = False  # True: store only the input of each block and recompute the rest in backward
        self.resblocks = nn.ModuleList(Block(width, activation) for _ in range(layers))

    def forward(self, x, prompts=None, start=None):
        """x [N, L, width] to the same shape. With `prompts` [depth, n_ctx, width], x already contains prompts[0] at
        `start`. Before block i, 0 < i < depth, prompts[i] replaces them (section 3.2; VPT, arXiv 2203.12119)."""
        for i, block in enumerate(self.resblocks):
            if prompts is not None and 0 < i < len(prompts):
                x[:, start : start + prompts.shape[1]] = prompts[i].expand(x.shape[0], -1, -1)
            if self.checkpointing:
                x = checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
        return x


def insert(x, tokens, start):
    """Puts the same tokens [n, width] at position `start` of each sequence of x [N, L, width]."""
    tokens = tokens.expand(x.shape[0], -1, -1)  # len(x) would be a constant when exported
    return torch.cat([x[:, :start], tokens, x[:, start:]], dim=1)


class VisionTransformer(nn.Module):
    """Cuts an image into patches. The class token, the first of the sequence, becomes the embedding of the image."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        patches = (image_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, causal=False, activation=activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)

    def forward(self, images, prompts=None):  # [N, 3, S, S], [depth, n_ctx, width] -> [N, D]
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [N, patches, width]
        x = insert(x, self.class_embedding[None], 0) + self.positional_embedding
        start = x.shape[1]
        if prompts is not None:  # [class | patches | P_v], the prompts without position embeddings
            x = insert(x, prompts[0], start)
        x = self.transformer(self.ln_pre(x), prompts, start)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """The two encoders and the scale of their similarity. Also stores how the weights were trained: `mean` and `std`
    of the pixels, OpenAI's by default; the `template` that turns a class name into a sentence; and `fusion`, what is
    averaged over time (the paper's ablation): "embedding", "decision" or "image", see `forward`."""

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers, activation="quick_gelu"):
        super().__init__()
        self.image_size = image_size
        self.activation = activation
        self.visual = VisionTransformer(image_size, patch_size, vision_width, vision_layers, embed_dim, activation)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, causal=True, activation=activation)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.tokenizer = Tokenizer(vocab_size, context_length)
        self.set_prompts(None, None)
        # persistent=False: the state dict has OpenAI's entries and no others. device="cpu": `load` builds on "meta".
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073], device="cpu"), persistent=False)
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711], device="cpu"), persistent=False)
        self.template = "{}"
        self.fusion = "embedding"
        self.classes = None  # the class names and the number of frames of the training, if the file stores them
        self.frames = None

    def set_prompts(self, visual, text):
        """Gives the encoders learned prompts (prompt.py): tensors [depth, n_ctx, width], or None."""
        self.visual_prompts = None
        self.text_prompts = None
        self.tokenizer.context_length = len(self.positional_embedding)
        if visual is not None:
            self.visual_prompts = nn.Parameter(visual)
        if text is not None:
            self.text_prompts = nn.Parameter(text)
            self.tokenizer.context_length -= text.shape[1]  # prompts occupy positions of the text

    def normalize(self, pixels):
        """Pixels 0..255 of any dtype, [..., 3, S, S], to float with the mean and std that the weights expect."""
        return (pixels / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def encode_image(self, images):
        """Images [N, 3, S, S], raw uint8 or normalised float, to embeddings [N, D], not normalised."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"expected images [N, 3, S, S] with S = {self.image_size}, got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        elif not self.training and not torch.compiler.is_exporting() and images.abs().max() > 10:  # slow in training
            raise ValueError("floating images must be normalised; raw pixels must be uint8")
        return self.visual(images, self.visual_prompts)

    def encode_frames(self, video):
        """Videos [B, T, 3, S, S] to the embeddings of their frames [B, T, D], each encoded separately."""
        if video.ndim != 5:
            raise ValueError(f"expected videos [B, T, 3, S, S], got a tensor of shape {list(video.shape)}")
        return self.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def encode_video(self, video):
        """Videos [B, T, 3, S, S] to embeddings [B, D], not normalised: the mean over their frames (section 3.1)."""
        return self.encode_frames(video).mean(dim=1)

    def encode_text(self, tokens):
        """Tokens [C, L] of `tokenizer` to embeddings [C, D], not normalised."""
        x = self.token_embedding(tokens)  # [C, L, width]
        end = tokens.argmax(dim=-1)  # the end token has the highest id of the vocabulary
        if self.text_prompts is not None:  # [start | P_t | name | end], the prompts with position embeddings
            x = insert(x, self.text_prompts[0], 1)
            end = end + self.text_prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer(x, self.text_prompts, start=1))
        rows = torch.arange(x.shape[0], device=x.device)
        return x[rows, end] @ self.text_projection

    def logits(self, images, texts):
        """Scaled cosines of embeddings [..., D] and [C, D]: [..., C]. In bfloat16 a logit of 30 would be 0.1 off."""
        with torch.autocast(images.device.type, enabled=False):
            images = F.normalize(images.float(), dim=-1)
            texts = F.normalize(texts.float(), dim=-1)
            return self.logit_scale.float().exp() * images @ texts.T

    def forward(self, video, tokens):
        """Videos [B, T, 3, S, S] and tokens [C, L] of the class names to logits [B, C]. With fusion "image" in
        training, [B * T, C]."""
        return self.compare(video, self.encode_text(tokens))

    def compare(self, video, text):
        """The logits of `forward`, given the embeddings [C, D] of the class names."""
        if self.fusion == "embedding":
            return self.logits(self.encode_video(video), text)
        logits = self.logits(self.encode_frames(video), text)  # [B, T, C], of each frame
        if self.fusion == "decision":
            return logits.mean(dim=1)
        if self.training:  # fusion "image": each frame is a training example
            return logits.flatten(0, 1)
        return logits.log_softmax(dim=-1).logsumexp(dim=1)  # log of the summed probabilities, [B, C]


# ---- Downloads ------------------------------------------------------------------------------------------------------

ADDRESS = "https://openaipublic.azureedge.net/clip/models"  # each file is in a folder named by its SHA-256
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
    """The path of one of OpenAI's files, downloaded if it is not where their package stores it. Raises InputError."""
    *_, folder, name = address.split("/")
    sha256 = VOCABULARY_SHA256 if address == VOCABULARY else folder
    path = Path("~/.cache/clip", name).expanduser()
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, path, hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the SHA-256 differs
            files = " and ".join(dict.fromkeys([address, VOCABULARY]))
            raise InputError(f"cannot download {name}: {error}. By hand: put {files} into {path.parent}") from error
    return path


# ---- Reading a file of weights without running what it contains -----------------------------------------------------

def load(weights, device="cpu", base=None, activation=None):
    """The CLIP of a name in MODELS or of a file, in float32 and in evaluation mode.

    The file may be OpenAI's TorchScript archive; a state dict with OpenAI's names, alone or anywhere in a checkpoint;
    one of OpenCLIP or of Hugging Face's CLIPModel (.bin, .safetensors) for the same architectures; a checkpoint of this
    project; or one of the original ViFi-CLIP. The last lacks the word embeddings: they come from `base`, a name or
    path, by default OpenAI's model of the same size. `activation` is "quick_gelu" or "gelu", by default what the
    checkpoint or a configuration beside the file says, else "quick_gelu". Parameters that were added to this code are
    initialised and listed. Raises MissingFile if there is no such file, InputError if it cannot be downloaded, is not a
    CLIP or, being a checkpoint of this project, has parameters that this code lacks."""
    content = read(weights, base)
    state = {name: value.float() for name, value in content["model"].items()}
    try:
        sizes = dimensions(state)
    except (KeyError, ValueError, IndexError) as error:
        problem = f"visual.conv1.weight or another entry is missing or has another shape ({error})"
        raise InputError(f"{weights} is not a complete CLIP: {problem}; {SUPPORTED}") from error
    vision, text = sizes["vision_width"], sizes["text_width"]
    if vision > 1024 or vision % 64 or text % 64:  # wider ones, such as ViT-H-14 (1280), have heads of 80 and more
        raise InputError(f"{weights}: encoders {vision} and {text} wide are not supported, their heads are not 64 wide")
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(f"{weights} is damaged: it has values that are not finite")
    if sizes["vocab_size"] not in (TINY_VOCABULARY, 49408):
        raise InputError(f"{weights} has {sizes['vocab_size']} tokens, not the 49408 of OpenAI's tokenizer")
    if activation:
        content["activation"] = activation
    with torch.device("meta"):  # without memory: the file has the values
        model = CLIP(**sizes, activation=content["activation"])
    missing = sorted(model.state_dict().keys() - state.keys())
    if missing or any(buffer.is_meta for buffer in model.buffers()):  # parts that were added need initial values
        model = CLIP(**sizes, activation=content["activation"])
    model.set_prompts(state.get("visual_prompts"), state.get("text_prompts"))
    lacking = [name for name in missing if re.fullmatch(OPENAI_NAMES, name)]
    try:
        unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # its second line names an entry of another shape
        raise InputError(f"{weights} does not fit: {str(error).splitlines()[1].strip()[:90]}; {SUPPORTED}") from error
    if "args" in content and unknown:
        raise InputError(f"{weights} was trained with changed code: this code has no {unknown[0]}")
    # Other files may have more, except in a block: adapters, or layers across time
    unknown = [name for name in unknown if ".resblocks." in name]
    if lacking or unknown:
        raise InputError(f"{weights} does not fit: {[*lacking, *unknown][0]} is missing or unknown; {SUPPORTED}")
    if missing:
        print(f"new parameters, not in {weights}: {', '.join(missing)}; they start with their initial values")
    for name in METADATA & content.keys():
        setattr(model, name, content[name])
    model.frames = content.get("args", {}).get("frames")
    return model.to(device).eval()


# What checkpoints of this project store besides weights and arguments (`save` in train.py)
METADATA = {"mean", "std", "template", "fusion", "activation", "classes"}
IMAGENET = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}

# A regular expression of the names of the parameters of OpenAI's models
OPENAI_NAMES = (
    r"(visual\.)?(class_embedding|positional_embedding|proj|conv1\.weight|ln_(pre|post|final)\.(weight|bias))|"
    r"(visual\.)?transformer\.resblocks\.\d+\.((ln_[12]|attn\.out_proj|mlp\.c_(fc|proj))\.|attn\.in_proj_)(weight|bias)|"
    r"text_projection|token_embedding\.weight|logit_scale")
# The first tensor of a vision transformer under OpenAI's, Hugging Face's and ViFi-CLIP's names. If it has a prefix
# in a file, such as "module.", all names have it.
OPENAI = "visual.class_embedding"
HUGGING_FACE = "vision_model.embeddings.class_embedding"
VIFI_CLIP = "image_encoder.class_embedding"
SUPPORTED = "supported are CLIPs with a ViT of OpenAI, OpenCLIP and Hugging Face, and checkpoints of ViFi-CLIP"


def read(weights, base=None):
    """The content of a file of weights, a dict: "model", the state dict in OpenAI's names; what `read_configuration`
    returns; and, of a checkpoint of this project, METADATA and "args"."""
    path = MODELS.get(weights, weights)
    path = fetch(path) if str(path).startswith("https://") else Path(path)
    if not path.is_file():
        raise MissingFile(errno.ENOENT, f"this is neither a file nor a model ({', '.join(MODELS)})", str(path))
    content = unpack(path)
    found = {"model": find_state(path, content), **read_configuration(path)}
    if HUGGING_FACE in found["model"]:
        found["model"] = from_hugging_face(found["model"])
    elif VIFI_CLIP in found["model"]:
        found["template"] = "{}." if "prompt_learner.ctx" in found["model"] else "a photo of a {}."
        found["model"] = from_vifi_clip(found["model"], base)
        found |= IMAGENET
    elif "template" in content:  # a checkpoint of this project
        found |= {name: content[name] for name in {*METADATA, "args"} & content.keys()}
    return found


def read_configuration(path):
    """The "activation" and, if it is given, the "mean" and "std" of pixels, from the configuration of OpenCLIP or
    Hugging Face in the folder of a file of weights. Without one, OpenAI's activation."""
    found = {"activation": "quick_gelu"}
    for name in ("open_clip_config.json", "config.json", "preprocessor_config.json"):
        file = path.with_name(name)
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        quick = re.search('"quick_gelu": *true', text)
        if re.search('"hidden_act": *"gelu"', text) or (name == "open_clip_config.json" and not quick):
            found["activation"] = "gelu"
        for key in ("mean", "std"):
            values = re.search(rf'"(?:image_)?{key}":\s*\[\s*(\d\.\d+),\s*(\d\.\d+),\s*(\d\.\d+)\s*\]', text)
            if values:
                found[key] = torch.tensor(list(map(float, values.groups())))
    return found


def unpack(path):
    """The content of a file of weights. Raises InputError if it is damaged or another kind of file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional dependency

            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # OpenAI's archives are TorchScript, which is deprecated
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
        return content.state_dict() if isinstance(content, torch.jit.ScriptModule) else content
    except PermissionError:
        raise
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # torch and safetensors raise almost anything for a damaged file
        raise InputError(f"{path} is damaged or not a file of weights ({type(error).__name__})") from error


class Inert:
    """Replaces every object that is not data, such as a configuration or hostile code. Ignores every call."""

    def ignore(self, *args, **options):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = ignore


class SafePickle:
    """A `pickle_module` for `torch.load` that rebuilds tensors and plain containers. Everything else is `Inert`."""

    ALLOWED = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" in SafePickle.ALLOWED:
                return super().find_class(module, name)
            return Inert

    @staticmethod
    def load(file, **options):
        return SafePickle.Unpickler(file, **options).load()


def find_tensors(content, *keys):
    """Yields (name, tensor) for all tensors in nested dicts. The name is the keys joined by dots."""
    if torch.is_tensor(content):
        yield ".".join(map(str, keys)), content
    elif isinstance(content, dict) and len(keys) < 4:  # a dict may contain itself
        for key, value in content.items():
            yield from find_tensors(value, *keys, key)


def find_state(path, content):
    """The state dict of the first CLIP in the content of a file. Raises InputError if there is none."""
    tensors = dict(find_tensors(content))
    for mark in (OPENAI, HUGGING_FACE, VIFI_CLIP):
        for first in tensors:
            if first.endswith(mark):
                prefix = first.removesuffix(mark)
                state = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
                return {name.removeprefix("text."): value for name, value in state.items()}  # OpenCLIP's newer names
    examples = ", ".join(name[:30] for name in list(tensors)[:2]) or "no tensors"
    raise InputError(f"{path} is not a CLIP with a ViT ({examples}); {SUPPORTED}")


# Parts of the names in Hugging Face's CLIPModel and OpenAI's, replaced in this order ("layrnorm" is theirs)
HUGGING_FACE_NAMES = {
    "vision_model.": "visual.",
    "text_model.": "",
    "embeddings.": "",
    "encoder.layers": "transformer.resblocks",
    "patch_embedding": "conv1",
    "position_embedding.weight": "positional_embedding",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}


def hugging_face_parts(state):
    """The tensors of a Hugging Face CLIPModel by OpenAI's names and in OpenAI's layout: {name: [tensor]}, or [q, k, v]
    where OpenAI's models have one tensor for the three. They are views: writing to them changes the CLIPModel."""
    ours = {}
    for name, value in state.items():
        for theirs, openai in HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, openai)
        if name in ("visual.proj", "text_projection"):
            value = value.T
        ours[name] = [value]
    for name in list(ours):
        if ".q_proj." in name:
            parts = [ours.pop(name.replace(".q_proj.", f".{part}_proj."))[0] for part in "qkv"]
            ours[name.replace("q_proj.", "in_proj_")] = parts
    return ours


def from_hugging_face(state):
    """The state dict of a Hugging Face CLIPModel in OpenAI's names and layout."""
    ours = {}
    for name, parts in hugging_face_parts(state).items():
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def from_vifi_clip(state, base):
    """The state dict of the original ViFi-CLIP in OpenAI's names. It does not store the word embeddings, which were not
    trained: they come from `base`. Its prompts, stored in the blocks, become `visual_prompts` and `text_prompts`."""
    ours = {}
    for name, value in state.items():
        if "VPT" not in name:
            ours[name.replace("image_encoder.", "visual.").replace("text_encoder.", "")] = value
    for prompts, first, encoder in (("visual_prompts", "image_encoder.VPT", "image_encoder"),
                                    ("text_prompts", "prompt_learner.ctx", "text_encoder")):
        names = [first] + [f"{encoder}.transformer.resblocks.{i}.VPT_shallow" for i in range(1, 24)]
        layers = [state[name] for name in names if name in state]
        if layers:
            ours[prompts] = torch.stack(layers)
    models = {50: "ViT-B/32", 197: "ViT-B/16", 257: "ViT-L/14", 577: "ViT-L/14@336px"}  # by the number of positions
    base = base or models.get(len(ours["visual.positional_embedding"]))
    if base is None:
        raise InputError("this checkpoint of ViFi-CLIP needs the CLIP that it started from: clip.load(file, base=...)")
    ours["token_embedding.weight"] = read(base)["model"]["token_embedding.weight"]
    return ours


def dimensions(state):
    """The arguments of CLIP for a state dict. Raises KeyError if an entry that they are inferred from is missing."""
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    encoders = [name.split(".")[0] for name in state if name.endswith(".ln_1.weight")]  # one for each block
    return dict(
        embed_dim=state["text_projection"].shape[1],
        image_size=round(patches ** 0.5) * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=encoders.count("visual"),
        context_length=context_length,
        vocab_size=len(state["token_embedding.weight"]),
        text_width=text_width,
        text_layers=encoders.count("transformer"),
    )
