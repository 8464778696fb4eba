"""Bulk moduli of a fixed random subset of the binaries, from the potential's own geometry."""

from pathlib import Path

import numpy as np

from coset.data.random import hashed
from coset.structures import concatenate
from coset.workflows.relax import relax
from model_card.reference import Reference, elastic_binaries
from model_card.statistics import percent, spread
from model_card.strains import RELAX_ALL, bulk_moduli
from model_card.subjects import Progress, Subject

SIZE = 200
SHARED = 80
"""The first of them, for potentials that are too slow for all."""

MAX_ATOMS = 20
AT_ONCE = 25


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Errors in GPa and percent, for all crystals and for groups of them."""
    chosen = subset(data)
    shared = {one.name for one in chosen[:SHARED]}
    wanted = [
        one
        for one in chosen
        if subject.knows(one.structure) and (one.name in shared or not subject.shortened)
    ]
    found: dict[str, float] = {}
    for start in range(0, len(wanted), AT_ONCE):
        progress(start, len(wanted))
        found |= _moduli(subject, wanted[start : start + AT_ONCE])
    pairs = {
        one.name: (found[one.name], one.bulk_modulus_GPa, one.unseen)
        for one in wanted
        if np.isfinite(found[one.name])
    }
    return {
        "crystals": len(wanted),
        "failed": [one.name for one in wanted if one.name not in pairs],
        **({} if subject.shortened else _groups(pairs)),
        "shared": _summary({name: pair for name, pair in pairs.items() if name in shared}),
        "errors_percent": {name: percent(own, known) for name, (own, known, _) in pairs.items()},
    }


def subset(data: Path) -> list[Reference]:
    """The same structures at every run, of at most `MAX_ATOMS` atoms."""
    binaries = elastic_binaries(data)
    small = [key for key, one in binaries.items() if len(one.structure.positions) <= MAX_ATOMS]
    numbers = np.array([int(key.removeprefix("mp-")) for key in small])
    order = np.argsort(hashed(0, "bulk moduli", numbers))
    return [binaries[small[k]] for k in order[:SIZE]]


def _moduli(subject: Subject, wanted: list[Reference]) -> dict[str, float]:
    """Bulk modulus in GPa by name, NaN where a relaxation fails."""
    results = relax(subject.potential, concatenate([one.structure for one in wanted]), RELAX_ALL)
    names = [one.name for one, r in zip(wanted, results, strict=True) if r.status == "converged"]
    relaxed = [result.structures for result in results if result.status == "converged"]
    moduli = bulk_moduli(subject.potential, relaxed) if relaxed else []
    return {one.name: float("nan") for one in wanted} | dict(zip(names, moduli, strict=True))


def _groups(pairs: dict[str, tuple[float, float, bool]]) -> dict:
    return {
        "all": _summary(pairs),
        "unseen": _summary({name: pair for name, pair in pairs.items() if pair[2]}),
        "seen": _summary({name: pair for name, pair in pairs.items() if not pair[2]}),
    }


def _summary(pairs: dict[str, tuple[float, float, bool]]) -> dict:
    if len(pairs) < 2:
        return {"count": len(pairs)}
    own, known = np.array([pair[:2] for pair in pairs.values()]).T
    return {
        "mae_GPa": float(np.abs(own - known).mean()),
        "mean_error_GPa": float((own - known).mean()),
        "correlation": float(np.corrcoef(own, known)[0, 1]),
        "percent": spread({name: percent(pair[0], pair[1]) for name, pair in pairs.items()}),
    }
