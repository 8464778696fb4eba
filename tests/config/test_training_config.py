"""The file of a training run: what it becomes, what is refused and in which words, overrides."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from coset.config.training import atomic_numbers, read_training, training_schema
from coset.errors import ConfigError
from coset.pet.hypers import CutoffHypers, NetworkHypers, PetHypers, Target
from coset.training.settings import (
    DataSettings,
    LossSettings,
    ModelFacts,
    RunSettings,
    StageSettings,
    StoreShare,
    Term,
    TrainSettings,
)

SMALLEST = """
[run]
directory = "runs/a"
[[data.train]]
path = "stores/train"
[model]
elements = [1, "O"]
targets = ["energy"]
[[stage]]
name = "all"
steps = 10
lr = 1e-3
loss = { energy = { weight = 1.0 } }
"""

FULL = """
[run]
directory = "~/runs/xs"
seed = 3

[facts]
name = "xs"
citation = ["a", "b"]

[data]
valid = ["/stores/valid"]

[[data.train]]
path = "../train"
share = 0.9

[[data.train]]
path = "~/more"
share = 0.1

[batch]
structures = 32

[model]
elements = "1-83,89-94"
targets = ["energy", "direct_forces", "direct_stress"]
zbl = 0.7

[model.network]
d_pet = 96
n_heads = 8

[model.cutoff]
cutoff = 6.0

[optimizer]
betas = [0.9, 0.95]

[[stage]]
name = "direct"
steps = 10000
lr = 1e-3

[stage.loss]
direct_forces = { weight = 1.0, delta = 0.02 }
energy = { weight = 0.1 }

[[stage]]
name = "conservative"
steps = 2000
lr = 5e-4
schedule = "wsd"

[stage.loss]
huber = "component"
forces = { weight = 1 }
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FULL)
    return path


