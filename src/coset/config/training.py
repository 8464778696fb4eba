"""The file of a training run.

Tables that look like a dataclass of the library are that dataclass: its fields, defaults and range
checks are not repeated here. Only tables of another shape have a class of their own.
"""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, PlainValidator

from coset.ase_interface.labels import symbols_of
from coset.config.reader import read_table
from coset.errors import ConfigError
from coset.pet.hypers import (
    MAX_ATOMIC_NUMBER,
    CutoffHypers,
    NetworkHypers,
    PetHypers,
    Quantity,
    Target,
)
from coset.training.settings import (
    BatchSettings,
    DataSettings,
    ModelFacts,
    OptimizerSettings,
    RunSettings,
    StageSettings,
    TrainSettings,
)

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(PetHypers)}


def read_training(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """The run that a TOML file describes, with `key=value` overrides.

    Stores are found relative to the folder of the file, the run relative to the current one.

    Raises:
        ConfigError: with one line for every problem.
    """
    file = Path(path).expanduser()
    return read_table(TrainingFile, file, overrides).build(file.parent)


def training_schema() -> dict[str, Any]:
    """JSON schema of the file, for editors."""
    return TrainingFile.model_json_schema()


def atomic_numbers(elements: object) -> tuple[int, ...]:
    """Atomic numbers from '1-83,89-94' or from a list of symbols and numbers.

    Raises:
        ConfigError: what is neither an element nor a range of them.
    """
    items = elements.split(",") if isinstance(elements, str) else elements
    if not isinstance(items, list):
        raise ConfigError(f"model.elements = {elements!r:.60}, expected '1-83,89-94' or a list")
    return tuple(number for item in items for number in _numbers(str(item).strip()))


def _numbers(item: str) -> Sequence[int]:
    """One symbol, number or range."""
    symbols = symbols_of(range(1, MAX_ATOMIC_NUMBER + 1))
    if item in symbols:
        return [symbols.index(item) + 1]
    if found := re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", item):
        first, last = int(found[1]), int(found[2] or found[1])
        if 1 <= first <= last <= MAX_ATOMIC_NUMBER:
            return range(first, last + 1)
    raise ConfigError(
        f"model.elements has {item!r}, expected a symbol, an atomic number or a range like 1-83"
    )


def _without_number(cutoff: object) -> object:
    """A fixed cutoff has no number of neighbors, which TOML has no word for."""
    if isinstance(cutoff, dict) and cutoff.get("adaptive") == "fixed":
        return {"n_neighbors": None, **cutoff}
    return cutoff


Elements = Annotated[
    tuple[int, ...], PlainValidator(atomic_numbers, json_schema_input_type=str | list[int | str])
]


class ModelTable(BaseModel, extra="forbid", frozen=True):
    """The network; every target is named for its quantity."""

    elements: Elements
    targets: tuple[Quantity, ...]
    zbl: float = DEFAULTS["zbl"]
    network: NetworkHypers = NetworkHypers()
    cutoff: Annotated[CutoffHypers, BeforeValidator(_without_number)] = CutoffHypers()

    def build(self) -> PetHypers:
        """Hyperparameters of a new network, in our own numerics."""
        return PetHypers(
            atomic_types=self.elements,
            targets=tuple(Target(name=quantity, quantity=quantity) for quantity in self.targets),
            zbl=self.zbl,
            network=self.network,
            cutoff=self.cutoff,
            numerics="coset",
        )


class TrainingFile(BaseModel, extra="forbid", frozen=True):
    """A training run."""

    run: RunSettings
    facts: ModelFacts = ModelFacts()
    data: DataSettings
    batch: BatchSettings = BatchSettings()
    model: ModelTable
    optimizer: OptimizerSettings = OptimizerSettings()
    start: str = ""
    stage: tuple[StageSettings, ...]

    def build(self, folder: Path) -> TrainSettings:
        """Settings whose stores are absolute paths, seen from `folder`."""
        stores = [replace(one, path=_store(folder, one.path)) for one in self.data.train]
        valid = [_store(folder, path) for path in self.data.valid]
        directory = str(Path(self.run.directory).expanduser())
        return TrainSettings(
            data=replace(self.data, train=tuple(stores), valid=tuple(valid)),
            model=self.model.build(),
            stages=self.stage,
            run=replace(self.run, directory=directory),
            facts=self.facts,
            batch=self.batch,
            optimizer=self.optimizer,
            start=_store(folder, self.start) if self.start else "",
        )


def _store(folder: Path, path: str) -> str:
    return str((folder / Path(path).expanduser()).resolve())
