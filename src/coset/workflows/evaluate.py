"""Energies, forces and stress of many structures, with a status for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from coset.errors import ConfigError, StructureError, check_choice
from coset.potential import Potential
from coset.structures import Properties, Structures, concatenate, properties_of, split
from coset.symmetry.average import averaged_properties, mean_and_error
from coset.symmetry.certificate import Certificate, certify, rotational_error
from coset.symmetry.crystal import CrystalSymmetry, find_group
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import LEVELS, level_rule
from coset.workflows.guards import Predict, evaluate_sound, refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Outcome for one structure; properties are None unless the status is `ok`."""

    status: Literal["ok", "rejected", "failed"]
    code: str = ""
    reason: str = ""
    properties: Properties | None = None
    certificate: Certificate | None = None
    space_group: int | None = None
    warnings: tuple[str, ...] = ()


def evaluate(
    potential: Potential, structures: Structures, *, average: str = "none", symprec: float = 1e-2
) -> list[Evaluation]:
    """One result per structure, in input order; a bad structure stops no other.

    average: a level of `coset.symmetry.rules`: `none` is the raw model; the others project forces
    and stress on the space, layer or point group found at `symprec` (Å), and average over
    rotations by the rule of that group. The certificate tells how far the values before the
    projection are from the group, and where a level has several frames, the standard errors.
    """
    if not 0.0 < symprec < float("inf"):
        raise ConfigError(f"symprec = {symprec}, expected a positive number", field="symprec")
    check_choice("average", average, tuple(LEVELS))
    singles = split(structures)
    results: dict[int, Evaluation] = {}
    for number, one in enumerate(singles):
        try:
            refuse(potential, one, number)
        except StructureError as error:
            results[number] = Evaluation(status="rejected", code=error.code, reason=error.reason)
    accepted = [number for number in range(len(singles)) if number not in results]
    if accepted:
        batch = [singles[number] for number in accepted]
        found = _evaluate(potential, batch, [find_group(one, symprec) for one in batch], average)
        results.update(zip(accepted, found, strict=True))
    return [results[number] for number in range(len(singles))]


def _evaluate(
    potential: Potential,
    singles: Sequence[Structures],
    groups: Sequence[CrystalSymmetry],
    average: str,
) -> list[Evaluation]:
    rules = [level_rule(torch.from_numpy(g.cartesian_rotations), average) for g in groups]

    def frame(number: int) -> Predict:
        return lambda batch, places: averaged_properties(
            potential, batch, [rules[place][number] for place in places]
        )

    places, first, faults = evaluate_sound(frame(0), concatenate(singles))
    results = {
        place: Evaluation(status="failed", code=code, reason=reason)
        for place, code, reason in faults
    }
    if first is not None:
        sound = concatenate([singles[place] for place in places])
        frames = [first, *(frame(k)(sound, places) for k in range(1, len(rules[0])))]
        for row, place in enumerate(places):
            own = [properties_of(properties, sound, row) for properties in frames]
            results[place] = _judged(
                singles[place], own, groups[place], project=LEVELS[average].projects
            )
    return [results[place] for place in range(len(singles))]


def _judged(
    one: Structures, frames: Sequence[Properties], group: CrystalSymmetry, *, project: bool
) -> Evaluation:
    """The mean over the frames with its certificate."""
    warnings = () if bool(one.pbc.all()) else ("StressUndefined",)
    if project or group.number is not None:  # else nothing is said about a group
        warnings = (*warnings, *group.warnings)
    projector = make_projector([group], one.cell.device)
    certified = [certify(own, projector)[0] for own in frames]
    mean, _ = mean_and_error(frames)
    projected, error = mean_and_error(certified)
    certificate = certify(mean, projector)[1]
    if certificate is not None:
        certificate = replace(certificate, rotational_error=rotational_error(error))
    return Evaluation(
        status="ok",
        properties=projected if project else mean,
        certificate=certificate,
        space_group=group.number,
        warnings=warnings,
    )
