"""Reduction of a crystal to its primitive cell, and the way back.

The input cell A (rows) is an integer multiple of the primitive one, A = M A_p, and atom i of the
input is a copy of primitive atom m_i: x_i = x_(m_i) + o_i A, with fractional o_i. A model that is
local and invariant under translations has E = n E_p, F_i = F_(m_i) and the same stress: exact, with
the full point group (also where the input cell breaks it), and cheaper n times.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from coset.potential import ModelPotential, Potential
from coset.structures import PER_ATOM_PROPERTIES, Properties, Structures
from coset.symmetry.crystal import CrystalSymmetry, find_group, reduced_basis, symmetrize

SYMPREC = 1e-5
"""Å: where the primitive cell has at least the operations of its input, which has them exactly."""
EXTENSIVE = ("energy", "torque")


@dataclass(frozen=True, kw_only=True, slots=True)
class Primitive:
    """A primitive cell in the orientation of its input, with its group.

    mapping: primitive atom of each atom, the first of its orbit; n_cells: primitive cells in the
    input; matrix: M; offsets: o, exact multiples of 1/n_cells.
    """

    structures: Structures
    group: CrystalSymmetry
    mapping: Int[Tensor, " atoms"]
    n_cells: int
    matrix: Int[ndarray, "3 3"]
    offsets: Float[Tensor, "atoms 3"]
    atomic_numbers: Int[Tensor, " atoms"]

    def unfold(self, primitive: Structures) -> Structures:
        """The input cell made of this state of the primitive one."""
        if self.n_cells == 1:
            return primitive
        matrix = torch.from_numpy(self.matrix).to(primitive.cell)
        cell = matrix @ primitive.cell[0]
        return replace(
            primitive,
            positions=primitive.positions[self.mapping] + self.offsets.to(cell) @ cell,
            cell=cell[None],
            atomic_numbers=self.atomic_numbers,
            system_index=torch.zeros_like(self.atomic_numbers),
        )

    def fold(self, one: Structures) -> Structures:
        """The primitive cell of a state of the input cell that has all pure translations."""
        if self.n_cells == 1:
            return one
        n_atoms = len(self.structures.atomic_numbers)
        atoms = torch.arange(len(self.mapping), device=self.mapping.device)
        first = atoms.new_full((n_atoms,), len(atoms)).scatter_reduce(
            0, self.mapping, atoms, "amin"
        )
        matrix = torch.from_numpy(self.matrix).to(one.cell)
        return replace(
            self.structures,
            positions=one.positions[first],
            cell=torch.linalg.solve(matrix, one.cell[0])[None],
        )

    def unfold_properties(self, properties: Properties) -> Properties:
        """Properties of the input cell from those of the primitive one."""
        if self.n_cells == 1:
            return properties
        changed: dict[str, Tensor] = {}
        for name in PER_ATOM_PROPERTIES:
            if (value := getattr(properties, name)) is not None:
                changed[name] = value[self.mapping]
        for name in EXTENSIVE:
            if (value := getattr(properties, name)) is not None:
                changed[name] = value * self.n_cells
        return replace(properties, **changed)


def primitive_cell(one: Structures, group: CrystalSymmetry, symprec: float = SYMPREC) -> Primitive:
    """The primitive cell of one system that has its group exactly (`symmetrize`), float64.

    The input itself if it is primitive, not periodic in 3D, or charged. The primitive cell is
    reduced (Niggli), and right-handed if the input is. Where the input cell breaks the point group
    of its crystal, the group is found again at `symprec` (Å) and the primitive cell is symmetrized
    to it.

    Raises:
        StructureError: as `symmetrize`.
    """
    n_cells = len(group.pure_translations)
    charged = bool(one.charge.any()) or bool((one.spin_multiplicity != 1).any())
    if n_cells == 1 or charged or not bool(one.pbc.all()):
        return unreduced(one, group)
    cell = one.cell[0].double().cpu().numpy()
    basis = reduced_basis(_lattice(group.pure_translations) @ cell)
    basis = basis * np.sign(np.linalg.det(basis) * np.linalg.det(cell))
    matrix = np.rint(cell @ np.linalg.inv(basis)).astype(np.int64)
    first = torch.from_numpy(group.first_atoms)
    exact = replace(
        one,
        positions=one.positions.double()[first],
        cell=torch.linalg.solve(torch.from_numpy(matrix).double(), torch.from_numpy(cell))[None].to(
            one.cell.device
        ),
        atomic_numbers=one.atomic_numbers[first],
        system_index=one.system_index[first],
    )
    if group.is_complete:
        own = _quotient(group, matrix)
    else:
        own = find_group(exact, symprec)
        own = own if own.order % len(group.rotations) == 0 else find_group(exact, SYMPREC)
        exact = symmetrize(exact, own)
    return Primitive(
        structures=exact,
        group=own,
        mapping=torch.from_numpy(group.translation_orbit).to(first),
        n_cells=n_cells,
        matrix=matrix,
        offsets=torch.from_numpy(_offsets(one, group)).to(one.cell.device),
        atomic_numbers=one.atomic_numbers,
    )


def reduced(
    potential: Potential, one: Structures, group: CrystalSymmetry, symprec: float = SYMPREC
) -> Primitive:
    """The primitive cell for a model, which is local; the input itself for any other potential.

    Raises:
        StructureError: as `symmetrize`.
    """
    if isinstance(potential, ModelPotential):
        return primitive_cell(one, group, symprec)
    return unreduced(one, group)


def unreduced(one: Structures, group: CrystalSymmetry) -> Primitive:
    """The input itself in place of a primitive cell."""
    n_atoms = len(one.atomic_numbers)
    return Primitive(
        structures=one,
        group=group,
        mapping=torch.arange(n_atoms, device=one.cell.device),
        n_cells=1,
        matrix=np.eye(3, dtype=np.int64),
        offsets=one.positions.new_zeros(n_atoms, 3, dtype=torch.float64),
        atomic_numbers=one.atomic_numbers,
    )


def orientation(one: Structures, group: CrystalSymmetry | None = None) -> Float[Tensor, "3 3"]:
    """A rotation from the lab to axes that are fixed in a crystal or slab, float64 on the CPU.

    The orthogonal factor of the reduced lattice vectors (of the primitive ones, if `group` has pure
    translations), or those of a slab and its normal; the lab itself where there are fewer than two.
    Rotated inputs have rotated axes; mirrored ones have not. Another cell of the same lattice may
    have axes that a symmetry of the lattice turns into these.
    """
    cell, periodic = one.cell[0].detach().cpu().double(), one.pbc[0].cpu()
    if int(periodic.sum()) < 2:
        return torch.eye(3, dtype=torch.float64)
    if not bool(periodic.all()):
        a, b = cell[periodic]
        normal = torch.linalg.cross(a, b)
        cell = torch.stack([a, b, normal / normal.norm()])
    else:
        pure = np.zeros((1, 3)) if group is None else group.pure_translations
        cell = torch.from_numpy(reduced_basis(_lattice(pure) @ cell.numpy()))
    left, _, right = torch.linalg.svd(cell)
    factor: Tensor = left @ right
    turn: Tensor = factor * torch.linalg.det(factor).sign()
    return turn


def _quotient(group: CrystalSymmetry, matrix: Int[ndarray, "3 3"]) -> CrystalSymmetry:
    """The group modulo its pure translations, in the primitive cell: f_p = M^T f."""
    turn = matrix.T
    rotations = np.rint(turn @ group.rotations @ np.linalg.inv(turn)).astype(np.int64)
    n_atoms = len(group.first_atoms)
    return replace(
        group,
        rotations=rotations,
        translations=group.translations @ matrix,
        permutations=group.translation_orbit[group.permutations[:, group.first_atoms]],
        pure_translations=np.zeros((1, 3)),
        translation_orbit=np.arange(n_atoms),
        translation_index=np.zeros(n_atoms, dtype=np.int64),
    )


def _lattice(translations: Float[ndarray, "pure 3"]) -> Float[ndarray, "3 3"]:
    """Basis (fractional rows) of the lattice of translations, by integer row reduction.

    Every translation is a multiple of 1/n, where n is their number.
    """
    n = len(translations)
    rows = [*np.rint(translations * n).astype(np.int64), *(n * np.eye(3, dtype=np.int64))]
    basis: list[ndarray] = []
    for column in range(3):
        live = [row for row in rows if row[column]]
        rest = [row for row in rows if not row[column]]
        while len(live) > 1:
            live.sort(key=lambda row: abs(int(row[column])))
            pivot, *others = live
            others = [row - row[column] // pivot[column] * pivot for row in others]
            live = [pivot, *(row for row in others if row[column])]
            rest += [row for row in others if not row[column] and row.any()]
        basis += live
        rows = rest
    return np.array(basis) / n


def _offsets(one: Structures, group: CrystalSymmetry) -> Float[ndarray, "atoms 3"]:
    """o_i: the pure translation from the first atom of the orbit to atom i, in its own image."""
    inverse = np.linalg.inv(one.cell[0].double().cpu().numpy())
    fractional = one.positions.double().cpu().numpy() @ inverse
    n = len(group.pure_translations)
    exact = np.rint(group.pure_translations * n) / n
    translation = exact[group.translation_index]
    first = group.first_atoms[group.translation_orbit]
    gap = fractional - fractional[first]
    return np.asarray(translation + np.rint(gap - translation))
