"""A potential in the frame of the metric: exactly invariant under rotations, for one evaluation.

A cell h (rows) is a reference cell h0 strained and turned. The potential is asked about h0 U, with
the same fractional positions, and what it says is turned back:

    h = h0 F = h0 U Q,   U = (F F^T)^(1/2),   Q a rotation
    E(h) = E'(h0 U)      forces = forces' Q    V stress = Q^T T Q
    T = X sym[(X^T w' X)_ij 2 u_j / (u_i + u_j)] X^T,   U = X diag(u) X^T,   w' the full virial

T is not sym(w'): as the strain of h changes U, the cell h0 U turns, and a model that is not
invariant has a torque against it. The orientation of h0 is left as a gauge, which an average over
rotations removes: give a potential that has a quadrature. Energies are smooth as long as h0 stays.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coset.errors import ConfigError, StructureError
from coset.potential import Potential
from coset.structures import Properties, Structures, deform


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """U = X diag(u) X^T and Q of every system, float64."""

    turn: Float[Tensor, "systems 3 3"]
    axes: Float[Tensor, "systems 3 3"]
    factors: Float[Tensor, "systems 3"]

    def torque_term(self, virial: Float[Tensor, "systems 3 3"]) -> Float[Tensor, "systems 3 3"]:
        """T of the full virial w' (eV) in the frame."""
        u = self.factors
        share = 2.0 * u[:, None, :] / (u[:, :, None] + u[:, None, :])
        inner = (self.axes.mT @ virial @ self.axes) * share
        return self.axes @ (0.5 * (inner + inner.mT)) @ self.axes.mT


@dataclass(frozen=True, kw_only=True)
class MetricFrame:
    """A potential evaluated in the frame of reference cells, one per system of every batch.

    reference: h0 in Å, near the cells that will come, the same lattice vectors in the same order;
    in an open direction anything (a unit normal takes its place).
    """

    potential: Potential
    reference: Float[Tensor, "systems 3 3"]

    @property
    def cutoff(self) -> float:
        """Longest edge, Å."""
        return self.potential.cutoff

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        return self.potential.elements

    @property
    def level_of_theory(self) -> str:
        """What its energies approximate."""
        return self.potential.level_of_theory

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError for what the potential cannot take."""
        self.potential.check_supported(structures)

    def __call__(self, structures: Structures) -> Properties:
        """Predictions for every system; the torque is zero.

        Raises:
            ConfigError: as many reference cells as systems are needed, or the potential gives a
                stress without its torque.
            StructureError: as `stretch_from`, or of the potential.
        """
        if len(self.reference) != len(structures):
            raise ConfigError(
                f"{len(self.reference)} reference cells for {len(structures)} systems, "
                "expected one each",
                field="reference",
            )
        stretch = stretch_from(self.reference, structures)
        framed = deform(structures.to(torch.float64), stretch.turn.mT)
        return _turned_back(self.potential(framed), structures, stretch)


def stretch_from(reference: Float[Tensor, "systems 3 3"], structures: Structures) -> Stretch:
    """U and Q with cell = reference U Q.

    Raises:
        StructureError: "NoMetricFrame": fewer than two periodic directions, a reference without
            volume, or one of the other handedness.
    """
    pbc = structures.pbc
    cell = _with_normals(structures.cell.double(), pbc)
    start = _with_normals(reference.to(cell), pbc)
    F = torch.linalg.solve_ex(start, cell)[0]
    sound = (pbc.sum(1) >= 2) & torch.isfinite(F).all(2).all(1) & (torch.linalg.det(F) > 0)
    if not bool(sound.all()):
        raise StructureError(
            "the cell is not a strained and turned reference cell: expected two or three periodic "
            "directions, a reference with a volume and the same handedness",
            code="NoMetricFrame",
            structure_id=str(int(torch.nonzero(~sound)[0])),
            field="cell",
        )
    squares, axes = torch.linalg.eigh(F @ F.mT)
    factors = squares.sqrt()
    inverse = (axes / factors[:, None, :]) @ axes.mT
    return Stretch(turn=inverse @ F, axes=axes, factors=factors)


def _with_normals(
    cell: Float[Tensor, "systems 3 3"], pbc: Bool[Tensor, "systems 3"]
) -> Float[Tensor, "systems 3 3"]:
    """Cells whose one open direction is the unit normal that turns with the other two."""
    normals = torch.linalg.cross(cell[:, [1, 2, 0]], cell[:, [2, 0, 1]])
    normals = normals / torch.linalg.vector_norm(normals, dim=2, keepdim=True)
    return torch.where(pbc[:, :, None], cell, normals)


def _turned_back(found: Properties, structures: Structures, stretch: Stretch) -> Properties:
    turn = stretch.turn
    per_atom = turn[structures.system_index]

    def vectors(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.einsum("ia,iab->ib", value.double(), per_atom)

    stress, direct_stress, torque = found.stress, found.direct_stress, found.torque
    if stress is not None:
        if torque is None:
            raise ConfigError(
                "the stress in the metric frame needs the torque, which this potential does not "
                "give",
                field="potential",
            )
        volume = structures.volume[:, None, None].double()
        virial = volume * stress + antisymmetric(torque)
        stress = turn.mT @ (stretch.torque_term(virial) / volume) @ turn
    if direct_stress is not None:
        direct_stress = turn.mT @ direct_stress.double() @ turn
    return replace(
        found,
        forces=vectors(found.forces),
        stress=stress,
        torque=None if torque is None else torch.zeros_like(torque),
        direct_forces=vectors(found.direct_forces),
        direct_stress=direct_stress,
    )


def antisymmetric(torque: Float[Tensor, "systems 3"]) -> Float[Tensor, "systems 3 3"]:
    """The antisymmetric part of the virial with torque_a = eps_abc w_bc."""
    x, y, z = (0.5 * torque.double()).unbind(1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, z, -y, -z, zero, x, y, -x, zero], dim=1).reshape(-1, 3, 3)