def refusal(path, *overrides) -> list[str]:
    """Lines of the error, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        read_training(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_the_smallest_file_takes_every_default_from_the_library(tmp_path):
    (tmp_path / "run.toml").write_text(SMALLEST)
    assert read_training(tmp_path / "run.toml") == TrainSettings(
        run=RunSettings(directory="runs/a"),
        data=DataSettings(train=(StoreShare(path=str(tmp_path / "stores/train")),)),
        model=PetHypers(atomic_types=(1, 8), targets=(Target(name="energy", quantity="energy"),)),
        stages=(
            StageSettings(
                name="all", steps=10, lr=1e-3, loss=LossSettings(energy=Term(weight=1.0))
            ),
        ),
    )


def test_every_table_arrives(file):
    settings = read_training(str(file))
    assert settings.facts == ModelFacts(name="xs", citation=("a", "b"))
    assert settings.run.seed == 3
    assert settings.batch.structures == 32
    assert settings.optimizer.betas == (0.9, 0.95)
    model = settings.model
    assert model.atomic_types == (*range(1, 84), *range(89, 95))
    assert [(t.name, t.quantity) for t in model.targets] == [
        (q, q) for q in ("energy", "direct_forces", "direct_stress")
    ]
    assert model.numerics == "coset"
    assert model.zbl == 0.7
    assert model.network == replace(NetworkHypers(), d_pet=96)
    assert model.cutoff == replace(CutoffHypers(), cutoff=6.0)
    direct, conservative = settings.stages
    assert direct.loss.direct_forces == Term(weight=1.0, delta=0.02)
    assert conservative.schedule == "wsd"
    assert conservative.loss == LossSettings(forces=Term(weight=1.0), huber="component")


def test_paths(file, monkeypatch):
    """Stores are seen from the folder of the file, also through a relative name of it."""
    settings = read_training(file)
    stores = [store.path for store in settings.data.train]
    assert stores == [str(file.parent.parent / "train"), str(Path("~/more").expanduser())]
    assert settings.data.valid == ("/stores/valid",)
    assert settings.run.directory == str(Path("~/runs/xs").expanduser())
    monkeypatch.chdir(file.parent)
    assert read_training("run.toml") == settings


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stage.0.stesp=3", "unknown key 'stage.0.stesp'; did you mean 'steps'?"),
        ("stage.1.loss.forcs.delta=1", "unknown key 'stage.1.loss.forcs'; did you mean 'forces'?"),
        ("model.cutoff.cutof=5", "unknown key 'model.cutoff.cutof'; did you mean 'cutoff'?"),
        ("optimiser.clip=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("qqq=1", "unknown key 'qqq'"),
        ("stage.direct.lr=x", "stage.0.lr = 'x', expected a number"),
        ("optimizer.clip='1'", "optimizer.clip = '1', expected a number"),
        ("batch.structures=1.5", "batch.structures = 1.5, expected an integer"),
        ("run.seed=true", "run.seed = True, expected an integer"),
        ("run.directory=3", "run.directory = 3, expected a string"),
        ("data.valid=a", "data.valid = 'a', expected a list"),
        ("batch=3", "batch = 3, expected a table"),
        ("model=3", "model = 3, expected a table"),
        ("run.seed=2020-01-01", "run.seed = '2020-01-01', expected an integer"),
        ("stage.direct.schedule=wds", "stage.0.schedule = 'wds', expected 'cosine' or 'wsd'"),
        (
            "model.targets=['energy', 'dos']",
            "model.targets.1 = 'dos', expected 'energy', 'direct_forces' or 'direct_stress'",
        ),
        ("data.train=[{share=1}]", "missing key 'data.train.0.path'"),
        ("optimizer.betas=[0.9]", "missing key 'optimizer.betas.1'"),
        ("stage.direct.steps=0", "stage.0: stage.steps = 0 is outside [1, 1000000000000]"),
        ("optimizer.clip=nan", "optimizer.clip = nan is outside [1e-09, 1000000000.0]"),
        ("model.network.d_pet=0", "model.network: d_pet = 0 is outside [1, 16384]"),
        ("model.elements='1-200'", "model.elements has '1-200', expected a symbol, an atomic"),
        ("model.elements=3", "model.elements = 3, expected '1-83,89-94' or a list"),
        ("model.network.d_node=96", "d_node = d_pet = 96"),
        ("model.targets=['energy']", "stage direct weighs direct_forces, but the model has no"),
        ("stage.conservative.name=direct", "stages must have distinct names"),
        ("stage=[]", "no stage given"),
        ("data.train=[]", "data: no training store given"),
        ("stage.2.lr=1", "--set stage.2.lr: '2' not found, expected one of 0, direct, 1, conserv"),
        ("run.seed.x=1", "--set run.seed.x: 'x' not found, there is no table"),
        ("data.valid.0.x=1", "--set data.valid.0.x: 'x' not found, there is no table"),
        ("run.seed", "--set 'run.seed', expected key=value"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(file, override, line):
    (found,) = refusal(file, override)
    assert found.startswith(line)


def test_every_problem_has_its_line(file):
    lines = refusal(file, "stage.direct.lr=x", "run.sed=1", "batch.structures=0")
    assert lines == [
        "unknown key 'run.sed'; did you mean 'seed'?",
        "batch.structures = 0 is outside [1, 1000000]",
        "stage.0.lr = 'x', expected a number",
    ]


def test_missing_tables(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[data]\n")
    assert refusal(path) == [
        "missing key 'run'",
        "missing key 'data.train'",
        "missing key 'model'",
        "missing key 'stage'",
    ]


def test_no_file_and_no_toml(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"run\.toml cannot be read: No such file"):
        read_training(path)
    path.write_text("[run\n")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: .*line 1"):
        read_training(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_training(path)


def test_overrides(file):
    settings = read_training(
        file,
        [
            "stage.direct.lr=1e-4",
            "stage.1.precision=bfloat16",
            "stage.conservative.loss.virial.weight=2",
            "data.train.1.path=other",
            "data.valid.0=v",
            "model.network={d_pet=32, d_node=128}",
            "model.network.d_pet = 64",
            "facts.description=a = b",
        ],
    )
    direct, conservative = settings.stages
    assert (direct.lr, conservative.precision) == (1e-4, "bfloat16")
    assert conservative.loss.virial == Term(weight=2.0)
    assert settings.data.train[1] == StoreShare(path=str(file.parent / "other"), share=0.1)
    assert settings.data.valid == (str(file.parent / "v"),)
    assert settings.model.network == replace(NetworkHypers(), d_pet=64, d_node=128)
    assert settings.facts.description == "a = b"


def test_a_fixed_cutoff_has_no_number_of_neighbors(file):
    settings = read_training(file, ["model.cutoff.adaptive=fixed"])
    assert settings.model.cutoff.n_neighbors is None
    (line,) = refusal(file, "model.cutoff.adaptive=fixed", "model.cutoff.n_neighbors=8")
    assert "'fixed' has no number of neighbors" in line


@pytest.mark.parametrize(
    ("elements", "numbers"),
    [
        ("1-3,8", (1, 2, 3, 8)),
        (" H , 6-8,Og", (1, 6, 7, 8, 118)),
        (["Cu", 8, "1-2"], (29, 8, 1, 2)),
    ],
)
def test_elements(elements, numbers):
    assert atomic_numbers(elements) == numbers


@pytest.mark.parametrize("elements", ["", "1-", "3-1", "0", "119", "h", [True], [1.5], {"H": 1}])
def test_no_elements(elements):
    with pytest.raises(ConfigError, match=r"model\.elements"):
        atomic_numbers(elements)


def test_the_schema_has_every_field_and_nothing_else():
    schema = json.loads(json.dumps(training_schema()))
    tables = schema["$defs"]
    for kind in dataclasses_below(TrainSettings) - {TrainSettings, PetHypers, Target}:
        if kind.__name__ in tables:
            names = {field.name for field in fields(kind)}
            assert set(tables[kind.__name__]["properties"]) == names
    assert {"RunSettings", "StageSettings", "Term", "NetworkHypers"} <= set(tables)
    assert all(table["additionalProperties"] is False for table in (schema, *tables.values()))
    assert set(schema["required"]) == {"run", "data", "model", "stage"}


def dataclasses_below(kind) -> set:
    found = {kind}
    for hint in get_type_hints(kind).values():
        for one in (hint, *get_args(hint)):
            if is_dataclass(one):
                found |= dataclasses_below(one)
    return found
