"""What all work on crystals shares: which are taken, their relaxation, and one after the other."""

from collections.abc import Callable
from typing import TypeVar

import torch

from coset.errors import NotConvergedError, StructureError
from coset.potential import Potential
from coset.structures import Structures, concatenate, split
from coset.workflows.guards import refuse
from coset.workflows.observers import Observer, Step
from coset.workflows.relax import relax
from coset.workflows.relaxation import Observer as RelaxObserver
from coset.workflows.relaxation import Progress, Relaxation, RelaxSettings

Result = TypeVar("Result")


def relaxed_crystals(
    potential: Potential,
    structures: Structures,
    settings: RelaxSettings | None,
    observer: RelaxObserver | None = None,
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


def one_by_one(
    potential: Potential,
    structures: Structures,
    relaxation: RelaxSettings | None,
    compute: Callable[[Relaxation, Step], Result],
    *,
    observer: Observer | None,
    on_result: Callable[[int, Result], None] | None,
) -> list[Result]:
    """One result for each crystal, in input order, each told as soon as it is known.

    relaxation: what comes first, for all in one batch. compute: from the start of one crystal. Its
    step raises NotConvergedError, "Interrupted", once the observer has asked to stop.
    """
    watch = observer or (lambda n_done, note: False)
    stopped, results = watch(0, "relaxing"), list[Result]()
    settings = None if stopped else relaxation

    def relaxing(now: Progress) -> bool:
        return watch(0, f"relaxing, {now.note}")

    for number, start in enumerate(relaxed_crystals(potential, structures, settings, relaxing)):

        def step(note: str, number: int = number, start: Relaxation = start) -> None:
            nonlocal stopped
            stopped = stopped or start.code == "Interrupted" or watch(number, note)
            if stopped:
                raise NotConvergedError("stopped before it ended", code="Interrupted")

        results.append(compute(start, step))
        if on_result is not None:
            on_result(number, results[-1])
    return results


def _periodic(one: Structures, number: int) -> Structures:
    if bool(one.pbc.all()):
        return one
    raise StructureError(
        "only what is periodic in 3D is a crystal",
        code="CellNotPeriodic",
        structure_id=str(number),
        field="pbc",
    )
