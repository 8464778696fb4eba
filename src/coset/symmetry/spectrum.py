"""The anisotropy spectrum: how much of the energy turns with a structure, by degree and parity.

    f(R) = E(R x) = sum_lp sum_mj c_lp,mj [D^lp(R) V_lp]_mj        P_lp = |c_lp|^2/(2l + 1)

V_lp spans what the point group of the structure leaves alive. Energies and torques of randomly
turned copies are fitted by least squares; P_lp is the variance of the energy in a sector over
random orientations (eV²). A rule with nodes R_k leaves sum_lp P_lp rho_lp of it,

    rho_lp = |sum_k w_k D^lp(R_k) V_lp|^2/columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.potential import Potential
from coset.structures import Structures, concatenate, rotate
from coset.symmetry.harmonics import generators, invariants, representation

MAX_UNKNOWNS = 2000
TORQUE_WEIGHT = 20.0**-0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sector:
    """power: variance of the energy, eV²; columns: dimension of what the group leaves alive."""

    degree: int
    parity: int
    power: float
    columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """Sectors up to a degree, and the share of the data that they do not explain.

    mean: energy of the invariant part, eV. rms: of the rest over random orientations, eV.
    """

    mean: float
    rms: float
    sectors: tuple[Sector, ...]
    unexplained: float
    n_evaluations: int
    operations: Float[Tensor, "operations 3 3"]

    def residual(self, rule: Quadrature) -> float:
        """Rms error of the energy (eV) over random orientations that a rule leaves."""
        total = 0.0
        for sector in self.sectors:
            alive = invariants(sector.degree, sector.parity, self.operations)
            nodes = representation(sector.degree, sector.parity, rule.rotations)
            killed = (rule.weights[:, None, None] * (nodes @ alive)).sum(0)
            total += sector.power * float(killed.square().sum()) / sector.columns
        return math.sqrt(total)


def anisotropy_spectrum(
    potential: Potential,
    one: Structures,
    operations: Float[Tensor, "operations 3 3"],
    *,
    max_degree: int = 8,
    seed: int = 0,
) -> Spectrum:
    """Spectrum of one system whose point group has these Cartesian operations.

    Uses 1.5 times as many energies and torques as there are unknowns.

    Raises:
        ConfigError: more than 2000 unknowns, or the potential gives no torque.
    """
    alive = _alive(operations, max_degree)
    n_unknown = _count(alive)
    if n_unknown > MAX_UNKNOWNS:
        raise ConfigError(
            f"{n_unknown} unknowns up to degree {max_degree}, at most {MAX_UNKNOWNS}",
            field="max_degree",
            hint="choose a lower degree",
        )
    n_rotations = max(8, -(-3 * n_unknown // 8))
    rotations = haar(n_rotations, seed)
    energy, torque = _turned(potential, one, rotations)
    columns = [torch.ones(4 * n_rotations, 1, dtype=torch.float64)]
    columns[0][n_rotations:] = 0.0
    columns += [_features(*sector, rotations) for sector in alive]
    matrix = torch.cat(columns, dim=1)
    data = torch.cat([energy, TORQUE_WEIGHT * torque.mT.reshape(-1)])
    solution, noise, inverse = _least_squares(matrix, data)
    return _spectrum(alive, solution, noise * inverse, (noise, data), n_rotations, operations)


def highest_degree(operations: Float[Tensor, "operations 3 3"], wanted: int) -> int:
    """The highest degree up to `wanted` whose spectrum has few enough unknowns."""
    degrees = range(wanted, 0, -1)
    return next(d for d in degrees if _count(_alive(operations, d)) <= MAX_UNKNOWNS)


def _alive(operations: Tensor, max_degree: int) -> list[tuple[int, int, Tensor]]:
    """Sectors (degree, parity, V) in which the group leaves something."""
    names = [(0, -1)]
    names += [(degree, parity) for degree in range(1, max_degree + 1) for parity in (1, -1)]
    sectors = [(*name, invariants(*name, operations)) for name in names]
    return [sector for sector in sectors if sector[2].shape[1]]


def _count(alive: Sequence[tuple[int, int, Tensor]]) -> int:
    return 1 + sum(columns.numel() for _, _, columns in alive)


def haar(count: int, seed: int) -> Float[Tensor, "count 3 3"]:
    """Random matrices of O(3), half of them improper in the mean; float64."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    unique: Tensor = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None, :]
    return unique


def _turned(
    potential: Potential, one: Structures, rotations: Float[Tensor, "nodes 3 3"]
) -> tuple[Tensor, Tensor]:
    """Energies [nodes] and torques [nodes, 3] of turned copies."""
    found = potential(concatenate([rotate(one, rotation) for rotation in rotations]))
    if found.energy is None or found.torque is None:
        raise ConfigError("the spectrum needs a potential that gives torques")
    return found.energy.double(), found.torque.double()


def _features(degree: int, parity: int, alive: Tensor, rotations: Tensor) -> Tensor:
    """Rows: energies, then torques about x, y, z; columns: the entries of D V."""
    values = representation(degree, parity, rotations) @ alive
    slopes = torch.einsum("amn,knj->akmj", generators(degree), values)
    rows = [values.flatten(1), *(TORQUE_WEIGHT * slope.flatten(1) for slope in slopes)]
    return torch.cat(rows)


def _least_squares(matrix: Tensor, data: Tensor) -> tuple[Tensor, float, Tensor]:
    """Solution, variance of the noise, and the inverse of the normal matrix."""
    inverse = torch.linalg.inv(matrix.mT @ matrix)
    solution = torch.linalg.lstsq(matrix, data[:, None]).solution[:, 0]
    residual = data - matrix @ solution
    freedom = max(len(data) - matrix.shape[1], 1)
    return solution, float(residual.square().sum()) / freedom, inverse


def _spectrum(
    alive: Sequence[tuple[int, int, Tensor]],
    solution: Tensor,
    covariance: Tensor,
    fit: tuple[float, Tensor],
    n_rotations: int,
    operations: Tensor,
) -> Spectrum:
    sectors, start = [], 1
    for degree, parity, columns in alive:
        own = slice(start, start + columns.numel())
        square = float(solution[own].square().sum() - covariance.diagonal()[own].sum())
        power = max(square, 0.0) / (2 * degree + 1)
        sectors.append(Sector(degree=degree, parity=parity, power=power, columns=columns.shape[1]))
        start = own.stop
    noise, data = fit
    spread = float((data[:n_rotations] - solution[0]).square().mean())
    return Spectrum(
        mean=float(solution[0]),
        rms=sum(sector.power for sector in sectors) ** 0.5,
        sectors=tuple(sectors),
        unexplained=noise / spread if spread else 0.0,
        n_evaluations=n_rotations,
        operations=operations,
    )
