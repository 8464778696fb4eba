"""Equations of state of the elements in four cubic structures, against all-electron PBE.

Elements for which neither spin nor U matters: without O, Cr to Ni and the f elements; noble gases,
which PBE hardly binds, on their own. Seven volumes from 94 to 106 % of the potential's own minimum.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coset.structures import concatenate, split
from model_card.reference import (
    F_ELEMENTS,
    MAGNETIC,
    NOBLE_GASES,
    Reference,
    element_of,
    equations_of_state,
)
from model_card.statistics import percent, spread
from model_card.strains import Minimum, birch_murnaghan, scaled
from model_card.subjects import Progress, Subject, evaluate_all

FACTORS = np.linspace(0.94, 1.06, 7)
CENTERED = 0.02
ROUNDS = 8
STRUCTURES = ("FCC", "BCC", "SC", "Diamond")


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Errors of volumes and bulk moduli in percent, by structure and for every crystal."""
    wanted = [
        one
        for one in equations_of_state(data)
        if element_of(one) not in F_ELEMENTS | MAGNETIC and subject.knows(one.structure)
    ]
    minima = _minima(subject, wanted, progress)
    rows = {
        one.name: [
            percent(minimum.volume, float(one.structure.volume)),
            percent(minimum.bulk_modulus_GPa, one.bulk_modulus_GPa),
        ]
        for one, minimum in zip(wanted, minima, strict=True)
        if minimum is not None
    }
    noble = {one.name for one in wanted if element_of(one) in NOBLE_GASES}
    metals = {name: row for name, row in rows.items() if name not in noble}
    groups = {"all": metals, "noble gases": {name: rows[name] for name in noble & set(rows)}}
    groups |= {s: {n: row for n, row in metals.items() if n.endswith(s)} for s in STRUCTURES}
    return {
        "crystals": len(wanted) - len(noble),
        "noble_gas_crystals": len(noble),
        "without_minimum": [
            one.name for one, found in zip(wanted, minima, strict=True) if found is None
        ],
        "errors_percent": {
            group: {
                "volume": spread({name: row[0] for name, row in own.items()}),
                "bulk_modulus": spread({name: row[1] for name, row in own.items()}),
            }
            for group, own in groups.items()
        },
        "volume_and_bulk_modulus_errors_percent": rows,
    }


def _minima(
    subject: Subject, wanted: Sequence[Reference], progress: Progress
) -> list[Minimum | None]:
    """The minimum of each E(V), followed until it lies in the middle of the volumes."""
    factors = np.ones(len(wanted))
    minima: list[Minimum | None] = [None] * len(wanted)
    pending = list(range(len(wanted)))
    for _ in range(ROUNDS):
        energies = _energies(subject, [wanted[k] for k in pending], factors[pending], progress)
        moving = []
        for k, curve in zip(pending, energies, strict=True):
            volumes = factors[k] * FACTORS * float(wanted[k].structure.volume)
            fit = birch_murnaghan(volumes, curve)
            found = volumes[curve.argmin()] if fit is None else fit.volume
            shift = np.clip(found / volumes.mean(), FACTORS[0], FACTORS[-1])
            factors[k] *= shift
            if fit is not None and abs(shift - 1) <= CENTERED:
                minima[k] = fit
            else:
                moving.append(k)
        pending = moving
        if not pending:
            break
    return minima


def _energies(
    subject: Subject, chosen: Sequence[Reference], factors: np.ndarray, progress: Progress
) -> np.ndarray:
    """Energies in eV, one row for each crystal."""
    copies = concatenate([one.structure for one in chosen for _ in FACTORS])
    volumes = scaled(copies, (factors[:, None] * FACTORS).reshape(-1))
    found = evaluate_all(subject.precise, split(volumes), progress)
    energies = [float("nan") if one is None else float(one.energy) for one in found]
    return np.array(energies).reshape(-1, len(FACTORS))
