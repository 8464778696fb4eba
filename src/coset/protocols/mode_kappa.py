"""The distance between two thermal conductivities, mode by mode.

    SRME = 2 sum_m |kappa_m - kappa_ref,m|/(kappa + kappa_ref),   kappa = sum_m kappa_m

Modes are compared in the order of their frequencies at each star of wave vectors, so that it does
not matter which member of a star, or which primitive cell, stands for it.

Reference: B. Póta et al., arXiv:2408.00755 (2024).
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.protocols.records import Spectrum
from coset.symmetry.crystal import find_group
from coset.workflows.conductivity.results import ConductivityResult
from coset.workflows.phonons.mesh import action_of, star_labels

SYMPREC = 1e-5


def relative_mode_error(
    found: ConductivityResult, reference: Spectrum, cell: Float[ndarray, "3 3"]
) -> float | None:
    """SRME at the first temperature; None if the wave vectors are not those of the reference.

    cell: that of the reference, which the primitive matrix refers to.
    """
    assert found.kappa is not None
    modes, own_cell = found.kappa.modes, found.primitive.cell[0].numpy()
    number = np.linalg.det(cell) / np.linalg.det(own_cell)
    basis = np.rint(own_cell @ np.linalg.inv(cell) * round(number)) / round(number)
    q = reference.q_points @ np.linalg.inv(reference.primitive_matrix) @ basis.T
    action = action_of(found.primitive, find_group(found.primitive, SYMPREC))
    own = star_labels(modes.q_points, found.mesh, action)
    other = star_labels(q, found.mesh, action)
    if own is None or other is None or sorted(own) != sorted(other):
        return None
    if modes.share[0].shape != reference.share.shape:
        return None
    distance = np.abs(modes.share[0][np.argsort(own)] - reference.share[np.argsort(other)]).sum()
    return float(2.0 * distance / (modes.share[0].sum() + reference.share.sum()))
