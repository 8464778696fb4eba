"""Protocols `kappa-103` and `kappa-12`: thermal conductivity at 300 K of binaries, against PBE.

    SRD = 2 (kappa - kappa_ref)/(kappa + kappa_ref),   SRE = |SRD|,
    SRME = 2 sum_m |kappa_m - kappa_ref,m|/(kappa + kappa_ref)

of the mean over the axes, with the share kappa_m of every mode; SRE and SRME are 2 where there is
no conductivity because of imaginary modes or a space group that changed, as in the reference.

Reference: B. Póta et al., arXiv:2408.00755 (2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from coset.ase_interface.kappa_cases import read_kappa_cases
from coset.potential import Potential
from coset.protocols.frequencies import PHONONS, PUBLISHED, STRUCTURES
from coset.protocols.metrics import error_metrics, mean_metrics
from coset.protocols.mode_kappa import relative_mode_error
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
from coset.protocols.references import existing, read_lines, read_spectra
from coset.workflows.conductivity.results import PHONONDB_V1, Conductivity, ConductivitySettings
from coset.workflows.conductivity.run import conductivity

KAPPA, SRD, SRE, SRME, IMAGINARY = "kappa_W_per_mK", "srd", "sre", "srme", "imaginary"
WORST = 2.0
TWELVE = (
    *("mp-1265", "mp-22862", "mp-23251", "mp-19717"),  # rock salt: MgO, NaCl, KBr, PbTe
    *("mp-8062", "mp-2534", "mp-1479", "mp-22914"),  # zinc blende: SiC, GaAs, BP, CuCl
    *("mp-804", "mp-2133", "mp-661", "mp-672"),  # wurtzite: GaN, ZnO, AlN, CdS
)
"""A fixed part of the materials, of each structure and over two orders of magnitude of kappa.

The cheap ones first: a wurtzite takes ten times as many displaced supercells as a rock salt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KappaProtocol:
    """`phonondb-v1` with the supercells and mesh of each material.

    materials: keys of a part of them, in the order in which they are run; None for all.
    """

    files: ClassVar[tuple[str, ...]] = (STRUCTURES, PHONONS)
    packages: ClassVar[tuple[str, ...]] = ("phonopy", "phono3py")
    parity: ClassVar[tuple[str, ...]] = (KAPPA,)

    name: str = "kappa-103"
    materials: tuple[str, ...] | None = None
    conductivity: ConductivitySettings = PHONONDB_V1

    def entries(self, data: Path) -> list[Entry]:
        """The materials with their supercells and mesh."""
        structures = existing(data, STRUCTURES)
        cases = {one.material_id: one.settings for one in read_kappa_cases(str(structures))}
        found = []
        for entry in read_spectra(structures, existing(data, PHONONS)):
            if self.materials is not None and entry.key not in self.materials:
                continue
            own = cases[entry.key]
            settings = replace(
                self.conductivity,
                supercell=own.supercell,
                supercell_fc2=own.supercell_fc2,
                mesh=own.mesh,
            )
            found.append(replace(entry, conductivity=settings))
        if self.materials is None:
            return hash_ordered(found, sha256_hex)
        rank = {key: number for number, key in enumerate(self.materials)}
        return sorted(found, key=lambda entry: rank[entry.key])

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """Kappa, and its distance from the reference."""
        (result,) = conductivity(potential, entry.structures, entry.conductivity)
        return Found(
            status=result.status,
            code=result.code,
            reason=result.reason,
            values=_values(result, entry),
        )

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Errors; materials without conductivity count with the worst SRE."""
        return (
            *error_metrics(rows, KAPPA, unit="W_per_mK"),
            *mean_metrics(rows, SRD),
            *mean_metrics(rows, SRE),
            *mean_metrics(rows, SRME),
            *mean_metrics(
                rows,
                IMAGINARY,
                lambda values: 100.0 * float(values.mean()),
                called="with_imaginary_modes_percent",
            ),
        )

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """Other models over the same materials."""
        path = data / PUBLISHED
        if not path.is_file():
            return ()
        head, *models = read_lines(path)
        base = head["_base"]
        places = [k for k, name in enumerate(base["material_ids"]) if name in set(keys)]
        found = [_published(model, base["kappa_dft"], places) for model in models]
        return tuple(sorted(found, key=lambda one: one.metrics[0].value))


def _values(result: Conductivity, entry: Entry) -> tuple[Value, ...]:
    """What is known, with the worst SRE and SRME where there is no conductivity."""
    if result.result is None:
        return ()
    imaginary = Value(name=IMAGINARY, own=float(result.result.n_imaginary > 0))
    kappa = result.result.value
    if kappa is None or "SpaceGroupChanged" in result.warnings:
        return (Value(name=SRE, own=WORST), Value(name=SRME, own=WORST), imaginary)
    own, reference = float(np.trace(kappa[0])) / 3.0, entry.values[KAPPA]
    distance = relative_difference(own, reference)
    assert entry.spectrum is not None
    cell = entry.structures.cell[0].double().numpy()
    modes = relative_mode_error(result.result, entry.spectrum, cell)
    return (
        Value(name=KAPPA, own=own, reference=reference),
        Value(name=SRD, own=distance),
        Value(name=SRE, own=abs(distance)),
        *(() if modes is None else (Value(name=SRME, own=modes),)),
        imaginary,
    )


def relative_difference(one: float, other: float) -> float:
    """SRD, between -2 and 2."""
    return 2.0 * (one - other) / (one + other)


def _published(model: dict[str, Any], known: Sequence[float], places: Sequence[int]) -> Published:
    distances = []
    for place in places:
        own, failed = model["kappa_ml"][place], model["srme"][place] in (None, WORST)
        worst = failed or own is None
        distances.append(WORST if worst else abs(relative_difference(own, known[place])))
    by_mode = [WORST if (v := model["srme"][place]) is None else float(v) for place in places]
    imaginary = [100.0 * bool(model["imag_modes"][place]) for place in places]
    columns = {SRE: distances, SRME: by_mode, "with_imaginary_modes_percent": imaginary}
    metrics = tuple(
        Metric(name=name, group="all", value=float(np.mean(values)), count=len(values))
        for name, values in columns.items()
        if values
    )
    return Published(name=str(model["label"]), metrics=metrics)
