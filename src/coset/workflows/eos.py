"""Equation of state: energies of a crystal at many volumes, ions relaxed, and two fits.

All volumes of all crystals relax in one batch, in the symmetry group of each crystal. At fixed
shape the bulk modulus is that of Voigt, at relaxed shape that of Reuss.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coset.errors import check_choice, check_range
from coset.potential import Potential
from coset.structures import Structures, concatenate, strain
from coset.workflows.crystals import relaxed_crystals
from coset.workflows.eos_fit import MIN_POINTS, EosFit, fit_eos
from coset.workflows.relax import relax
from coset.workflows.relaxation import TIGHT, Observer, Relaxation, RelaxSettings

GOOD_ENOUGH = ("MaxSteps", "NoiseFloor")
"""Codes of a relaxation whose last volume may still be the center of the curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EosSettings:
    """Which volumes, and what relaxes at each.

    range, center: |V/V0 - 1 - center| is at most range; thermal expansion wants more of the large
    volumes. cell: `shape` relaxes the shape at each volume, `fixed` keeps that of
    V0. relax: first to V0; else V0 is the volume given. symprec: Å, to find the group. average: a
    level of `coset.symmetry.rules` that projects.
    """

    range: float = 0.06
    center: float = 0.0
    points: int = 11
    cell: Literal["shape", "fixed"] = "shape"
    relax: bool = True
    symprec: float = 1e-2
    average: str = "project"

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_range("range", self.range, 1e-3, 0.5)
        check_range("center", self.center, -self.range, self.range)
        check_range("points", self.points, MIN_POINTS, 1001)
        check_choice("cell", self.cell, ("shape", "fixed"))
        self.relaxation("full")

    def relaxation(self, cell: Literal["full", "shape", "fixed"]) -> RelaxSettings:
        """How cells or ions are relaxed."""
        return replace(TIGHT, symprec=self.symprec, average=self.average, cell=cell)


@dataclass(frozen=True, kw_only=True, slots=True)
class EosPoint:
    """One volume (Å³) of the input cell: status of its relaxation and energy (eV)."""

    volume: float
    energy: float
    status: str
    code: str
    reason: str
    structures: Structures | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EquationOfState:
    """Outcome for one structure.

    fit: Birch-Murnaghan; vinet: a second fit to the same points, whose difference is what the form
    of the curve leaves open. Fits are None where fewer than five points are good.
    """

    status: Literal["ok", "not_converged", "rejected", "failed"]
    code: str = ""
    reason: str = ""
    points: tuple[EosPoint, ...] = ()
    fit: EosFit | None = None
    vinet: EosFit | None = None
    space_group: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def curve(self) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
        """Volumes and energies of the good points."""
        good = [point for point in self.points if point.status == "converged"]
        volumes = torch.tensor([point.volume for point in good], dtype=torch.float64)
        return volumes, torch.tensor([point.energy for point in good], dtype=torch.float64)


def eos(
    potential: Potential,
    structures: Structures,
    settings: EosSettings | None = None,
    *,
    observer: Observer | None = None,
) -> list[EquationOfState]:
    """Equation of state of every crystal; one result for each, in input order, whatever happens.

    observer: sees the relaxations, first those of the crystals, then those at all volumes.
    """
    chosen = settings or EosSettings()
    relaxation = chosen.relaxation("full") if chosen.relax else None
    results: dict[int, EquationOfState] = {}
    centers: dict[int, Relaxation] = {}
    starts = relaxed_crystals(potential, structures, relaxation, observer)
    for number, start in enumerate(starts):
        if start.status == "converged" or start.code in GOOD_ENOUGH:
            centers[number] = start
            continue
        results[number] = EquationOfState(
            status=start.status, code=start.code, reason=start.reason, warnings=start.warnings
        )
    results.update(_equations(potential, centers, chosen, observer))
    return [results[number] for number in range(len(structures))]


def eos_structures(one: Structures, range: float, points: int, center: float = 0.0) -> Structures:
    """One crystal at `points` volumes within `range` of (1 + center) V, scaled isotropically."""
    middle = 1.0 + center
    ratios = torch.linspace(middle - range, middle + range, points, dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64, device=one.cell.device)
    return concatenate([strain(one, (x ** (1 / 3) - 1.0) * unit[None]) for x in ratios.tolist()])


def _equations(
    potential: Potential,
    centers: dict[int, Relaxation],
    settings: EosSettings,
    observer: Observer | None,
) -> dict[int, EquationOfState]:
    """All volumes of all crystals in one batch."""
    if not centers:
        return {}
    cells = [
        eos_structures(start.structures, settings.range, settings.points, settings.center)
        for start in centers.values()
        if start.structures is not None
    ]
    batch = concatenate(cells)
    relaxed = relax(potential, batch, settings.relaxation(settings.cell), observer=observer)
    volumes = batch.volume.tolist()
    found = {}
    for place, (number, start) in enumerate(centers.items()):
        own = slice(place * settings.points, (place + 1) * settings.points)
        points = tuple(
            EosPoint(
                volume=volume,
                energy=one.energy,
                status=one.status,
                code=one.code,
                reason=one.reason,
                structures=one.structures,
            )
            for volume, one in zip(volumes[own], relaxed[own], strict=True)
        )
        found[number] = _fitted(
            EquationOfState(
                status="ok",
                points=points,
                space_group=relaxed[own][0].space_group_before,
                warnings=start.warnings,
            )
        )
    return found


def _fitted(one: EquationOfState) -> EquationOfState:
    """With the two fits, and what is wrong with them."""
    volumes, energies = one.curve
    missing = len(one.points) - len(volumes)
    if any(point.code == "Interrupted" for point in one.points):
        reason = f"stopped before {missing} of {len(one.points)} volumes were relaxed"
        return replace(one, status="not_converged", code="Interrupted", reason=reason)
    if len(volumes) < MIN_POINTS:
        return replace(
            one,
            status="failed",
            code="TooFewPoints",
            reason=f"{missing} of {len(one.points)} volumes did not relax; fits need {MIN_POINTS}",
        )
    fit, vinet = fit_eos(volumes, energies, "birch"), fit_eos(volumes, energies, "vinet")
    if fit is None or vinet is None or not volumes[0] < fit.volume < volumes[-1]:
        return replace(
            one,
            status="not_converged",
            code="NoMinimum",
            reason="the energy has no minimum within the volumes; widen or shift them",
        )
    one = replace(one, fit=fit, vinet=vinet)
    if missing:
        reason = f"{missing} of {len(one.points)} volumes did not relax and were left out"
        return replace(one, status="not_converged", code="MissingVolumes", reason=reason)
    return one
