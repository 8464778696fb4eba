"""Symmetry group of a crystal, slab or molecule, and symmetrization.

An operation (W|t) maps fractional columns s to W s + t. With A = cell.T its Cartesian rotation is
Q = A W A^-1, and `permutations[g, i]` is the site on which operation g puts atom i. In an open
direction the cell vector is a unit normal, so there s and t are lengths (Å).

The group of a non-primitive cell contains pure translations T. Every operation is a representative
of its coset times one of T, so the mean over the group is the mean over T, then over at most 48
representatives. One operation per rotation *without* the mean over T is no projector.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from numpy import ndarray
from torch import Tensor

from coset.errors import StructureError
from coset.structures import Structures, complete_cell
from coset.symmetry.molecule import bijective, find_point_group
from coset.symmetry.slab import Layer, find_layer_group

if TYPE_CHECKING:
    from moyopy import MoyoDataset

MAX_MOVE = 0.1  # Å: beyond, "symmetrizing" would make another structure
MAX_STRAIN = 0.01
TIGHT_SYMPREC = 1e-6  # Å: where a symmetrized structure must still have its group
MATCH_FACTOR = 4.0  # a site, its image and t may each be off by about symprec
TIE_DECIMALS = 7  # Å
FIXED_LABEL = 1000  # added to the atomic number: a fixed atom is another species
# Orders of point groups: the last space group of each run of equal ones (International Tables A).
POINT_GROUP_ENDS = (
    *(1, 2, 9, 15, 46, 74, 82, 122, 142, 146, 161),
    *(167, 174, 190, 194, 199, 220, 230),
)
POINT_GROUP_ORDERS = (
    *(1, 2, 2, 4, 4, 8, 4, 8, 16, 3, 6),
    *(12, 6, 12, 24, 12, 24, 48),
)
OPEN_PERIOD = 10.0  # Å, more than four radii: the fictitious period of a direction that has none


@dataclass(frozen=True, kw_only=True, slots=True)
class CrystalSymmetry:
    """Group of one system: representatives modulo pure translations, and the pure translations.

    name: for messages. number: of the space group, None unless periodic in 3D; a supercell that
    breaks the point group keeps the number of its crystal, with fewer rotations. rotations,
    translations: W, t in the input cell; W is integer where periodic. cartesian_rotations: Q,
    orthogonal. pure_translations: T, fractional, with zero. translation_orbit: label of the orbit
    of each atom under T. translation_index: row of the pure translation from the first atom of its
    orbit to the atom.
    """

    name: str
    number: int | None
    rotations: Num[ndarray, "operations 3 3"]
    translations: Float[ndarray, "operations 3"]
    cartesian_rotations: Float[ndarray, "operations 3 3"]
    permutations: Int[ndarray, "operations atoms"]
    pure_translations: Float[ndarray, "pure 3"]
    translation_orbit: Int[ndarray, " atoms"]
    translation_index: Int[ndarray, " atoms"]
    warnings: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        """Operations modulo the lattice of the input cell."""
        return len(self.rotations) * len(self.pure_translations)

    @property
    def is_complete(self) -> bool:
        """Whether the input cell has all rotations of the point group of its crystal."""
        if self.number is None:
            return False
        last = bisect_left(POINT_GROUP_ENDS, self.number)
        return len(self.rotations) == POINT_GROUP_ORDERS[last]

    @property
    def first_atoms(self) -> Int[ndarray, " orbits"]:
        """First atom of each orbit under pure translations."""
        return np.unique(self.translation_orbit, return_index=True)[1]


def find_group(
    one: Structures, symprec: float, *, fixed: Bool[Tensor, " atoms"] | None = None
) -> CrystalSymmetry:
    """Space, layer or point group of one system, or its subgroup that keeps the `fixed` atoms.

    symprec (Å) limits the distance between an atom and the image of another. A molecule has its
    point group about the centroid. The identity with the warning "chain_symmetry_ignored" for what
    is periodic in one direction, with "symmetry_failed" (a crystal is P1) if no group closes.
    """
    crystal, n_periodic = _crystal(one, fixed), int(one.pbc.sum())
    if n_periodic == 1:
        return replace(trivial_group(one), warnings=("chain_symmetry_ignored",))
    finders = {0: _point_group, 2: _layer_group, 3: _space_group}
    found = finders[n_periodic](crystal, symprec)
    if found is None:
        number = 1 if n_periodic == 3 else None
        return replace(trivial_group(one), number=number, warnings=("symmetry_failed",))
    if found.order == 1:  # without the rounding of a change of basis
        return replace(trivial_group(one), name=found.name, number=found.number)
    return found


def trivial_group(one: Structures) -> CrystalSymmetry:
    """The group of the identity alone, without a number."""
    n_atoms = len(one.atomic_numbers)
    return CrystalSymmetry(
        name="identity",
        number=None,
        rotations=np.eye(3, dtype=np.int64)[None],
        translations=np.zeros((1, 3)),
        cartesian_rotations=np.eye(3)[None],
        permutations=np.arange(n_atoms)[None],
        pure_translations=np.zeros((1, 3)),
        translation_orbit=np.arange(n_atoms),
        translation_index=np.zeros(n_atoms, dtype=np.int64),
    )


def space_group_number(one: Structures, symprec: float) -> int | None:
    """Number of the space group (1-230), None unless periodic in 3D or if detection fails."""
    dataset = _detect(_crystal(one), symprec) if bool(one.pbc.all()) else None
    return None if dataset is None else int(dataset.number)


def symmetry_warnings(one: Structures, symprec: float) -> tuple[str, ...]:
    """("symmetry_ambiguous",) if the group differs at a tenth or at ten times symprec, else ().

    Crystals are told apart by the number of the group, others by its order.
    """
    limits = [factor * symprec for factor in (0.1, 1.0, 10.0)]
    if bool(one.pbc.all()):
        groups = {space_group_number(one, limit) for limit in limits}
    else:
        groups = {find_group(one, limit).order for limit in limits}
    return ("symmetry_ambiguous",) if len(groups) > 1 else ()


def symmetrize(one: Structures, group: CrystalSymmetry) -> Structures:
    """The structure that has the group exactly, float64; images of atoms and open directions stay.

    A crystal or slab keeps its orientation. The metric g0 = cell0 cell0^T becomes
    g = mean_W W^T g0 W by a symmetric stretch M, and sites move by the mean of
    frac(W s_i + t - s_perm[i]) over all operations:

        cell = cell0 M,   M = (cell0^-1 g cell0^-T)^(1/2)

    The result may have gained symmetry: detect its group again.

    Raises:
        StructureError: "TooFarFromGroup", if an atom moves by more than 0.1 Å, the strain is above
            1 %, or operations of the group are not found again at symprec 1e-6 Å.
    """
    result, moves, strain = nearest_symmetric(one, group)
    lost = find_group(result, TIGHT_SYMPREC).order % group.order > 0
    if moves.max() > MAX_MOVE or strain > MAX_STRAIN or lost:
        raise StructureError(
            f"cannot symmetrize to {group.name}: atom {moves.argmax()} would move by "
            f"{moves.max():.3g} Å (limit {MAX_MOVE}), the strain is {strain:.2%} (limit 1 %), "
            f"operations are {'lost' if lost else 'found again'} at {TIGHT_SYMPREC} Å",
            code="TooFarFromGroup",
            hint="check the structure, or give a smaller --symprec",
        )
    return result


def nearest_symmetric(
    one: Structures, group: CrystalSymmetry
) -> tuple[Structures, Float[ndarray, " atoms"], float]:
    """What `symmetrize` returns, however far away; Å that each atom moves; largest strain entry."""
    if group.order == 1:
        return one.to(torch.float64), np.zeros(len(one.atomic_numbers)), 0.0
    crystal, device = _crystal(one), one.positions.device
    cell = _symmetric_cell(crystal.cell, group.rotations)
    sites = _symmetric_sites(crystal, group)
    moves = np.linalg.norm((sites - crystal.fractional) @ cell, axis=1)
    strain = np.abs(np.linalg.solve(crystal.cell, cell) - np.eye(3)).max()
    positions, lattice = torch.from_numpy(sites @ cell), torch.from_numpy(cell).to(device)
    kept = torch.where(one.pbc[0, :, None], lattice, one.cell[0].double())
    result = replace(one, positions=positions.to(device), cell=kept[None])
    return result, moves, float(strain)


class _Crystal(NamedTuple):
    cell: Float[ndarray, "3 3"]
    periodic: Bool[ndarray, "3"]
    reduced: Float[ndarray, "3 3"]
    fractional: Float[ndarray, "atoms 3"]
    labels: Int[ndarray, " atoms"]

    def match(
        self, images: Float[ndarray, "operations atoms 3"]
    ) -> tuple[Int[ndarray, "operations atoms"], Float[ndarray, "operations atoms 3"]]:
        """The site nearest to each image among those labelled like the atom, and the way to it."""
        index = np.empty(images.shape[:2], dtype=np.int64)
        for label in np.unique(self.labels):
            rows = np.flatnonzero(self.labels == label)
            index[:, rows] = rows[self.nearest(self.fractional[rows], images[:, rows])[0]]
        return index, self.centered(self.fractional[index] - images)

    def nearest(
        self, sites: Float[ndarray, "sites 3"], points: Float[ndarray, "*points 3"]
    ) -> tuple[Int[ndarray, "*points"], Float[ndarray, "*points"]]:
        """The periodic site nearest to each point (all fractional), and its distance in Å.

        On the torus of the reduced cell with edges at their lengths, the metric of the tree is
        close to the Cartesian one, also for long or skewed cells.
        """
        from scipy.spatial import cKDTree  # noqa: PLC0415  (0.2 s, not needed to import coset)

        edges = np.linalg.norm(self.reduced, axis=1)
        to_reduced = self.cell @ np.linalg.inv(self.reduced)
        tree = cKDTree(_unit(sites @ to_reduced) * edges, boxsize=edges)
        index: ndarray = tree.query(_unit(points @ to_reduced) * edges)[1]
        return index, np.linalg.norm(self.centered(points - sites[index]) @ self.cell, axis=-1)

    def centered(self, gap: Float[ndarray, "*points 3"]) -> Float[ndarray, "*points 3"]:
        """The image of a fractional difference that is shortest in the reduced cell."""
        lattice_vectors = np.round(gap @ self.cell @ np.linalg.inv(self.reduced)) @ self.reduced
        return np.asarray(gap - np.round(lattice_vectors @ np.linalg.inv(self.cell)))


def reduced_basis(basis: Float[ndarray, "3 3"]) -> Float[ndarray, "3 3"]:
    """Niggli-reduced basis (rows) of the same lattice; the same one in every orientation.

    Where vectors are equally long, rounding would choose: their products are rounded before.
    """
    from moyopy import niggli_reduce  # noqa: PLC0415

    standing = np.round(np.linalg.cholesky(basis @ basis.T), TIE_DECIMALS)
    reduced = np.array(niggli_reduce(standing.tolist())[0])
    return np.asarray(np.rint(reduced @ np.linalg.inv(standing)) @ basis)


def _crystal(one: Structures, fixed: Bool[Tensor, " atoms"] | None = None) -> _Crystal:
    if len(one) != 1:
        raise StructureError(f"{len(one)} systems given, expected a batch of one", hint="split it")
    cell = complete_cell(one.cell.detach().cpu().double(), one.pbc.cpu())[0].numpy()
    fractional = one.positions.detach().cpu().double().numpy() @ np.linalg.inv(cell)
    labels = one.atomic_numbers if fixed is None else one.atomic_numbers + FIXED_LABEL * fixed
    periodic = one.pbc[0].cpu().numpy()
    radius = np.linalg.norm((fractional - fractional.mean(axis=0))[:, ~periodic], axis=1).max()
    period = np.where(periodic, 1.0, OPEN_PERIOD + 4 * radius)
    reduced = reduced_basis(period[:, None] * cell)
    return _Crystal(cell, periodic, reduced, fractional, labels.cpu().numpy())


def _detect(crystal: _Crystal, symprec: float) -> "MoyoDataset | None":
    from moyopy import Cell, MoyoDataset  # noqa: PLC0415

    cell = Cell(crystal.cell.tolist(), crystal.fractional.tolist(), crystal.labels.tolist())
    try:
        return MoyoDataset(cell, symprec=symprec, rotate_basis=False)
    except ValueError:  # no group fits, for instance because atoms coincide
        return None


def _space_group(crystal: _Crystal, symprec: float) -> CrystalSymmetry | None:
    dataset = _detect(crystal, symprec)
    return None if dataset is None else _group_of(crystal, dataset)


def _layer_group(crystal: _Crystal, symprec: float) -> CrystalSymmetry | None:
    layer = Layer(crystal.cell, crystal.periodic, crystal.fractional, crystal.labels)
    found = find_layer_group(layer, symprec, crystal.match)
    if found is None:
        return None
    representatives, pure = found
    first, orbit = np.unique(pure.permutations.min(axis=0), return_inverse=True)
    return CrystalSymmetry(
        name=f"the layer group of {len(representatives.rotations)} rotations",
        number=None,
        rotations=representatives.rotations,
        translations=representatives.translations,
        cartesian_rotations=_cartesian(crystal.cell, representatives.rotations),
        permutations=representatives.permutations,
        pure_translations=pure.translations,
        translation_orbit=orbit,
        translation_index=(pure.permutations[:, first[orbit]] == np.arange(len(orbit))).argmax(0),
    )


def _point_group(crystal: _Crystal, symprec: float) -> CrystalSymmetry | None:
    center = crystal.fractional.mean(axis=0)
    found = find_point_group(
        crystal.fractional - center,
        crystal.labels,
        symprec,
        lambda images: crystal.match(images + center),
    )
    if found is None:
        return None
    n_atoms = len(crystal.labels)
    return CrystalSymmetry(
        name=f"point group {found.name}",
        number=None,
        rotations=found.rotations,
        translations=center - found.rotations @ center,
        cartesian_rotations=_cartesian(crystal.cell, found.rotations),
        permutations=found.permutations,
        pure_translations=np.zeros((1, 3)),
        translation_orbit=np.arange(n_atoms),
        translation_index=np.zeros(n_atoms, dtype=np.int64),
    )


def _group_of(crystal: _Crystal, dataset: "MoyoDataset") -> CrystalSymmetry | None:
    """Representatives and pure translations, None if they are not one to one on the atoms."""
    tolerance = MATCH_FACTOR * dataset.symprec
    all_rotations = np.array(dataset.operations.rotations)
    all_translations = np.array(dataset.operations.translations)
    pure = all_translations[(all_rotations == np.eye(3)).all(axis=(1, 2))]
    _, chosen = np.unique(all_rotations.reshape(-1, 9), axis=0, return_index=True)
    rotations, translations = all_rotations[chosen], all_translations[chosen]
    permutations = _permutations(crystal, rotations, translations, tolerance)
    orbit = np.unique(dataset.mapping_std_prim, return_inverse=True)[1]
    index = _translation_index(crystal, orbit, pure, tolerance)
    if index is None or permutations is None:
        return None
    return CrystalSymmetry(
        name=f"space group {dataset.number}",
        number=int(dataset.number),
        rotations=rotations,
        translations=translations,
        cartesian_rotations=_cartesian(crystal.cell, rotations),
        permutations=permutations,
        pure_translations=pure,
        translation_orbit=orbit,
        translation_index=index,
    )


def _permutations(
    crystal: _Crystal, rotations: ndarray, translations: ndarray, tolerance: float
) -> Int[ndarray, "operations atoms"] | None:
    """Sites on which the operations put the atoms, None unless bijective within tolerance (Å)."""
    result, gap = crystal.match(crystal.fractional @ rotations.mT + translations[:, None])
    near = np.linalg.norm(gap @ crystal.cell, axis=2).max() <= tolerance
    return result if near and bool(bijective(result).all()) else None


def _translation_index(
    crystal: _Crystal, orbit: ndarray, pure: ndarray, tolerance: float
) -> Int[ndarray, " atoms"] | None:
    """Pure translation from the first atom of its orbit to each atom, None unless one to one."""
    first = np.unique(orbit, return_index=True)[1][orbit]
    index, distance = crystal.nearest(pure, crystal.fractional - crystal.fractional[first])
    same_species = bool((crystal.labels == crystal.labels[first]).all())
    n_pairs = len(np.unique(orbit * len(pure) + index))
    complete = n_pairs == len(orbit) == len(pure) * (int(orbit.max()) + 1)
    return index if same_species and complete and distance.max() <= tolerance else None


def _symmetric_cell(cell: ndarray, rotations: ndarray) -> Float[ndarray, "3 3"]:
    metric = np.mean(rotations.mT @ (cell @ cell.T) @ rotations, axis=0)
    inverse = np.linalg.inv(cell)
    values, vectors = np.linalg.eigh(inverse @ metric @ inverse.T)
    return np.asarray(cell @ (vectors * np.sqrt(values)) @ vectors.T)


def _cartesian(cell: ndarray, rotations: ndarray) -> Float[ndarray, "operations 3 3"]:
    lattice = _symmetric_cell(cell, rotations).T
    return np.asarray(lattice @ rotations @ np.linalg.inv(lattice))


def _symmetric_sites(crystal: _Crystal, group: CrystalSymmetry) -> Float[ndarray, "atoms 3"]:
    """Sites averaged over the pure translations, then over the representatives."""
    orbit, first = group.translation_orbit, group.first_atoms[group.translation_orbit]
    gap = crystal.fractional - crystal.fractional[first]
    gap = crystal.centered(gap - group.pure_translations[group.translation_index])
    mean = np.zeros((len(group.first_atoms), 3))
    np.add.at(mean, orbit, gap / len(group.pure_translations))
    sites = crystal.fractional - gap + mean[orbit]
    images = sites @ group.rotations.mT + group.translations[:, None]
    change = np.zeros_like(sites)
    np.add.at(change, group.permutations, crystal.centered(images - sites[group.permutations]))
    return np.asarray(sites + change / len(group.rotations))


def _unit(fractional: ndarray) -> ndarray:
    """Fractional coordinates in [0, 1); almost 1 becomes 0, so that no product reaches the edge."""
    unit: ndarray = fractional - np.floor(fractional)
    return np.where(unit > 1 - 1e-12, 0.0, unit)
