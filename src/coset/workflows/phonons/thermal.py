"""Harmonic thermal properties of a primitive cell.

    F = sum [e/2 + kT ln(1 - e^(-x))],   S = sum k [x n - ln(1 - e^(-x))],
    C_v = sum k x² n (n + 1),   e = h f,   x = e/kT,   n = 1/(e^x - 1)

over all modes, the translations at Gamma and imaginary modes left out.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.units import EV_PER_K, EV_PER_THZ
from coset.workflows.phonons.modes import in_thz


@dataclass(frozen=True, kw_only=True, slots=True)
class Thermal:
    """Free energy (eV), entropy and heat capacity (eV/K) at constant volume, per primitive cell.

    Errors are standard errors of the mean over the samples, None for a single one.
    imaginary_share: of all modes, left out of the sums.
    """

    temperatures: Float[ndarray, " temperatures"]
    free_energy: Float[ndarray, " temperatures"]
    entropy: Float[ndarray, " temperatures"]
    heat_capacity: Float[ndarray, " temperatures"]
    free_energy_error: Float[ndarray, " temperatures"] | None
    entropy_error: Float[ndarray, " temperatures"] | None
    heat_capacity_error: Float[ndarray, " temperatures"] | None
    imaginary_share: float


def thermal_properties(
    values: Float[ndarray, "samples points branches"],
    weights: Float[ndarray, " points"],
    temperatures: Float[ndarray, " temperatures"],
) -> Thermal:
    """The mean over samples with its standard error, from squared frequencies; weights sum to 1."""
    per_sample = np.array([_sums(sample, weights, temperatures) for sample in values])
    free_energy, entropy, heat_capacity = per_sample.mean(axis=0)
    errors: tuple[ndarray | None, ...] = (None, None, None)
    if len(values) > 1:
        errors = tuple(per_sample.std(axis=0, ddof=1) / np.sqrt(len(values)))
    negative = (values < 0.0).mean(axis=(0, 2)) @ weights
    return Thermal(
        temperatures=temperatures,
        free_energy=free_energy,
        entropy=entropy,
        heat_capacity=heat_capacity,
        free_energy_error=errors[0],
        entropy_error=errors[1],
        heat_capacity_error=errors[2],
        imaginary_share=float(negative),
    )


def _sums(
    values: Float[ndarray, "points branches"],
    weights: Float[ndarray, " points"],
    temperatures: Float[ndarray, " temperatures"],
) -> Float[ndarray, "3 temperatures"]:
    real = values > 0.0
    weight = np.broadcast_to(weights[:, None], values.shape)[real]
    energy = in_thz(values[real]) * EV_PER_THZ
    rows = []
    for kelvin in temperatures:
        if kelvin == 0.0:
            rows.append((weight @ energy / 2.0, 0.0, 0.0))
            continue
        thermal = EV_PER_K * kelvin
        x = energy / thermal
        log, occupation = np.log1p(-np.exp(-x)), np.exp(-x) / -np.expm1(-x)
        rows.append(
            (
                weight @ (energy / 2.0 + thermal * log),
                EV_PER_K * (weight @ (x * occupation - log)),
                EV_PER_K * (weight @ (x**2 * occupation * (occupation + 1.0))),
            )
        )
    return np.array(rows).T
