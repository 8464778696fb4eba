"""The rules of the code base as tests: style, types, imports, sizes, public names, documents.

What could run code from data is looked for in security/test_source_scan.py.

A limit crossed on purpose is a line in this file, never an accident.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import coset
from coset.cli import app
from coset.structures import make_structure

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "coset"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = Path(sys.executable).parent

MAX_LINES = 400
LONGER_FILES: dict[str, int] = {}
"""Files that may be longer than MAX_LINES, by path below src/coset, with their own limit."""

PUBLIC_NAMES = {
    "Calculator",
    "CalculatorPotential",
    "CheckpointError",
    "Conductivity",
    "ConductivitySettings",
    "ConfigError",
    "CosetError",
    "ElasticSettings",
    "Elasticity",
    "EosSettings",
    "EquationOfState",
    "HullDistance",
    "HullEntry",
    "HullSettings",
    "LoadSettings",
    "MissingExtraError",
    "ModelPotential",
    "PhononSettings",
    "Phonons",
    "Potential",
    "Properties",
    "QuasiHarmonic",
    "QuasiHarmonicSettings",
    "RelaxSettings",
    "Relaxation",
    "StructureError",
    "Structures",
    "TIGHT",
    "conductivity",
    "elastic",
    "eos",
    "evaluate",
    "fixed_atoms",
    "from_ase",
    "hessian",
    "hull",
    "import_metatrain",
    "inspect_installation",
    "list_models",
    "load_checkpoint",
    "load_model",
    "phonons",
    "quasi_harmonic",
    "read_structures",
    "relax",
    "save_checkpoint",
    "to_ase",
    "write_structures",
}
"""What users may rely on: a change here is a change for them."""

HEAVY = {"ase", "huggingface_hub", "matplotlib", "moyopy", "phonopy", "rich", "scipy", "seekpath"}
HEAVY |= {"symfc", "typer"}
IMPORT_SECONDS = 0.2
IMPORT_ATTEMPTS = 8

GLOBAL_STATE = {
    "getenv",
    "set_default_device",
    "set_default_dtype",
    "set_default_tensor_type",
    "set_detect_anomaly",
    "set_float32_matmul_precision",
    "use_deterministic_algorithms",
}
OF_THE_PROCESS = {"set_num_threads", "set_num_interop_threads"}
"""Calls that only the command line may make, because it owns the process."""

SCANNED = ("src", "tests", "docs", "examples", "benchmarks", ".ci")
TEXT = {"", ".cff", ".cfg", ".cif", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml"}
PLACES = ("/root/", "/home/", "/Users/")
HOSTS = ("pypi.org", "pythonhosted.org", "download.pytorch.org", "anaconda.org", "conda.anaconda")


def run(*command):
    """Run a tool from the root of the tree; its output is the message if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.fixture(scope="module")
def trees():
    return {relative(path): ast.parse(path.read_text()) for path in MODULES}


# The tools


def test_format():
    run(sys.executable, "-m", "ruff", "format", "--check", "--output-format", "concise", ".")


def test_lint():
    run(sys.executable, "-m", "ruff", "check", "--output-format", "concise", ".")


def test_types():
    run(sys.executable, "-m", "mypy")


def test_import_direction():
    run(SCRIPTS / "lint-imports", "--no-logo")


def test_modules_take_only_the_version_from_the_root(trees):
    """The root knows all modules, so that a module that uses it knows them too."""
    found = [
        f"{place} coset.{node.attr}"
        for place, node in nodes_of(trees, ast.Attribute)
        if ast.unparse(node.value) == "coset" and node.attr != "__version__"
    ]
    assert not found


def test_all_shapes_are_checked(trees, pytestconfig):
    """The import hook covers every module that annotates shapes."""
    *hooked, checker = pytestconfig.getoption("--jaxtyping-packages").split(",")
    assert checker == "shape_hook.checked"
    modules = {
        "coset." + place.split(".py:")[0].replace("/", ".").removesuffix(".__init__")
        for place, node in nodes_of(trees, ast.ImportFrom)
        if node.module == "jaxtyping"
    }
    missing = [one for one in modules if not any(f"{one}.".startswith(f"{h}.") for h in hooked)]
    assert not missing


