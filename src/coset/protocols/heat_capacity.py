"""Protocol `heat-capacity`: C_V at 300 K of binaries, against phonons with PBE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from coset.potential import Potential
from coset.protocols.metrics import error_metrics, finished, mean_metrics
from coset.protocols.records import (
    Entry,
    Found,
    Metric,
    Published,
    Row,
    Value,
    hash_ordered,
    sha256_hex,
)
from coset.protocols.references import existing, read_values
from coset.units import EV_PER_UNIT
from coset.workflows.harmonic import HarmonicSettings, harmonic_primitive

FILE = "heat_capacity_alexandria_binaries.extxyz"
HEAT = "heat_capacity_J_per_mol_K"
IMAGINARY = "imaginary_share"
KELVIN = 300.0
J_PER_MOL_PER_EV = 1e3 / EV_PER_UNIT["kJ/mol"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatCapacityProtocol:
    """Per mole of the cell given, at the potential's own volume.

    max_atoms: larger cells are left out, None for all: the work grows as their cube. min_edge: Å,
    of the supercell that force constants reach. spacing: Å^-1 with 2 pi, of the mesh. Both are
    coarse on purpose: at 300 K they change C_V of stable crystals by less than 0.1 %.
    """

    name: ClassVar[str] = "heat-capacity"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    packages: ClassVar[tuple[str, ...]] = ("phonopy",)
    parity: ClassVar[tuple[str, ...]] = (HEAT,)

    harmonic: HarmonicSettings = field(default_factory=HarmonicSettings)
    max_atoms: int | None = 12
    min_edge: float = 10.0
    spacing: float = 0.15

    def entries(self, data: Path) -> list[Entry]:
        """Binaries with cells that are not too large."""
        found = read_values(existing(data, FILE), {"heat_capacity": HEAT})
        most = math.inf if self.max_atoms is None else self.max_atoms
        return hash_ordered([one for one in found if len(one.numbers) <= most], sha256_hex)

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """C_V without imaginary modes, and their share."""
        found = harmonic_primitive(potential, entry.structures, self.harmonic, self.min_edge)
        thermal = found.thermal(self.spacing, (KELVIN,))
        cells = len(entry.numbers) / len(found.atoms)
        own = float(thermal.heat_capacity[0]) * J_PER_MOL_PER_EV * cells
        return Found(
            status=found.status,
            code=found.code,
            reason=found.reason,
            values=(
                Value(name=HEAT, own=own, reference=entry.values[HEAT]),
                Value(name=IMAGINARY, own=thermal.imaginary_share),
            ),
        )

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Errors, and how many have imaginary modes (more than 1 % of all)."""
        done = finished(rows)
        return (
            *error_metrics(done, HEAT, unit="J_per_mol_K"),
            *mean_metrics(
                done,
                IMAGINARY,
                lambda shares: 100.0 * float((shares > 0.01).mean()),
                called="with_imaginary_modes_percent",
            ),
        )

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """None in these data."""
        return ()
