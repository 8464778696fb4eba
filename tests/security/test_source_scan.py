"""No file of this repository runs code from data: no eval, no pickle, no shell, no unsafe loader.

An exception stands on the line itself, with its reason: `# security: allowed, REASON`.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("src", "tests", "examples", "benchmarks", "docs", ".ci")
TAG = re.compile(r"# security: allowed, \w.{9,}")

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
MODULES = {
    "_pickle", "cPickle", "cloudpickle", "code", "ctypes", "dill", "joblib", "marshal", "pickle",
    "pty", "runpy", "shelve", "telnetlib",
}  # fmt: skip
ATTRIBUTES = {
    "numpy.loads", "os.execl", "os.execv", "os.execve", "os.execvp", "os.popen", "os.posix_spawn",
    "os.spawnl", "os.spawnv", "os.system", "pandas.read_pickle", "subprocess.getoutput",
    "torch.hub", "torch.jit.load", "torch.load", "torch.ops.load_library", "torch.package",
    "torch.serialization.load", "yaml.full_load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
IMPORTERS = {"importlib.import_module", "importlib.util.spec_from_file_location"}


def files():
    """All Python files, and those of the folders that have Python without a suffix."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def aliases(tree):
    """What the names of a file stand for, from its imports."""
    meaning = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                meaning[one.asname or one.name.split(".")[0]] = (
                    one.name if one.asname else one.name.split(".")[0]
                )
        if isinstance(node, ast.ImportFrom) and not node.level:
            for one in node.names:
                meaning[one.asname or one.name] = f"{node.module}.{one.name}"
    return meaning


def full_name(node, meaning):
    """The dotted name of an expression, with the imports resolved."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, meaning)}.{node.attr}"
    return meaning.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def imported_modules(node):
    if isinstance(node, ast.Import):
        return {one.name.split(".")[0] for one in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or "").split(".")[0]}
    return set()


def is_constant(node):
    """A literal, or an entry of a table whose name says that it is a constant of the file."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id.isupper()
    return isinstance(node, ast.Constant)


def faults_of_call(node, meaning):
    name = full_name(node.func, meaning)
    if isinstance(node.func, ast.Name) and name.removeprefix("builtins.") in CALLS:
        yield name
    if name in IMPORTERS and not is_constant(node.args[0]):
        yield f"{name} of a computed name"
    for keyword in node.keywords:
        constant = getattr(keyword.value, "value", None)
        if keyword.arg in KEYWORDS and constant is not False:
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        if keyword.arg == "weights_only" and constant is not True:
            yield f"weights_only={ast.unparse(keyword.value)}"


def faults(source):
    """Line and reason of everything forbidden in a source text that has no tag."""
    tree, lines = ast.parse(source), source.splitlines()
    meaning = aliases(tree)
    for node in ast.walk(tree):
        found = [f"import {name}" for name in imported_modules(node) & MODULES]
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{one.name}" for one in node.names}
            found += [f"import {name}" for name in names & ATTRIBUTES]
        if isinstance(node, ast.Attribute) and full_name(node, meaning) in ATTRIBUTES:
            found.append(full_name(node, meaning))
        if isinstance(node, ast.Call):
            found += faults_of_call(node, meaning)
        if found and not TAG.search("\n".join(lines[node.lineno - 1 : node.end_lineno])):
            yield from (f"{node.lineno}: {reason}" for reason in found)


def test_nothing_in_the_repository_runs_code_from_data():
    found = [f"{p.relative_to(ROOT)}:{fault}" for p in files() for fault in faults(p.read_text())]
    assert found == []


def test_the_package_itself_needs_no_exception():
    """Not even the reader of foreign checkpoints."""
    tagged = [path for path in (ROOT / "src").rglob("*.py") if TAG.search(path.read_text())]
    assert tagged == []


def test_the_scan_covers_the_package_and_its_tests():
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    assert {"src/coset/checkpoint.py", "tests/security/test_source_scan.py"} <= names


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "import builtins\nfrom builtins import exec\nexec('1')",
        "__import__('os')",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import dill.source",
        "import joblib",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nf = t.load",
        "from torch import load",
        "from torch.serialization import load",
        "import torch\ntorch.hub.load('a', 'b')",
        "import torch.jit\ntorch.jit.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import os\nos.system('x')",
        "from os import system",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget(config['class'])",
        "load_file(weights_only=False)",
        "eval('1')  # security: allowed",
        "eval('1')  # security: allowed, x",
    ],
)
def test_the_scan_finds(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import ast\nast.literal_eval(text)",
        "import subprocess\nsubprocess.run(['x'])",
        "from importlib import import_module\nimport_module('coset.cli')",
        "from importlib import import_module\nimport_module(HOMES[name])",
        "import tomllib\ntomllib.load(file)",
        "from coset.checkpoint import load\nload('x')",
        "eval('1')  # security: allowed, the argument is a constant",
    ],
)
def test_the_scan_passes(source):
    assert not list(faults(source))
