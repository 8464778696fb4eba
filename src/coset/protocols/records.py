"""What a protocol asks, and what it notes about each material."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from jaxtyping import Float, Int
from numpy import ndarray

from coset.data.formula import formula_hash, reduced_formula
from coset.errors import ConfigError, NotConvergedError, StructureError
from coset.potential import Potential
from coset.structures import Structures
from coset.workflows.conductivity.results import ConductivitySettings
from coset.workflows.phonons.mesh import Mesh

BUCKETS = 10
"""Formulas whose hash is 0 modulo this are held out from training."""

Status = Literal["ok", "not_converged", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """Reference phonons: wave vectors of the primitive cell, how many of the mesh each stands for.

    supercell: of the cell given. primitive_matrix: columns are the primitive vectors in it. share:
    of a mode and its star in kappa, W/mK.
    """

    supercell: Mesh
    primitive_matrix: Float[ndarray, "3 3"]
    q_points: Float[ndarray, "points 3"]
    weights: Int[ndarray, " points"]
    frequency_THz: Float[ndarray, "points branches"]
    share: Float[ndarray, "points branches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One material of a reference: its values by name, and what else its protocol needs."""

    key: str
    structures: Structures
    values: Mapping[str, float]
    spectrum: Spectrum | None = None
    conductivity: ConductivitySettings | None = None

    @property
    def numbers(self) -> list[int]:
        """Atomic numbers."""
        return [int(number) for number in self.structures.atomic_numbers]


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A number of the potential; reference: what it should be, None for an error or a count."""

    name: str
    own: float
    reference: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a calculation of one material gives; own, reference: long data for parity plots."""

    status: Status
    code: str = ""
    reason: str = ""
    values: tuple[Value, ...] = ()
    own: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The record of one material; unseen: its formula is held out from training."""

    key: str
    formula: str
    unseen: bool
    n_atoms: int
    seconds: float
    status: Status
    code: str
    reason: str
    values: tuple[Value, ...]
    own: tuple[float, ...]
    reference: tuple[float, ...]

    def value(self, name: str) -> Value | None:
        """The value of a name, None if there is none."""
        return next((one for one in self.values if one.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number over a group of rows (`all`, `seen`, `unseen`), with how many entered."""

    name: str
    group: str
    value: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Metrics of another model, from the reference data, over the same materials."""

    name: str
    metrics: tuple[Metric, ...]


class Benchmark(Protocol):
    """A named protocol: a frozen dataclass of settings with these.

    files: of the reference, relative to the folder of the data. packages: whose versions matter.
    """

    files: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]
    parity: ClassVar[tuple[str, ...]]
    """Values drawn against their reference; empty for the long data of the rows."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def entries(self, data: Path) -> list[Entry]:
        """The materials, in the order in which they are done."""
        ...

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """What the potential gives for one."""
        ...

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Metrics over all."""
        ...

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """Other models over these materials."""
        ...


def measured(benchmark: Benchmark, potential: Potential, entry: Entry) -> Row:
    """The record of one material, whatever happens in it."""
    start = time.monotonic()
    found = _finite(_guarded(lambda: benchmark.measure(potential, entry)))
    return Row(
        key=entry.key,
        formula=reduced_formula(entry.numbers),
        unseen=formula_hash(entry.numbers) % BUCKETS == 0,
        n_atoms=len(entry.numbers),
        seconds=round(time.monotonic() - start, 3),
        status=found.status,
        code=found.code,
        reason=found.reason,
        values=found.values,
        own=found.own,
        reference=found.reference,
    )


def _guarded(compute: Callable[[], Found]) -> Found:
    try:
        return compute()
    except StructureError as error:
        return Found(status="failed", code=error.code, reason=error.reason)
    except NotConvergedError as error:
        return Found(status="not_converged", code=error.code, reason=error.reason)


def _finite(found: Found) -> Found:
    """Without values that are not finite; the first of them is the fault if there was none."""
    kept = tuple(value for value in found.values if math.isfinite(value.own))
    if len(kept) == len(found.values):
        return found
    name = next(value.name for value in found.values if not math.isfinite(value.own))
    if found.status != "ok":
        return replace(found, values=kept)
    reason = f"{name} is not defined"
    return replace(found, values=kept, status="failed", code="Undefined", reason=reason)


def hash_ordered(entries: Sequence[Entry], order: Callable[[str], str]) -> list[Entry]:
    """The entries by the order of their keys, the same at every run."""
    return sorted(entries, key=lambda one: (order(one.key), one.key))


def sha256_hex(key: str) -> str:
    """An order that no one chose."""
    return hashlib.sha256(key.encode()).hexdigest()


def missing_reference(path: Path, reason: str) -> ConfigError:
    """The error for reference data that are not there or not what they should be."""
    return ConfigError(
        f"reference data {path}: {reason}",
        code="NoReference",
        field="data",
        hint="--data is the folder of the reference data, laid out as in docs/protocols.md",
    )
