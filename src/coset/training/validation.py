"""Errors on held-out structures, summed over ranks: each evaluates its part."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from coset.data.batching import MicroBatch, equal_parts
from coset.data.random import hashed
from coset.pet.model import Pet
from coset.training.batches import Batch, Source, make_batch
from coset.training.loss import Predictions, predict
from coset.training.parallel import Ranks, sum_over_ranks
from coset.training.settings import LossSettings

STRUCTURES_PER_BATCH = 64
SUMS = ("energy", "energies", "forces", "components", "stress", "stresses")


def validate(
    network: Pet,
    source: Source,
    baseline: np.ndarray,
    settings: LossSettings,
    ranks: Ranks,
    limit: int = 0,
) -> dict[str, float]:
    """Mean absolute errors over a store: energy in eV/atom, force components in eV/Å, stress eV/Å³.

    Forces and stress are those of the energy if the loss has them, else the direct ones. limit:
    a fixed random sample of so many records (0: all).
    """
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    for batch in _batches(source, baseline, ranks, limit):
        predictions = predict(network, batch, settings, create_graph=False)
        sums += torch.tensor(_errors(predictions, batch), dtype=torch.float64)
    total = dict(zip(SUMS, sum_over_ranks(sums).tolist(), strict=True))
    means = {
        "energy_mae": (total["energy"], total["energies"]),
        "forces_mae": (total["forces"], total["components"]),
        "stress_mae": (total["stress"], total["stresses"]),
    }
    return {name: value / count for name, (value, count) in means.items() if count}


def score(metrics: dict[str, float]) -> float:
    """One number to choose weights by: the geometric mean of energy and force errors."""
    values = [metrics[name] for name in ("energy_mae", "forces_mae") if name in metrics]
    return math.exp(sum(math.log(max(v, 1e-12)) for v in values) / len(values)) if values else 0.0


def _batches(source: Source, baseline: np.ndarray, ranks: Ranks, limit: int) -> Iterator[Batch]:
    rows = np.arange(len(source.index))
    if limit and limit < len(rows):
        rows = np.sort(np.argsort(hashed(0, "validation", rows))[:limit])
    cost = source.index["n_atoms"][rows].astype(float)
    n_parts = max(math.ceil(len(rows) / STRUCTURES_PER_BATCH), 1)
    for number, part in enumerate(equal_parts(cost, min(n_parts, len(rows)))):
        if number % ranks.world == ranks.rank:
            micro = MicroBatch(store=np.zeros(len(part), np.int64), row=rows[part], slot=part)
            yield make_batch([source], micro, baseline, None)


def _errors(predictions: Predictions, batch: Batch) -> Sequence[float]:
    """Sums and counts in the order of `SUMS`."""
    labels, structures = batch.labels, batch.structures
    assert labels.energy is not None
    assert labels.forces is not None
    assert labels.stress is not None
    conservative = predictions.forces is not None
    forces = predictions.forces if conservative else predictions.direct_forces
    virial = predictions.virial if conservative else predictions.direct_virial
    result = []
    differences = [(predictions.energy - labels.energy) / structures.n_atoms]
    differences.append(torch.zeros(0) if forces is None else forces - labels.forces)
    stress = torch.zeros(0)
    if virial is not None:
        symmetric = 0.5 * (virial + virial.mT)
        stress = symmetric / structures.volume[:, None, None] - labels.stress
    for difference in (*differences, stress):
        real = difference.detach()[torch.isfinite(difference)]
        result += [float(real.abs().sum()), float(real.numel())]
    return result
