"""Thermal expansion: phonons at every volume of an equation of state, F(V, T) minimized at each T.

    G(T) = min_V [E(V) + F_vib(V, T)],   alpha = (1/V) dV/dT,   B_T = V d²F/dV²

by the fits of phonopy (Vinet). Volumes where the crystal is not stable are left out, with a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import concatenate
from coset.workflows.eos import EquationOfState
from coset.workflows.observers import Observer
from coset.workflows.phonons.by_phonopy import FreeEnergyMinimum, minimized_free_energy
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.phonons.results import PhononResult, Phonons, PhononSettings
from coset.workflows.phonons.run import phonons

MIN_VOLUMES = 5
MIN_TEMPERATURES = 3
BEYOND = 2
"""Temperatures past the last one wanted, which the derivatives need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuasiHarmonicSettings:
    """Temperatures 0, step, ..., up to highest (K); the rest as in `PhononSettings`."""

    highest: float = 1000.0
    step: float = 20.0
    average: str = "project"
    frames: int = 1
    method: Literal["exact", "displacements"] = "exact"
    supercell: Mesh | None = None
    mesh: Mesh | None = None

    def temperatures(self) -> Float[ndarray, " temperatures"]:
        """Those wanted and a few beyond."""
        return self.step * np.arange(round(self.highest / self.step) + 1 + BEYOND)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuasiHarmonic:
    """Outcome for one crystal, by temperature (K), per primitive cell.

    volume: Å³. expansion: alpha, 1/K, of the volume. gibbs: eV. heat_capacity: at constant
    pressure, eV/K. volumes: those used, Å³; left_out: volume and reason of the others. reason: of
    a failure, or why there are fewer temperatures than were wanted.
    """

    status: Literal["ok", "failed"]
    reason: str = ""
    temperature: Float[ndarray, " temperatures"] | None = None
    volume: Float[ndarray, " temperatures"] | None = None
    expansion: Float[ndarray, " temperatures"] | None = None
    bulk_modulus_GPa: Float[ndarray, " temperatures"] | None = None
    gibbs: Float[ndarray, " temperatures"] | None = None
    heat_capacity: Float[ndarray, " temperatures"] | None = None
    volumes: tuple[float, ...] = ()
    left_out: tuple[tuple[float, str], ...] = ()


def quasi_harmonic(
    potential: Potential,
    curve: EquationOfState,
    settings: QuasiHarmonicSettings | None = None,
    *,
    observer: Observer | None = None,
) -> QuasiHarmonic:
    """Thermal expansion of one crystal from its equation of state.

    The ions are those of the curve, relaxed at every volume. observer: told how many volumes are
    done; returns True to stop.
    """
    chosen = settings or QuasiHarmonicSettings()
    states = [p.structures for p in curve.points if p.status == "converged" and p.structures]
    if not states:
        return QuasiHarmonic(status="failed", reason="the equation of state has no good volumes")
    asked = PhononSettings(
        method=chosen.method,
        relax=False,
        symprec=1e-5,
        average=chosen.average,
        frames=chosen.frames,
        supercell=chosen.supercell,
        mesh=chosen.mesh,
        temperatures=(0.0,),
    )
    found = phonons(potential, concatenate(states), asked, observer=observer)
    return _minimized(found, [float(one.volume[0]) for one in states], chosen)


def _minimized(
    found: Sequence[Phonons], given: Sequence[float], settings: QuasiHarmonicSettings
) -> QuasiHarmonic:
    if any(one.code == "Interrupted" for one in found):
        return QuasiHarmonic(status="failed", reason="stopped before it ended")
    good: list[PhononResult] = []
    left_out = []
    for one, volume in zip(found, given, strict=True):
        if one.result is not None and one.result.verdict.kind == "stable":
            good.append(one.result)
        else:
            left_out.append((volume, one.reason if one.result is None else _why(one.result)))
    if len(good) < MIN_VOLUMES:
        reason = f"{len(good)} of {len(found)} volumes are stable, expected {MIN_VOLUMES} or more"
        return QuasiHarmonic(status="failed", reason=reason, left_out=tuple(left_out))
    volumes = [float(one.primitive.volume[0]) for one in good]
    lattices, energies = [one.lattice for one in good], [one.energy for one in good]
    try:
        fitted = minimized_free_energy(lattices, energies, settings.temperatures(), good[0].mesh)
    except StructureError as error:
        return QuasiHarmonic(status="failed", reason=str(error), left_out=tuple(left_out))
    wanted = settings.temperatures()[:-BEYOND]
    last = _first_outside(fitted, wanted, (min(volumes), max(volumes)))
    reason = ""
    if last < len(wanted):
        reason = (
            f"the minimum of the free energy leaves the volumes of {min(volumes):.3f} to "
            f"{max(volumes):.3f} Å³ at {wanted[last]:.0f} K; widen --range"
        )
    if last < MIN_TEMPERATURES:
        return QuasiHarmonic(status="failed", reason=reason, left_out=tuple(left_out))
    return QuasiHarmonic(
        status="ok",
        reason=reason,
        temperature=wanted[:last],
        volume=fitted.volume[:last],
        expansion=fitted.expansion[:last],
        bulk_modulus_GPa=fitted.bulk_modulus_GPa[:last],
        gibbs=fitted.gibbs[:last],
        heat_capacity=fitted.heat_capacity[:last],
        volumes=tuple(volumes),
        left_out=tuple(left_out),
    )


def _first_outside(
    fitted: FreeEnergyMinimum, wanted: Float[ndarray, " temperatures"], within: tuple[float, float]
) -> int:
    """How many temperatures from 0 K on have a fit, with its minimum between two volumes."""
    for count, kelvin in enumerate(wanted):
        if count == len(fitted.temperature) or fitted.temperature[count] != kelvin:
            return count
        if not within[0] <= fitted.volume[count] <= within[1]:
            return count
    return len(wanted)


def _why(result: PhononResult) -> str:
    return f"{result.verdict.kind}: {result.verdict.reason}"
