"""Formation energies and distances to a convex hull, with the rotational error of the model.

Structures are relaxed, and evaluated in several random frames of the rule of a level: the scatter
of the frames says how sure it is on which side of the hull a structure lies.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from coset.errors import ConfigError, StructureError, check_choice, check_range
from coset.potential import ModelPotential, Potential
from coset.structures import Structures, concatenate, split
from coset.symmetry.average import averaged_properties, sample_rules
from coset.symmetry.crystal import find_group
from coset.symmetry.rules import LEVELS
from coset.workflows.convex_hull import Distance, HullEntry, distance_to_hull
from coset.workflows.guards import Predict, evaluate_sound, refuse
from coset.workflows.relax import relax
from coset.workflows.relaxation import Observer, Relaxation, RelaxSettings

PROJECTING = tuple(name for name, level in LEVELS.items() if level.projects)
RELAXED_SYMPREC = 1e-5  # Å
MIN_FRAMES = 3  # two leave an error almost unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class HullSettings:
    """What is compared with what, and how energies are computed.

    relax: first to the minimum. average: a level of `coset.symmetry.rules` that projects, in
    `frames` independent frames, whose scatter is the error. corrections: add the corrections that
    entries carry. compete: the structures are on the hull too, each against all others. any_level:
    take references of another level of theory than that of the model, or of none that is known.
    """

    relax: bool = True
    force_tolerance: float = 0.02
    symprec: float = 1e-2
    average: str = "project"
    frames: int = 6
    corrections: bool = False
    compete: bool = False
    any_level: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("average", self.average, PROJECTING)
        check_range("frames", self.frames, MIN_FRAMES, 1000)
        self.relaxation()

    def relaxation(self) -> RelaxSettings:
        """How structures are relaxed first."""
        return RelaxSettings(
            force_tolerance=self.force_tolerance, symprec=self.symprec, average=self.average
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HullDistance:
    """Outcome for one structure; `structures` is its final state, `entry` what it is on the hull.

    distance: None if there is no hull for it, or no energy.
    """

    status: Literal["ok", "not_converged", "rejected", "failed"]
    code: str = ""
    reason: str = ""
    entry: HullEntry | None = None
    distance: Distance | None = None
    structures: Structures | None = None
    warnings: tuple[str, ...] = ()


def hull(
    potential: Potential,
    structures: Structures,
    references: Sequence[HullEntry],
    settings: HullSettings | None = None,
    *,
    entries: Sequence[HullEntry] | None = None,
    observer: Observer | None = None,
) -> list[HullDistance]:
    """Distances to the hull of the references; one result per structure, in input order.

    entries: names and corrections of the structures (`entries_of`). observer: sees the relaxation.

    Raises:
        ConfigError: "LevelMismatch", unless settings.any_level.
    """
    chosen = settings or HullSettings()
    if not chosen.any_level:
        check_levels(potential.level_of_theory, references)
    found = energies(
        potential, structures, chosen, entries=entries or entries_of(structures), observer=observer
    )
    return [_placed(one, k, found, references, chosen) for k, one in enumerate(found)]


def energies(
    potential: Potential,
    structures: Structures,
    settings: HullSettings,
    *,
    entries: Sequence[HullEntry],
    observer: Observer | None = None,
) -> list[HullDistance]:
    """Entries of the structures with the energies of the potential, relaxed first; no distances."""
    accepted: dict[int, Structures] = {}
    results: dict[int, HullDistance] = {}
    for number, one in enumerate(split(structures)):
        try:
            refuse(potential, one, number)
            _refuse_charge(potential, one, number)
            accepted[number] = one.to(torch.float64)
        except StructureError as error:
            results[number] = HullDistance(status="rejected", code=error.code, reason=error.reason)
    starts = _relaxed(potential, accepted, settings, observer)
    results |= {k: one for k, one in starts.items() if one.structures is None}
    alive = {k: one for k, one in starts.items() if one.structures is not None}
    if alive:
        named = {k: replace(one, entry=entries[k]) for k, one in alive.items()}
        results |= _evaluated(potential, named, settings)
    return [results[number] for number in range(len(structures))]


def entries_of(structures: Structures) -> list[HullEntry]:
    """What the structures are made of, named by their numbers; energies are NaN."""
    return [
        HullEntry(
            name=f"structure {number}",
            composition=Counter(one.atomic_numbers.tolist()),
            energy=float("nan"),
        )
        for number, one in enumerate(split(structures))
    ]


def check_levels(model: str, references: Sequence[HullEntry]) -> None:
    """Refuse references whose functional is not that of the model.

    Raises:
        ConfigError: "LevelMismatch", naming the first.
    """
    own = functional(model)
    for one in references:
        other = functional(one.level_of_theory)
        if own and own == other:
            continue
        raise ConfigError(
            f"reference {one.name} is at the level {one.level_of_theory or '(not stated)'!r}, the "
            f"model at {model or '(not stated)'!r}: their energies have no common zero",
            code="LevelMismatch",
            field="references",
            hint="compute the references with the model, or let any level pass on purpose",
        )


def functional(level: str) -> str:
    """The functional that a level of theory begins with: `pbe` of `PBE(+U), some settings`.

    A Hubbard U is left out: data sets such as the Materials Project's mix both by element.
    """
    text = level.casefold().replace("²", "2").replace("(+u)", "").replace("+u", "")
    found = re.match(r"\s*([^\s,;(]+)", text)
    return found[1] if found else ""


def _refuse_charge(potential: Potential, one: Structures, number: int) -> None:
    """Only neutral systems have a place on a hull; a model may ignore the charge on request."""
    ignored = isinstance(potential, ModelPotential) and potential.conditioned is None
    if bool(one.charge.any()) and not ignored:
        raise StructureError(
            "a charged system has no place on a hull",
            code="ChargedSystem",
            structure_id=str(number),
            field="charge",
        )


def _relaxed(
    potential: Potential,
    accepted: dict[int, Structures],
    settings: HullSettings,
    observer: Observer | None,
) -> dict[int, HullDistance]:
    """Final states, by number; without `structures` where there is none."""
    if not settings.relax or not accepted:
        return {k: HullDistance(status="ok", structures=one) for k, one in accepted.items()}
    batch = concatenate(list(accepted.values()))
    found = relax(potential, batch, settings.relaxation(), observer=observer)
    return {k: _of_relaxation(one) for k, one in zip(accepted, found, strict=True)}


def _of_relaxation(one: Relaxation) -> HullDistance:
    lost = one.status in ("rejected", "failed")
    return HullDistance(
        status="ok" if one.status == "converged" else one.status,
        code=one.code,
        reason=one.reason,
        structures=None if lost else one.structures,
        warnings=one.warnings,
    )


def _evaluated(
    potential: Potential, named: dict[int, HullDistance], settings: HullSettings
) -> dict[int, HullDistance]:
    """Energies with their errors: mean and standard error over the frames."""
    numbers = list(named)
    singles = [one for k in numbers if (one := named[k].structures) is not None]
    symprec = RELAXED_SYMPREC if settings.relax else settings.symprec
    groups = [find_group(one, symprec) for one in singles]
    rules = [
        sample_rules(one, group, settings.average, settings.frames)
        for one, group in zip(singles, groups, strict=True)
    ]

    def frame(number: int) -> Predict:
        return lambda batch, places: averaged_properties(
            potential, batch, [rules[place][number] for place in places]
        )

    places, first, broken = evaluate_sound(frame(0), concatenate(singles))
    results = {
        numbers[place]: replace(
            named[numbers[place]], status="failed", code=code, reason=reason, entry=None
        )
        for place, code, reason in broken
    }
    if first is None:
        return results
    sound = concatenate([singles[place] for place in places])
    frames = [first, *(frame(k)(sound, places) for k in range(1, settings.frames))]
    samples = np.array([one.energy.tolist() for one in frames if one.energy is not None])
    for row, place in enumerate(places):
        results[numbers[place]] = _with_energy(named[numbers[place]], samples[:, row])
    return results


def _with_energy(one: HullDistance, samples: Float[ndarray, " frames"]) -> HullDistance:
    assert one.entry is not None
    error = samples.std(ddof=1) / len(samples) ** 0.5
    entry = replace(
        one.entry,
        energy=float(samples.mean()),
        error=float(error),
        samples=tuple(samples.tolist()),
    )
    return replace(one, entry=entry)


def _placed(
    one: HullDistance,
    number: int,
    found: Sequence[HullDistance],
    references: Sequence[HullEntry],
    settings: HullSettings,
) -> HullDistance:
    """The result with its distance; a competitor stands against references and other structures."""
    if one.entry is None:
        return one
    others = list(references)
    if settings.compete:
        others += [x.entry for k, x in enumerate(found) if k != number and x.entry is not None]
    try:
        distance = distance_to_hull(one.entry, others, corrected=settings.corrections)
    except StructureError as error:
        return replace(one, status="failed", code=error.code, reason=error.reason)
    return replace(one, distance=distance)
