"""What an average over rotations leaves, from independent random frames of its rule."""

from collections.abc import Sequence

from coset.edge_model import Quadrature
from coset.potential import Potential
from coset.structures import Structures, properties_of
from coset.symmetry.average import averaged_properties, mean_and_error, translated
from coset.symmetry.certificate import RotationalError, certify, rotational_error
from coset.symmetry.crystal import CrystalSymmetry
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import haar_offsets

N_FRAMES = 4
SEED = 1


def rotational_errors(
    potential: Potential,
    structures: Structures,
    groups: Sequence[CrystalSymmetry],
    rules: Sequence[Quadrature],
) -> list[RotationalError | None]:
    """Standard error of one application of its rule to each system, forces and stress projected.

    The standard deviation over `N_FRAMES` random left translates, known to 1/sqrt(2 (N - 1)).
    """
    frames = [
        averaged_properties(potential, structures, [translated(rule, offset) for rule in rules])
        for offset in haar_offsets(N_FRAMES, SEED)
    ]
    errors: list[RotationalError | None] = []
    for place, group in enumerate(groups):
        projector = make_projector([group], structures.cell.device)
        own = [certify(properties_of(found, structures, place), projector)[0] for found in frames]
        errors.append(_of_one_frame(rotational_error(mean_and_error(own)[1])))
    return errors


def _of_one_frame(error: RotationalError | None) -> RotationalError | None:
    """The error of one frame from that of the mean of all."""
    if error is None:
        return None
    factor = N_FRAMES**0.5
    return RotationalError(
        energy=factor * error.energy,
        forces=factor * error.forces,
        stress_GPa=factor * error.stress_GPa,
    )
