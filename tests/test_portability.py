"""The scripts run where Python has little of what Linux has: new processes start empty, and ASCII is the encoding."""
import ast
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PROJECT, script

SOURCES = ("clip.py", "data.py", "evaluate.py", "train.py", "prompt.py", "toy/draw.py")
MODULES = {"fcntl", "resource", "pwd", "grp", "termios"}
FUNCTIONS = {"sched_getaffinity", "sigwaitinfo", "sigtimedwait", "pthread_sigmask", "fork"}
ASKED_FOR = {"pthread_sigmask"}  # by hasattr, before it is used

# Python runs a sitecustomize.py that it finds on its path before all else, in workers too. This one takes away what
# other systems lack: the functions, as the libraries can do without them, and from the project's own files the modules.
SITE = """
import builtins, multiprocessing, os, signal, sys, warnings

original = builtins.__import__

def guarded(name, globals=None, *rest, **options):
    folder = os.path.dirname(os.path.abspath((globals or {}).get("__file__") or "/"))
    if name.split(".")[0] in modules and folder in (project, os.path.join(project, "toy")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, *rest, **options)

builtins.__import__ = guarded
for name in functions:
    for module in (os, signal):
        if hasattr(module, name):
            delattr(module, name)
os.process_cpu_count = os.cpu_count  # it would call sched_getaffinity
multiprocessing.set_start_method("spawn")
warnings.filterwarnings("error", category=EncodingWarning,
                        module=r"(__main__|__mp_main__|clip|data|evaluate|train|prompt|toy|toy\\.draw)$")
with open(os.path.join(os.path.dirname(__file__), "started"), "a", encoding="utf-8") as file:
    print(sys.orig_argv, file=file)
"""


def other_machine(folder, project=PROJECT):
    """The environment of a process on such a machine; `folder` is for its sitecustomize.py, and for the list of the
    processes that were started, `started`."""
    known = f"project, modules, functions = {str(project)!r}, {MODULES}, {FUNCTIONS}\n"
    (folder / "sitecustomize.py").write_text(known + SITE, encoding="utf-8")
    return {"PYTHONPATH": str(folder), "PYTHONWARNDEFAULTENCODING": "1", "LC_ALL": "C", "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(("code", "message"), [
    ("import fcntl", "ModuleNotFoundError"),
    ("import os; os.sched_getaffinity(0)", "AttributeError"),
    ("import signal; signal.sigwaitinfo({2})", "AttributeError"),
    ("import os; os.fork()", "AttributeError"),
    ("open(__file__)", "EncodingWarning"),
    ("print('\u2588')", "UnicodeEncodeError"),
    ("import multiprocessing; multiprocessing.Process(target=lambda: None).start()", "PicklingError|pickle"),
    ("import subprocess, tempfile, multiprocessing.synchronize; print('fine')", ""),
])
def test_the_check_notices_what_other_machines_lack(code, message, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(code, encoding="utf-8")
    process = subprocess.run([sys.executable, file], env=os.environ | other_machine(tmp_path, project=tmp_path),
                             capture_output=True, text=True, timeout=60)
    assert (process.returncode != 0) == bool(message)
    assert re.search(message, process.stderr)


def test_all_scripts_run_on_other_machines(home, tmp_path):
    """Their workers start empty, and what these need goes to them in a pickle."""
    machine = other_machine(tmp_path) | {"OMP_NUM_THREADS": "1"}
    short = ("--classes", "novel", "--shots", "2", "--frames", "1", "--epochs", "1", "--workers", "1")

    def run(*arguments):
        return script(*arguments, "--root", tmp_path / "toy", home=home, cwd=tmp_path, **machine).stdout

    def train_and_evaluate():
        yield run("train.py", *short, "--batch-size", "16", "--out", tmp_path / "run")
        yield run("evaluate.py", "--weights", tmp_path / "run" / "best.pt", "--split", "1", "2", "--workers", "1")

    assert "880 videos of 25 classes" in run("data.py")  # which draws the toy
    with ThreadPoolExecutor() as pool:
        other = pool.submit(run, "prompt.py", *short, "--out", tmp_path / "prompts")
        trained, evaluated = train_and_evaluate()
        prompted = other.result()
    assert "the best model is" in trained
    assert "the best model is" in prompted
    assert r"\xb1" in evaluated  # in ASCII; elsewhere ±
    started = (tmp_path / "started").read_text(encoding="utf-8").splitlines()
    assert sum("--multiprocessing-fork" in line for line in started) >= 6  # at least 2, 2 and 2


def parse(name):
    return ast.walk(ast.parse((PROJECT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_asks_for_what_only_some_systems_have(name):
    """Not even where the runs above do not come by."""
    for node in parse(name):
        words = {getattr(node, field, None) for field in ("id", "attr", "module")}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            words |= {alias.name for alias in node.names}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = {node.value}
            assert not re.search(r"/proc\b", node.value), f"line {node.lineno}"
        assert not words & {*MODULES, *FUNCTIONS - ASKED_FOR, "ctypes"}, f"line {node.lineno}"


def opens_text(node):
    """Whether a piece of code opens, reads or writes a text file, by its mode."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("data"), "read_text")):
            return False  # it finds out the encoding
        case ast.Call(ast.Attribute(_, "read_text" | "write_text")):
            return True
        case ast.Call(ast.Name("open") | ast.Attribute(_, "fdopen"), [_, *mode]):
            default = "r"
        case ast.Call(ast.Attribute(ast.Name("gzip"), "open"), [_, *mode]):
            default = "rb"
        case ast.Call(ast.Attribute(ast.Name("av" | "os" | "Image"), "open")):
            return False
        case ast.Call(ast.Attribute(_, "open"), mode):  # of a Path
            default = "r"
        case _:
            return False
    mode = [option.value for option in node.keywords if option.arg == "mode"] or mode
    mode = mode[0].value if mode else default
    return "b" not in mode and (default == "r" or "t" in mode)


@pytest.mark.parametrize(("code", "text"), [
    ("open(path)", True), ("open(path, 'w')", True), ("open(path, 'rb')", False), ("open(path, mode='ab')", False),
    ("path.open()", True), ("(a / b).open('rb')", False), ("gzip.open(path)", False), ("gzip.open(path, 'rt')", True),
    ("(a / b).write_text('text')", True), ("data.read_text(path)", False), ("av.open(path, 'w')", False),
])
def test_the_check_knows_text_from_bytes(code, text):
    assert opens_text(ast.parse(code, mode="eval").body) == text


@pytest.mark.parametrize("name", SOURCES)
def test_text_files_have_their_encoding_named(name):
    unnamed = [node.lineno for node in parse(name) if opens_text(node) and not any(
        option.arg == "encoding" and isinstance(option.value, ast.Constant) for option in node.keywords)]
    assert unnamed == []