def test_a_wrong_shape_is_noticed():
    with pytest.raises(TypeCheckError):
        make_structure(torch.zeros(3, 2), torch.ones(3, dtype=torch.int64))


# Sizes (ruff checks the limits of functions)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_length(path):
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= LONGER_FILES.get(relative(path), MAX_LINES)


def test_longer_files_still_need_their_limit():
    for name in LONGER_FILES:
        assert len((PACKAGE / name).read_text().splitlines()) > MAX_LINES, name


# What the package never does


def nodes_of(trees, kind):
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{name}:{node.lineno}", node


def test_no_broad_except(trees):
    found = []
    for place, node in nodes_of(trees, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(kind) if kind else "bare" for kind in kinds}
        found += [place] if names & {"bare", "Exception", "BaseException"} else []
    assert not found


def test_no_global_state(trees):
    """No `global`, no environment variable (but those of a launcher), no setting of torch."""
    found = [place for place, _ in nodes_of(trees, ast.Global)]
    for place, node in nodes_of(trees, ast.Call):
        *_, name = ast.unparse(node.func).split(".")
        forbidden = GLOBAL_STATE | (set() if place.startswith("cli/") else OF_THE_PROCESS)
        found += [f"{place} {name}"] if name in forbidden else []
    for place, node in nodes_of(trees, ast.Attribute):
        launcher = place.startswith("training/parallel.py")
        found += [f"{place} environ"] if node.attr == "environ" and not launcher else []
    for place, node in nodes_of(trees, ast.Assign):
        targets = [ast.unparse(target) for target in node.targets]
        found += [f"{place} {target}" for target in targets if target.startswith("torch.")]
    assert not found


# The public face


def test_public_names():
    assert set(coset.__all__) == PUBLIC_NAMES
    undocumented = [name for name in PUBLIC_NAMES if not getattr(coset, name).__doc__]
    assert not undocumented
    assert set(dir(coset)) >= PUBLIC_NAMES


def test_type_checkers_see_the_public_names(trees):
    """Names are imported lazily; what mypy reads has to agree with that."""
    (block,) = [node for node in trees["__init__.py"].body if isinstance(node, ast.If)]
    seen = {one.asname for node in block.body for one in node.names}
    assert seen == PUBLIC_NAMES


IMPORT_PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import coset
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def import_probe():
    seconds, modules = json.loads(run(sys.executable, "-c", IMPORT_PROBE))
    return seconds, set(modules)


def test_import_is_light():
    _, modules = import_probe()
    assert not modules & HEAVY


def test_import_is_fast():
    """Beyond `import torch`; the smallest of a few, because other processes share the machine."""
    fastest = float("inf")
    for attempt in range(IMPORT_ATTEMPTS):
        fastest = min(fastest, import_probe()[0])
        if attempt >= 2 and fastest <= IMPORT_SECONDS:
            break
    assert fastest <= IMPORT_SECONDS


# Documents


def text_files():
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in SCANNED:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [p for p in files if p.suffix in TEXT and "__pycache__" not in p.parts]


def test_no_machine_paths_or_registries():
    found = []
    for path in text_files():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in PLACES + HOSTS if word in text]
    assert not found


def readme_commands():
    """Name and lines of what stands between `<!-- command: NAME -->` and `<!-- end -->`."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- command: (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return {
        name: [line for line in block.splitlines() if line and not line.startswith("```")]
        for name, block in blocks
    }


def test_readme_has_two_commands_of_one_line():
    commands = readme_commands()
    assert list(commands) == ["relax", "test"]
    for lines in commands.values():
        assert len(lines) == 1
    assert "coset relax" in commands["relax"][0]
    assert "pytest" in commands["test"][0]


def test_ci_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    for name in readme_commands():
        assert run("bash", script, "--show", name).splitlines() == readme_commands()[name]


def test_python_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        run(sys.executable, "-c", block)


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (path.parent / link).exists()]
    assert not missing


def test_readme_lists_the_commands_of_the_command_line():
    groups = [group.name for group in app.registered_groups]
    names = [command.callback.__name__ for command in app.registered_commands] + groups
    table = re.findall(r"^\| `coset (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(names)
