"""The beginning of what is done with crystals: which are taken, and their relaxation."""

import torch

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import Structures, concatenate, split
from coset.workflows.guards import refuse
from coset.workflows.relax import relax
from coset.workflows.relaxation import Observer, Relaxation, RelaxSettings


def relaxed_crystals(
    potential: Potential,
    structures: Structures,
    settings: RelaxSettings | None,
    observer: Observer | None = None,
) -> list[Relaxation]:
    """Every system relaxed in one batch, or without settings as it came; in input order.

    Rejected is what no potential or not this one can take, and what is not periodic in 3D.
    """
    results: dict[int, Relaxation] = {}
    accepted: dict[int, Structures] = {}
    for number, one in enumerate(split(structures)):
        try:
            refuse(potential, one, number)
            accepted[number] = _periodic(one.to(torch.float64), number)
        except StructureError as error:
            results[number] = Relaxation(
                status="rejected", code=error.code, reason=error.reason, structures=None
            )
    if accepted and settings is not None:
        batch = concatenate(list(accepted.values()))
        relaxed = relax(potential, batch, settings, observer=observer)
        results.update(zip(accepted, relaxed, strict=True))
    elif accepted:
        results.update(
            (number, Relaxation(status="converged", code="", reason="", structures=one))
            for number, one in accepted.items()
        )
    return [results[number] for number in range(len(structures))]


def _periodic(one: Structures, number: int) -> Structures:
    if bool(one.pbc.all()):
        return one
    raise StructureError(
        "only what is periodic in 3D is a crystal",
        code="CellNotPeriodic",
        structure_id=str(number),
        field="pbc",
    )
