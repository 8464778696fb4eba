"""Whether a crystal is dynamically stable, as far as the errors of its frequencies tell."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.units import THZ_PER_ROOT
from coset.workflows.phonons.modes import Modes, errors_in_thz, in_thz, is_gamma

Kind = Literal["stable", "unstable", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`stable`, `unstable` or `undecided`, and the mode that decides.

    q, branch: of the mode. threshold_THz: what its frequency has to be away from zero. amplitude
    (Å, of the atom that moves most), drop and drop_error (eV per commensurate cell): of the minimum
    found along the mode. settle: what would decide.
    """

    kind: Kind
    reason: str
    q: tuple[float, float, float]
    branch: int
    frequency_THz: float
    error_THz: float
    threshold_THz: float
    settle: str = ""
    amplitude: float | None = None
    drop: float | None = None
    drop_error: float | None = None


def decide(
    values: Float[ndarray, " modes"], errors: Float[ndarray, " modes"], quantile: float
) -> tuple[Kind, int]:
    """What squared frequencies with standard errors say, and the mode that says it.

    stable: all lambda - t s > 0. unstable: some lambda + t s < 0. Else undecided.
    """
    above, below = values + quantile * errors, values - quantile * errors
    if (above < 0.0).any():
        return "unstable", int(above.argmin())
    lowest = int(below.argmin())
    return ("stable" if below[lowest] > 0.0 else "undecided"), lowest


def first_verdict(q: Float[ndarray, "points 3"], found: Modes, quantile: float) -> Verdict:
    """The verdict of frequencies alone; the three translations at Gamma do not count."""
    counted = np.ones(found.values.shape, dtype=bool)
    counted[is_gamma(q)] = found.values[is_gamma(q)] != 0.0
    places = np.argwhere(counted)
    kind, row = decide(found.values[counted], found.errors[counted], quantile)
    point, branch = (int(k) for k in places[row])
    return verdict_of(kind, q[point], branch, found_at(found, point), quantile)


def verdict_of(
    kind: Kind, q: Float[ndarray, "3"], branch: int, at: Modes, quantile: float
) -> Verdict:
    """A verdict on one mode of one wave vector."""
    frequency = float(in_thz(at.values)[0, branch])
    error = float(errors_in_thz(at)[0, branch])
    margin = quantile * float(at.errors[0, branch])
    reasons = {
        "stable": "all frequencies are real by more than their errors",
        "unstable": "a frequency is imaginary by more than its error",
        "undecided": f"a frequency is zero within {quantile:.1f} of its standard errors",
    }
    x, y, z = (round(float(k), 12) + 0.0 for k in q)
    return Verdict(
        kind=kind,
        reason=reasons[kind],
        q=(x, y, z),
        branch=branch,
        frequency_THz=frequency,
        error_THz=error,
        threshold_THz=THZ_PER_ROOT * margin**0.5,
    )


def found_at(found: Modes, point: int) -> Modes:
    """The modes of one wave vector."""
    return Modes(
        values=found.values[point : point + 1],
        errors=found.errors[point : point + 1],
    )
