"""What the README invites to change is changed in a copy of the project and works; mistakes on the way are told."""
import contextlib
import importlib
import re
import sys
from unittest import mock

import pytest
import torch
from conftest import PROJECT, read_log, read_results

import data
import prompt  # noqa: F401  so that `scripts_of` can bring all five back

SCRIPTS = ("clip", "data", "evaluate", "train", "prompt")
LAYERS = """
    -        self.set_prompts(None, None)
    +        self.gain = nn.Parameter(torch.ones(embed_dim))
    +        self.register_buffer("time", torch.arange(1.0, 3.0), persistent=False)
    +        self.dropout = nn.Dropout(0.5)
    +        self.set_prompts(None, None)
    -        return self.encode_frames(video).mean(dim=1)
    +        frames = self.encode_frames(video) * self.time[:, None]
    +        return self.dropout(frames).mean(dim=1) * self.gain
"""


def copy_with(changes, folder):
    """A copy of the project with a diff of clip.py: lines that begin with "-", each followed by those in its place."""
    folder.mkdir()
    for name in SCRIPTS:
        (folder / f"{name}.py").write_bytes((PROJECT / f"{name}.py").read_bytes())
    (folder / "toy").symlink_to(PROJECT / "toy")
    text = (folder / "clip.py").read_text(encoding="utf-8")
    replaced = re.findall(r"^    -(.*\n)((?:    \+.*\n)+)", changes, re.MULTILINE)
    assert len(replaced) == len(re.findall(r"^    -", changes, re.MULTILINE)) == 2
    for old, new in replaced:
        assert text.count("\n" + old) == 1
        text = text.replace("\n" + old, "\n" + re.sub(r"^    \+", "", new, flags=re.MULTILINE))
    (folder / "clip.py").write_text(text, encoding="utf-8")
    return folder


@contextlib.contextmanager
def scripts_of(folder):
    """Within it, the scripts that are imported, called and run are those of another folder: yields its clip and train.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in SCRIPTS:
            patch.delitem(sys.modules, name)
        yield importlib.import_module("clip"), importlib.import_module("train")


def saved(folder):
    """The weights of the last checkpoint of a run."""
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def only_line(result):
    """The message of a script that has failed, which is one line."""
    status, _, errors = result
    assert (status, len(errors.splitlines())) == (1, 1)
    return errors


@pytest.fixture
def short(tmp_path):
    """The flags of a run of train.py on a few videos of the toy."""
    flags = ["--model", "tiny", "--frames", "2", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0",
             "--workers", "0"]
    for half in ("train", "val"):
        samples, names = data.load_samples("toy", train=half == "train", classes="novel", shots=2)
        path = tmp_path / f"{half}.csv"
        path.write_text("".join(f"{video},{names[label]}\n" for video, label in samples[: 24]))
        flags += [f"--{half}-list", path]
    return flags


def test_the_learned_pooling_of_the_readme(short, run, call, tmp_path):
    """It is initialised by the seed, trained, resumed, saved and loaded like all else, and refused without the code."""
    section = (PROJECT / "README.md").read_text(encoding="utf-8").split("\n## Change it\n")[1].split("\n## ")[0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with scripts_of(copy_with(section, tmp_path / "copy")) as (_, changed):
        with mock.patch.object(changed, "draw_curves", side_effect=KeyboardInterrupt):  # after the first epoch
            assert call("train.py", *short, "--out", killed)[0] == 130
        changed.draw_curves = lambda path, state: None  # takes long
        assert "new parameters" not in run("train.py", "--resume", killed)
        out = run("train.py", *short, "--out", whole)
        line = "new parameters, not in tiny: pool.bias, pool.weight; they start with their initial values"
        assert out.splitlines().count(line) == out.count("classes have no validation videos") == 1
        assert equal(saved(killed), saved(whole))

        run("train.py", *short, "--lr", "0", "--epochs", "1", "--out", tmp_path / "start")
        run("train.py", *short, "--lr", "0", "--epochs", "1", "--seed", "7", "--out", tmp_path / "other")
        start, other = (saved(tmp_path / name)["pool.weight"] for name in ("start", "other"))
        assert not torch.equal(start, other)
        assert not torch.equal(start, saved(whole)["pool.weight"])

        run("evaluate.py", "--weights", whole / "last.pt", "--workers", "0", "--out", tmp_path / "results")
        _, validations = read_log(whole)
        assert read_results(tmp_path / "results")["top1"] == validations[-1]["top1"]
    for command in (("evaluate.py", "--weights", whole / "last.pt"), ("train.py", "--resume", whole)):
        assert "was trained with changed code: this code has no pool." in only_line(call(*command))


def test_new_layers_of_other_kinds(short, run, call, tmp_path):
    """A parameter, a buffer that no file has, and dropout, which a resumed run repeats."""
    out = {}
    old, killed, whole = tmp_path / "old", tmp_path / "killed", tmp_path / "whole"
    run("train.py", *short, "--out", old)
    with scripts_of(copy_with(LAYERS, tmp_path / "copy")) as (changed_clip, changed):
        with pytest.raises(ValueError, match="before these parameters were added to the code"):
            run("train.py", "--resume", old)
        with mock.patch.object(changed, "draw_curves", side_effect=KeyboardInterrupt):  # after the first epoch
            assert call("train.py", *short, "--out", killed)[0] == 130
        changed.draw_curves = lambda path, state: None
        run("train.py", "--resume", killed)
        run("train.py", *short, "--out", whole)
        assert equal(saved(killed), saved(whole))
        for tune in ("both", "image"):
            out[tune] = run("train.py", *short, "--tune", tune, "--epochs", "1", "--out", tmp_path / tune)
        model = changed_clip.load(tmp_path / "both" / "last.pt")
        assert torch.equal(model.time, torch.arange(1.0, 3.0))
        assert "time" not in model.state_dict()
        video = torch.randint(256, (1, 2, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            one, two = model.encode_image(video[0])
            torch.testing.assert_close(model.encode_video(video)[0], (one + 2 * two) / 2 * model.gain)
            assert (model.train().encode_video(video) == 0).any()  # dropped in both frames
        run("evaluate.py", "--weights", tmp_path / "both" / "last.pt", "--workers", "0", "--out", tmp_path / "results")
        _, validations = read_log(tmp_path / "both")
        assert read_results(tmp_path / "results")["top1"] == validations[-1]["top1"]
    for tune in ("both", "image"):
        assert (saved(tmp_path / tune)["gain"] != 1).any()
    frozen = {tune: re.search(r"^frozen +(.*)$", text, re.MULTILINE)[1].split(", ") for tune, text in out.items()}
    assert frozen["both"] == ["token_embedding"]
    assert frozen["image"] == ["ln_final", "logit_scale", "positional_embedding", "text_projection",
                               "token_embedding", "transformer"]
