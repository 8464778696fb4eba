"""Thermal expansion: phonons at every volume of an equation of state, F(V, T) minimized at each T.

    G(T) = min_V [E(V) + F_vib(V, T)],   alpha = (1/V) dV/dT,   B_T = V d²F/dV²

by the fits of phonopy (Vinet). E is that of the equation of state, whose frames are the same at all
volumes. F comes from single frames, each fitted for itself: their mean is the result, their scatter
its error. Volumes where the crystal is not stable in all frames are left out, with a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import concatenate
from coset.workflows.eos import EosPoint, EquationOfState
from coset.workflows.observers import Observer
from coset.workflows.phonons.by_phonopy import FreeEnergyMinimum, minimized_free_energy
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.phonons.results import Phonons, PhononSettings
from coset.workflows.phonons.run import phonons

MIN_VOLUMES = 5
MIN_TEMPERATURES = 3
BEYOND = 2
"""Temperatures past the last one wanted, which the derivatives need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuasiHarmonicSettings:
    """Temperatures 0, step, ..., up to highest (K); the rest as in `PhononSettings`.

    frames: of which each gives one free energy.
    """

    highest: float = 1000.0
    step: float = 20.0
    average: str = "project"
    frames: int = 3
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
    pressure, eV/K. errors: standard errors from the scatter of the frames, None of one frame.
    volumes: those used, Å³; left_out: volume and reason of the others. reason: of a failure, or why
    there are fewer temperatures than were wanted.
    """

    status: Literal["ok", "failed"]
    reason: str = ""
    temperature: Float[ndarray, " temperatures"] | None = None
    volume: Float[ndarray, " temperatures"] | None = None
    expansion: Float[ndarray, " temperatures"] | None = None
    bulk_modulus_GPa: Float[ndarray, " temperatures"] | None = None
    gibbs: Float[ndarray, " temperatures"] | None = None
    heat_capacity: Float[ndarray, " temperatures"] | None = None
    errors: FreeEnergyMinimum | None = None
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
    done, in all frames together; returns True to stop.
    """
    chosen = settings or QuasiHarmonicSettings()
    points = [p for p in curve.points if p.status == "converged" and p.structures]
    if not points:
        return QuasiHarmonic(status="failed", reason="the equation of state has no good volumes")
    states = concatenate([p.structures for p in points if p.structures])
    asked = PhononSettings(
        method=chosen.method,
        relax=False,
        symprec=1e-5,
        average=chosen.average,
        frames=1,
        supercell=chosen.supercell,
        mesh=chosen.mesh,
        temperatures=(0.0,),
    )
    by_frame: list[list[Phonons]] = []
    for frame in range(chosen.frames):

        def own(n_done: int, note: str, before: int = frame * len(points)) -> bool:
            return observer is not None and observer(before + n_done, note)

        asked = replace(asked, seed=frame)
        by_frame.append(phonons(potential, states, asked, observer=own))
        if any(one.code == "Interrupted" for one in by_frame[-1]):
            return QuasiHarmonic(status="failed", reason="stopped before it ended")
    return _minimized(points, by_frame, chosen)


def _minimized(
    points: Sequence[EosPoint],
    by_frame: Sequence[Sequence[Phonons]],
    settings: QuasiHarmonicSettings,
) -> QuasiHarmonic:
    good: list[int] = []
    left_out: list[tuple[float, str]] = []
    for place, point in enumerate(points):
        reasons = [why for frame in by_frame if (why := _fault(frame[place]))]
        if reasons:
            left_out.append((point.volume, reasons[0]))
        else:
            good.append(place)
    failed = partial(QuasiHarmonic, status="failed", left_out=tuple(left_out))
    if len(good) < MIN_VOLUMES:
        reason = f"{len(good)} of {len(points)} volumes are stable, expected {MIN_VOLUMES} or more"
        return failed(reason=reason)
    fitted: list[FreeEnergyMinimum] = []
    for frame in by_frame:
        results = [found for place in good if (found := frame[place].result) is not None]
        volumes = np.array([float(one.primitive.volume[0]) for one in results])
        energies = [
            points[place].energy * volume / points[place].volume
            for place, volume in zip(good, volumes, strict=True)
        ]
        lattices, mesh = [one.lattice for one in results], results[0].mesh
        try:
            fitted.append(minimized_free_energy(lattices, energies, settings.temperatures(), mesh))
        except StructureError as error:
            return failed(reason=str(error))
    wanted = settings.temperatures()[:-BEYOND]
    within = volumes.min(), volumes.max()
    last = min(_first_outside(one, wanted, within) for one in fitted)
    reason = ""
    if last < len(wanted):
        reason = (
            f"the minimum of the free energy leaves the volumes of {within[0]:.3f} to "
            f"{within[1]:.3f} Å³ at {wanted[last]:.0f} K; widen --range"
        )
    if last < MIN_TEMPERATURES:
        return failed(reason=reason)
    columns = [np.array(column)[:, :last] for column in zip(*fitted, strict=True)]
    mean = FreeEnergyMinimum(*(column.mean(axis=0) for column in columns))
    return QuasiHarmonic(
        status="ok",
        reason=reason,
        temperature=mean.temperature,
        volume=mean.volume,
        expansion=mean.expansion,
        bulk_modulus_GPa=mean.bulk_modulus_GPa,
        gibbs=mean.gibbs,
        heat_capacity=mean.heat_capacity,
        errors=_standard_errors(columns),
        volumes=tuple(volumes.tolist()),
        left_out=tuple(left_out),
    )


def _standard_errors(
    columns: Sequence[Float[ndarray, "frames temperatures"]],
) -> FreeEnergyMinimum | None:
    """Of the means over the frames."""
    n_frames = len(columns[0])
    if n_frames < 2:
        return None
    return FreeEnergyMinimum(*(c.std(axis=0, ddof=1) / n_frames**0.5 for c in columns))


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


def _fault(one: Phonons) -> str:
    """Why a volume is of no use, or nothing."""
    if one.result is None:
        return one.reason
    verdict = one.result.verdict
    return "" if verdict.kind == "stable" else f"{verdict.kind}: {verdict.reason}"
