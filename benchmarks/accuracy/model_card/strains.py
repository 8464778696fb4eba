"""Equilibrium volumes and bulk moduli from a potential's own energies and stresses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coset.potential import Potential
from coset.structures import Structures, concatenate, deform
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.relax import relax
from coset.workflows.relaxation import Relaxation, RelaxSettings

TIGHT = {"force_tolerance": 0.005, "stress_tolerance_GPa": 0.02, "max_steps": 300}
RELAX_ALL = RelaxSettings(**TIGHT)
SHAPES = ("fixed", "shape")
HALF_WIDTH = 0.02
"""Relative change of the volume, both ways, from which moduli are found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimum:
    """Volume in Å³ and bulk modulus in GPa at the minimum of E(V)."""

    volume: float
    bulk_modulus_GPa: float


def birch_murnaghan(volumes: np.ndarray, energies: np.ndarray) -> Minimum | None:
    """The minimum of E(V), None if the fit has none.

    E = c0 x³ + c1 x² + c2 x + c3 with x = V^(-2/3); volumes Å³, energies eV.
    Reference: F. Birch, Phys. Rev. 71, 809 (1947).
    """
    cubic = np.polynomial.Polynomial.fit(volumes ** (-2 / 3), energies, 3)
    slope, curvature = cubic.deriv(), cubic.deriv(2)
    roots = slope.roots()
    real = roots[np.abs(np.imag(roots)) < 1e-12].real
    minima = [x for x in real if x > 0 and curvature(x) > 0]
    if not minima:
        return None
    x = min(minima, key=lambda root: abs(root - np.mean(volumes) ** (-2 / 3)))
    # E'' = (dx/dV)² d²E/dx² where dE/dx = 0, and dx/dV = -(2/3) x^(5/2)
    volume = x**-1.5
    modulus = volume * (4 / 9) * x**5 * curvature(x)
    return Minimum(volume=float(volume), bulk_modulus_GPa=float(modulus * GPA_PER_EV_PER_A3))


def scaled(structures: Structures, factors: np.ndarray) -> Structures:
    """Every system with its volume times its own factor, fractional coordinates kept."""
    lengths = torch.from_numpy(factors) ** (1 / 3)
    return deform(structures, lengths[:, None, None] * torch.eye(3, dtype=torch.float64))


def bulk_moduli(potential: Potential, relaxed: Sequence[Structures]) -> np.ndarray:
    """K = -V dP/dV in GPa of each relaxed crystal, NaN where a relaxation fails.

    Mean of Voigt's modulus (shape of the cell kept) and Reuss's (shape relaxed), as in the
    references; ions relax in both. Central difference over volumes of 1 ± `HALF_WIDTH`.
    """
    given = concatenate(relaxed)
    voigt, reuss = (_moduli(potential, given, RelaxSettings(cell=c, **TIGHT)) for c in SHAPES)
    return (voigt + reuss) / 2


def _moduli(potential: Potential, given: Structures, settings: RelaxSettings) -> np.ndarray:
    def pressures(factor: float) -> np.ndarray:
        volumes = scaled(given, np.full(len(given), factor))
        return np.array([_pressure(one) for one in relax(potential, volumes, settings)])

    return (pressures(1 - HALF_WIDTH) - pressures(1 + HALF_WIDTH)) / (2 * HALF_WIDTH)


def _pressure(result: Relaxation) -> float:
    """Pressure in GPa, NaN unless the relaxation converged."""
    if result.status != "converged":
        return float("nan")
    return -float(result.properties.stress[0].trace()) / 3 * GPA_PER_EV_PER_A3
