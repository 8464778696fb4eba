"""Hessians of many systems."""

from jaxtyping import Float
from torch import Tensor

from coset.derivatives import hessian as hessian_of
from coset.potential import ModelPotential
from coset.structures import Structures, split


def hessian(
    potential: ModelPotential, structures: Structures
) -> list[Float[Tensor, "atoms 3 atoms 3"]]:
    """H = d²E/dx dx of every system in eV/Å², float64; periodic images move together.

    As the potential is, so without the symmetry that it lacks: `project_hessian` of
    `coset.symmetry.projection` gives that of the group.
    """
    return [hessian_of(potential, one) for one in split(structures)]
