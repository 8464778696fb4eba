"""Tensors of the response to strain: projection on a group, Voigt's notation.

    (P L)_iabc = mean_g Q_pa Q_qb Q_rc L_perm[g, i]pqr      (P C)_abcd = mean_g Q_pa ... Q_sd C_pqrs

over all operations, pure translations included.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from coset.symmetry.crystal import CrystalSymmetry

PAIRS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""xx yy zz yz xz xy."""

FIRST, SECOND = (torch.tensor(index) for index in zip(*PAIRS, strict=True))


def project_internal_strain(
    internal_strain: Float[Tensor, "atoms 3 3 3"], group: CrystalSymmetry
) -> Float[Tensor, "atoms 3 3 3"]:
    """P L in float64 of d²E/du de of one system, whose atoms the group maps."""
    orbit = torch.from_numpy(group.translation_orbit)
    n_pure = len(group.pure_translations)
    folded = torch.zeros_like(internal_strain, dtype=torch.float64)
    folded = folded[: len(group.first_atoms)].index_add(0, orbit, internal_strain.double()) / n_pure
    images = torch.from_numpy(np.asarray(orbit.numpy()[group.permutations]))
    rotations = torch.from_numpy(group.cartesian_rotations).to(folded)
    total = torch.zeros_like(folded)[orbit]
    for Q, image in zip(rotations, images, strict=True):
        total += torch.einsum("ipqr,pa,qb,rc->iabc", folded[image], Q, Q, Q)
    return total / len(rotations)


def project_rank_four(
    tensor: Float[Tensor, "3 3 3 3"], group: CrystalSymmetry
) -> Float[Tensor, "3 3 3 3"]:
    """P C in float64 of a tensor of one system, elastic constants for instance."""
    Q = torch.from_numpy(group.cartesian_rotations).to(tensor.device)
    turned = torch.einsum("pqrs,gpa,gqb->grsab", tensor.double(), Q, Q)
    return torch.einsum("grsab,grc,gsd->abcd", turned, Q, Q) / len(Q)


def voigt_matrix(tensor: Float[Tensor, "3 3 3 3"]) -> Float[Tensor, "6 6"]:
    """C_mn = C_ab,cd: stresses by strains with doubled shears."""
    return tensor[FIRST[:, None], SECOND[:, None], FIRST, SECOND]
