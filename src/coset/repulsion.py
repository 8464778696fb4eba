"""The ZBL pair repulsion on the edge seam (J. F. Ziegler, J. P. Biersack, U. Littmark, 1985).

E(r) = K Z_i Z_j phi(r/a)/r + S(r) for r <= r_c, a multiple of the sum of the covalent radii, with
the smooth switching S of LAMMPS that takes E, E' and E'' to zero at r_c; zero beyond. Each of the
two edges of a pair carries half.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coset.neighbors import Edges
from coset.units import EV_A_PER_E2

COEFFICIENTS = (0.02817, 0.28022, 0.50986, 0.18175)
EXPONENTS = (0.20162, 0.40290, 0.94229, 3.19980)
SCREENING = 0.4685
UNKNOWN_RADIUS = 0.2
COVALENT_RADII = (
    0.2,
    0.31,
    0.28,
    1.28,
    0.96,
    0.84,
    0.76,
    0.71,
    0.66,
    0.57,
    0.58,
    1.66,
    1.41,
    1.21,
    1.11,
    1.07,
    1.05,
    1.02,
    1.06,
    2.03,
    1.76,
    1.7,
    1.6,
    1.53,
    1.39,
    1.39,
    1.32,
    1.26,
    1.24,
    1.32,
    1.22,
    1.22,
    1.2,
    1.19,
    1.2,
    1.2,
    1.16,
    2.2,
    1.95,
    1.9,
    1.75,
    1.64,
    1.54,
    1.47,
    1.46,
    1.42,
    1.39,
    1.45,
    1.44,
    1.42,
    1.39,
    1.39,
    1.38,
    1.39,
    1.4,
    2.44,
    2.15,
    2.07,
    2.04,
    2.03,
    2.01,
    1.99,
    1.98,
    1.98,
    1.96,
    1.94,
    1.92,
    1.92,
    1.89,
    1.9,
    1.87,
    1.87,
    1.75,
    1.7,
    1.62,
    1.51,
    1.44,
    1.41,
    1.36,
    1.36,
    1.32,
    1.45,
    1.46,
    1.48,
    1.4,
    1.5,
    1.5,
    2.6,
    2.21,
    2.15,
    2.06,
    2,
    1.96,
    1.9,
    1.87,
    1.8,
    1.69,
)
"""Å, Z = 0 to 96; B. Cordero et al., Dalton Trans. 2008, 2832; 0.2 where unknown."""


def zbl_energies(
    distances: Float[Tensor, " edges"],
    graph: Edges,
    reach: float = 1.0,
    *,
    single_constants: bool = False,
) -> Float[Tensor, " atoms"]:
    """Repulsive energy of every atom in eV, float64, three times differentiable in the distances.

    reach: r_c in units of the sum of the covalent radii.
    single_constants: the screening length and prefactor rounded to float32, as metatrain does.
    """
    numbers = graph.atomic_numbers
    precision = torch.float32 if single_constants else torch.float64
    inside = within_zbl_reach(distances, graph, reach)
    rows = torch.nonzero(inside)[:, 0]
    first, second = numbers[graph.centers[rows]], numbers[graph.neighbors[rows]]
    charge_i, charge_j = first.to(precision), second.to(precision)
    length = (SCREENING / (charge_i**0.23 + charge_j**0.23)).to(distances)
    prefactor = (EV_A_PER_E2 * charge_i * charge_j).to(distances)
    radii = _radii(distances)
    outer = reach * (radii[first] + radii[second])
    pair = _switched(distances[rows], outer, length, prefactor)
    energies = distances.new_zeros(len(numbers))
    return energies.index_add(0, graph.centers[rows], 0.5 * pair)


def within_zbl_reach(
    distances: Float[Tensor, " edges"], graph: Edges, reach: float
) -> Bool[Tensor, " edges"]:
    """Which edges are short enough for the repulsion."""
    radii = _radii(distances)[graph.atomic_numbers]
    return distances.detach() <= reach * (radii[graph.centers] + radii[graph.neighbors])


def _radii(like: Tensor) -> Float[Tensor, " numbers"]:
    radii = like.new_full((max(len(COVALENT_RADII), 119),), UNKNOWN_RADIUS)
    radii[: len(COVALENT_RADII)] = like.new_tensor(COVALENT_RADII)
    return radii


def _switched(r: Tensor, outer: Tensor, length: Tensor, prefactor: Tensor) -> Tensor:
    """K phi/r + A (r^3)/3 + B (r^4)/4 + C with A, B, C from the derivatives at r_c."""
    value, first, second = _screened(outer, length, prefactor)
    cubic = (-3.0 * first + outer * second) / outer**2
    quartic = (2.0 * first - outer * second) / outer**3
    constant = -value + outer * first / 2.0 - outer**2 * second / 12.0
    bare = _screened(r, length, prefactor)[0]
    return bare + cubic * r**3 / 3.0 + quartic * r**4 / 4.0 + constant


def _screened(r: Tensor, length: Tensor, prefactor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E = K phi(r/a)/r with its first two derivatives in r."""
    phi, slope, curvature = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    for coefficient, exponent in zip(COEFFICIENTS, EXPONENTS, strict=True):
        rate = exponent / length
        term = coefficient * torch.exp(-rate * r)
        phi, slope, curvature = phi + term, slope - rate * term, curvature + rate**2 * term
    value = prefactor * phi / r
    first = prefactor * (slope / r - phi / r**2)
    second = prefactor * (curvature / r - 2.0 * slope / r**2 + 2.0 * phi / r**3)
    return value, first, second


def zbl_reach(atomic_numbers: tuple[int, ...]) -> float:
    """Longest distance in Å at which two of these elements repel each other."""
    known = [COVALENT_RADII[z] for z in atomic_numbers if z < len(COVALENT_RADII)]
    return 2.0 * max([*known, UNKNOWN_RADIUS])
