"""Energies, forces and stress of many structures, with a status for each."""

from dataclasses import dataclass
from typing import Literal

from coset.errors import ConfigError, StructureError
from coset.potential import Potential
from coset.structures import Properties, Structures, concatenate, properties_of, split
from coset.symmetry.certificate import Certificate, certify
from coset.symmetry.crystal import find_group
from coset.symmetry.projection import make_projector
from coset.workflows.guards import evaluate_sound, refuse


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
    potential: Potential, structures: Structures, *, project: bool = False, symprec: float = 1e-2
) -> list[Evaluation]:
    """One result per structure, in input order; a bad structure stops no other.

    project: forces and stress projected on the space group found at `symprec` (Å); the certificate
    tells in either case how far the raw ones are from it.
    """
    if not 0.0 < symprec < float("inf"):
        raise ConfigError(f"symprec = {symprec}, expected a positive number", field="symprec")
    singles = split(structures)
    results: dict[int, Evaluation] = {}
    for number, one in enumerate(singles):
        try:
            refuse(potential, one, number)
        except StructureError as error:
            results[number] = Evaluation(status="rejected", code=error.code, reason=error.reason)
    accepted = [number for number in range(len(singles)) if number not in results]
    if accepted:
        batch = concatenate([singles[number] for number in accepted])
        places, properties, faults = evaluate_sound(potential, batch)
        for place, code, reason in faults:
            results[accepted[place]] = Evaluation(status="failed", code=code, reason=reason)
        sound = concatenate([singles[accepted[place]] for place in places]) if places else batch
        for row, place in enumerate(places):
            assert properties is not None
            own, one = properties_of(properties, sound, row), singles[accepted[place]]
            results[accepted[place]] = _judged(one, own, project=project, symprec=symprec)
    return [results[number] for number in range(len(singles))]


def _judged(one: Structures, own: Properties, *, project: bool, symprec: float) -> Evaluation:
    """The evaluation with its certificate."""
    warnings = () if bool(one.pbc.all()) else ("StressUndefined",)
    group = find_group(one, symprec)
    certified, certificate = certify(own, make_projector([group], one.cell.device))
    return Evaluation(
        status="ok",
        properties=certified if project else own,
        certificate=certificate,
        space_group=group.number,
        warnings=(*warnings, *group.warnings),
    )
