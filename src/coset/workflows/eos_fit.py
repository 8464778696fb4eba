"""Two equations of state and their least-squares fits.

Birch and Murnaghan, third order, x = (V0/V)^(2/3):

    E = E0 + (9 V0 B/16) [(x - 1)^3 B' + (x - 1)^2 (6 - 4 x)]

Vinet, x = (V/V0)^(1/3), h = 3 (B' - 1)/2:

    E = E0 + (9 B V0/h^2) [1 + (h (1 - x) - 1) exp(h (1 - x))]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import curve_fit
from torch import Tensor

from coset.units import GPA_PER_EV_PER_A3

MIN_POINTS = 5
Form = Literal["birch", "vinet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EosFit:
    """Parameters of a fit at zero pressure: V0 in Å³, E0 in eV, B, B'; rms of the energies in eV.

    Errors are those of the least squares, from the scatter of the points.
    """

    form: Form
    volume: float
    energy: float
    bulk_modulus_GPa: float
    bulk_modulus_derivative: float
    rms: float
    volume_error: float
    bulk_modulus_error_GPa: float
    bulk_modulus_derivative_error: float

    def energies(self, volumes: Float[ndarray, " volumes"]) -> Float[ndarray, " volumes"]:
        """The fitted curve."""
        stiffness = self.bulk_modulus_GPa / GPA_PER_EV_PER_A3
        parameters = self.volume, self.energy, stiffness, self.bulk_modulus_derivative
        return _FORMS[self.form](volumes, *parameters)


def birch_murnaghan(
    volumes: Float[ndarray, " volumes"], V0: float, E0: float, B: float, slope: float
) -> Float[ndarray, " volumes"]:
    """Energies in eV; B in eV/Å³, slope: B'.

    Reference: F. Birch, Phys. Rev. 71, 809 (1947).
    """
    x = (V0 / volumes) ** (2.0 / 3.0)
    bracket = (x - 1.0) ** 3 * slope + (x - 1.0) ** 2 * (6.0 - 4.0 * x)
    return np.asarray(E0 + 9.0 * V0 * B / 16.0 * bracket)


def vinet(
    volumes: Float[ndarray, " volumes"], V0: float, E0: float, B: float, slope: float
) -> Float[ndarray, " volumes"]:
    """Energies in eV; B in eV/Å³, slope: B'.

    Reference: P. Vinet et al., J. Phys. C 19, L467 (1986).
    """
    x = (volumes / V0) ** (1.0 / 3.0)
    h = 1.5 * (slope - 1.0)
    bracket = 1.0 + (h * (1.0 - x) - 1.0) * np.exp(h * (1.0 - x))
    return np.asarray(E0 + 9.0 * B * V0 / h**2 * bracket)


_FORMS: dict[Form, Callable[..., ndarray]] = {"birch": birch_murnaghan, "vinet": vinet}


def fit_eos(
    volumes: Float[Tensor, " points"], energies: Float[Tensor, " points"], form: Form
) -> EosFit | None:
    """The least-squares fit to five or more points (Å³, eV), None if they have no minimum."""
    V, E = volumes.cpu().numpy(), energies.cpu().numpy()
    center, offset = float(V.mean()), float(E.min())
    curvature, slope, constant = np.polyfit(V / center - 1.0, E - offset, 2)
    if curvature <= 0.0:
        return None
    shift = float(np.clip(-0.5 * slope / curvature, *(V[[0, -1]] / center - 1.0)))
    # In units of order one: V0/center, E0 and B V0 from the parabola, B'.
    start = (1.0 + shift, constant, 2.0 * curvature, 4.0)
    try:
        found, covariance = curve_fit(
            _FORMS[form],
            V / center,
            E - offset,
            p0=start,
            xtol=1e-12,
            ftol=1e-12,
            maxfev=10_000,
        )
    except RuntimeError:  # no convergence: the points are no such curve
        return None
    errors = np.sqrt(np.diag(covariance))
    v0, e0, stiffness, derivative = (float(value) for value in found)
    if not (v0 > 0.0 and stiffness > 0.0):
        return None
    pressure = GPA_PER_EV_PER_A3 / center
    residual = _FORMS[form](V / center, *found) - (E - offset)
    return EosFit(
        form=form,
        volume=v0 * center,
        energy=e0 + offset,
        bulk_modulus_GPa=stiffness * pressure,
        bulk_modulus_derivative=derivative,
        rms=float(np.sqrt((residual**2).mean())),
        volume_error=float(errors[0]) * center,
        bulk_modulus_error_GPa=float(errors[2]) * pressure,
        bulk_modulus_derivative_error=float(errors[3]),
    )
