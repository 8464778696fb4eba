"""What must not happen to a structure while it relaxes, and one to the others."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coset.errors import CosetError, StructureError
from coset.neighbors import overlap
from coset.potential import Potential
from coset.structures import Properties, Structures, fault, inverse_cell, select

MAX_LOG_VOLUME = 1.0
MIN_HEIGHT = 1.0

Broken = tuple[int, str, str]
"""Place in the batch, code, reason."""


INTERNAL = "InternalError"
UNFORESEEN = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


@contextmanager
def contained() -> Iterator[None]:
    """An error that no one foresaw, in a library as well, ends its own crystal only.

    Raises:
        StructureError: "InternalError", with the kind of the error and where it was.
    """
    try:
        yield
    except CosetError:
        raise
    except UNFORESEEN as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise StructureError(
            f"{type(error).__name__}: {error} ({where})",
            code=INTERNAL,
            hint="please report it, with the structure",
        ) from error


def refuse(potential: Potential, one: Structures, number: int) -> None:
    """Raise the StructureError of a system that no model, or not this one, can take."""
    if error := fault(one, str(number)) or overlap(one, str(number)):
        raise error
    potential.check_supported(one)


Predict = Callable[[Structures, list[int]], Properties]
"""Properties of the systems at the given places of a batch."""


def evaluate_sound(
    predict: Predict, structures: Structures
) -> tuple[list[int], Properties | None, list[Broken]]:
    """Evaluate a batch without the systems that break it.

    Returns the places that survived, their properties (None if there are none), and what broke.
    """
    places = list(range(len(structures)))
    broken: list[Broken] = []
    while places:
        batch = select(structures, torch.tensor(places)) if broken else structures
        try:
            properties = predict(batch, places)
            found = not_finite(batch, properties)
        except StructureError as error:
            if not error.structure_id.isdecimal():
                raise
            found = int(error.structure_id), error.code, error.reason
        if found is None:
            return places, properties, broken
        broken.append((places.pop(found[0]), found[1], found[2]))
    return [], None, broken


def without_stress(structures: Structures, properties: Properties) -> list[Broken]:
    """The systems periodic in 3D for which the potential gave no stress."""
    missing = structures.pbc.all(1)
    if properties.stress is not None:
        missing = missing & ~torch.isfinite(properties.stress).all((1, 2))
    reason = "the potential gives no stress, which the relaxation of the cell needs (--cell fixed)"
    places = torch.nonzero(missing)[:, 0].tolist()
    return [(place, "StressUndefined", reason) for place in reversed(places)]


def collapsed(structures: Structures, initial: Structures) -> Broken | None:
    """The first system whose volume left [V0/e, V0 e], or a height fell below 1 Å or its start."""
    low = _smallest_height(structures)
    floor = _smallest_height(initial).clamp_max(MIN_HEIGHT)
    change = torch.log(structures.volume / initial.volume).abs().nan_to_num(0.0)
    place = _first((change > MAX_LOG_VOLUME) | (low < floor))
    if place is None:
        return None
    reason = (
        f"the cell ran away: |ln V/V0| = {float(change[place]):.2g} (limit {MAX_LOG_VOLUME}), "
        f"smallest height {float(low[place]):.2g} Å (limit {MIN_HEIGHT})"
    )
    return place, "CellCollapse", reason


def not_finite(structures: Structures, properties: Properties) -> Broken | None:
    """The first system with a NaN or infinite energy or force."""
    assert properties.energy is not None
    bad = ~torch.isfinite(properties.energy)
    forces = properties.forces if properties.forces is not None else properties.direct_forces
    if forces is not None:
        bad[structures.system_index[~torch.isfinite(forces).all(1)]] = True
    place = _first(bad)
    if place is None:
        return None
    return place, "NonFiniteOutput", "the potential returned an energy or force that is not finite"


def _first(bad: Bool[Tensor, " systems"]) -> int | None:
    return int(torch.nonzero(bad)[0]) if bool(bad.any()) else None


def _smallest_height(structures: Structures) -> Float[Tensor, " systems"]:
    """Smallest distance between opposite faces in Å, infinite without periodicity."""
    inverse = inverse_cell(structures.cell, structures.pbc)
    heights = 1.0 / torch.linalg.vector_norm(inverse, dim=1).clamp_min(1e-12)
    open_height = torch.full_like(heights, torch.inf)
    return torch.where(structures.pbc, heights, open_height).amin(1)
