"""Energies, forces and stress of many structures, with a status for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from coset.edge_model import Quadrature
from coset.errors import ConfigError, StructureError, check_choice
from coset.potential import Potential
from coset.structures import Properties, Structures, concatenate, properties_of, split
from coset.symmetry.adaptive import AUTO, TOLERANCE, chosen_rules
from coset.symmetry.average import averaged_properties, mean_and_error
from coset.symmetry.certificate import Certificate, certify, rotational_error
from coset.symmetry.crystal import find_group, nearest_symmetric
from coset.symmetry.primitive import Primitive, reduced, unreduced
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import LEVELS
from coset.workflows.guards import Predict, evaluate_sound, refuse

ROUNDING = 1e-4
"""Å, also the strain: how far files with five digits are from their group."""
AT_ONCE = 256


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
    potential: Potential,
    structures: Structures,
    *,
    average: str = "none",
    symprec: float = 1e-2,
    rotational_tolerance: float = TOLERANCE,
    observer: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """One result per structure, in input order; a bad structure stops no other.

    average: a level of `coset.symmetry.rules`: `none` is the raw model; the others project forces
    and stress on the space, layer or point group found at `symprec` (Å), and average over
    rotations by the rule of that group. No atom moves by more than `ROUNDING` for it: where the
    structure is farther from the group, that at `ROUNDING` is taken ("symmetry_inexact"). Models
    are asked about the primitive cell. The certificate tells how far the values before the
    projection are from the group, and where a level has several frames, the standard errors.
    Direct forces and stress are projected likewise. They need one and two degrees more than an
    energy, so a model asked for them is averaged by the next rule up, degree 9 at most. `auto`:
    the smallest rule whose error of the energy is within `rotational_tolerance` (eV per atom).
    observer: told now and then how many structures are done.
    """
    if not 0.0 < symprec < float("inf"):
        raise ConfigError(f"symprec = {symprec}, expected a positive number", field="symprec")
    check_choice("average", average, (*LEVELS, AUTO))
    results: list[Evaluation] = []
    singles = split(structures)
    for first in range(0, len(singles), AT_ONCE):
        part = singles[first : first + AT_ONCE]
        results += _part(potential, part, (average, symprec, rotational_tolerance))
        if observer is not None:
            observer(len(results))
    return results


def _part(
    potential: Potential, singles: Sequence[Structures], choice: tuple[str, float, float]
) -> list[Evaluation]:
    """Results of some structures; choice: average, symprec, tolerance."""
    average, symprec, tolerance = choice
    results: dict[int, Evaluation] = {}
    subjects: dict[int, _Subject] = {}
    for number, one in enumerate(singles):
        try:
            refuse(potential, one, number)
            subjects[number] = _subject(potential, one, average, symprec, tolerance)
        except StructureError as error:
            results[number] = Evaluation(status="rejected", code=error.code, reason=error.reason)
    if subjects:
        found = _evaluate(potential, list(subjects.values()), project=average != "none")
        results.update(zip(subjects, found, strict=True))
    return [results[number] for number in range(len(singles))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """What is evaluated for one structure, the group found, and what is to be said about it."""

    cell: Primitive
    rules: tuple[Quadrature, ...]
    space_group: int | None
    warnings: tuple[str, ...]


def _subject(
    potential: Potential, one: Structures, average: str, symprec: float, tolerance: float
) -> _Subject:
    """The structure as it is, or symmetrized within rounding and primitive; its rules."""
    group = find_group(one, symprec)
    number = group.number
    warnings = () if bool(one.pbc.all()) else ("StressUndefined",)
    exact = one
    if average != "none":
        exact, moves, strain = nearest_symmetric(one, group)
        if max(moves.max(), strain) > ROUNDING:
            group = find_group(one, ROUNDING)
            exact, _, _ = nearest_symmetric(one, group)
            warnings = (*warnings, "symmetry_inexact")
    if average != "none" or number is not None:  # else nothing is said about a group
        warnings = (*warnings, *group.warnings)
    cell = unreduced(one, group) if average == "none" else reduced(potential, exact, group)
    operations = torch.from_numpy(cell.group.cartesian_rotations)
    rules = chosen_rules(potential, cell.structures, operations, average, tolerance)
    return _Subject(cell=cell, rules=rules, space_group=number, warnings=warnings)


def _evaluate(
    potential: Potential, subjects: Sequence[_Subject], *, project: bool
) -> list[Evaluation]:
    singles = [subject.cell.structures for subject in subjects]

    def frame(number: int) -> Predict:
        return lambda batch, places: averaged_properties(
            potential, batch, [subjects[place].rules[number] for place in places]
        )

    places, first, faults = evaluate_sound(frame(0), concatenate(singles))
    results = {
        place: Evaluation(status="failed", code=code, reason=reason)
        for place, code, reason in faults
    }
    if first is not None:
        sound = concatenate([singles[place] for place in places])
        frames = [first, *(frame(k)(sound, places) for k in range(1, len(subjects[0].rules)))]
        for row, place in enumerate(places):
            own = [properties_of(properties, sound, row) for properties in frames]
            results[place] = _judged(subjects[place], own, project=project)
    return [results[place] for place in range(len(singles))]


def _judged(subject: _Subject, frames: Sequence[Properties], *, project: bool) -> Evaluation:
    """The mean over the frames with its certificate."""
    cell = subject.cell
    projector = make_projector([cell.group], cell.structures.cell.device)
    certified = [certify(own, projector)[0] for own in frames]
    mean, _ = mean_and_error(frames)
    projected, error = mean_and_error(certified)
    certificate = certify(mean, projector)[1]
    if certificate is not None:
        certificate = replace(certificate, rotational_error=rotational_error(error))
    return Evaluation(
        status="ok",
        properties=cell.unfold_properties(projected if project else mean),
        certificate=certificate and certificate.times(cell.n_cells),
        space_group=subject.space_group,
        warnings=subject.warnings,
    )
