"""Wave vectors of a crystal: commensurate meshes, the group acting on them and on D(q).

A mesh (N1, N2, N3) holds the q = k/N of the supercell N of the primitive cell. An operation (W|t)
maps atom k of cell S to atom p(k) of cell W S + L_k with W f_k + t = f_p(k) + L_k, and in the
lattice phase D_jj'(q) = sum_S Phi(j 0, j' S) e^(2 pi i q.S)/sqrt(m_j m_j')

    D(q') = U D(q) U†,   q' = q W^-1,   U[p(k), k] = Q e^(-2 pi i q'.L_k)

for a model that has the symmetry; of one that has not, the projection is

    D̄(q) = mean_g U_g† D(q W_g^-1) U_g.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from numpy import ndarray

from coset.structures import Structures
from coset.symmetry.crystal import CrystalSymmetry

SAME_POINT = 1e-8
ON_MESH = 1e-4  # of a division: wave vectors read from text

Mesh = tuple[int, int, int]
"""Divisions along the three reciprocal vectors; also the supercell of the same range."""

Evaluate = Callable[[Float[ndarray, "points 3"]], Complex[ndarray, "samples points dim dim"]]
"""Dynamical matrices of all samples at some wave vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """A space group of a primitive cell, acting on wave vectors and on Bloch waves.

    inverse: W^-1. cartesian: Q. permutations: p. shifts: L.
    """

    inverse: Int[ndarray, "operations 3 3"]
    cartesian: Float[ndarray, "operations 3 3"]
    permutations: Int[ndarray, "operations atoms"]
    shifts: Int[ndarray, "operations atoms 3"]

    def images(self, q: Float[ndarray, "points 3"]) -> Float[ndarray, "operations points 3"]:
        """The wave vectors q W^-1 for every operation."""
        return np.asarray(np.einsum("qi,gij->gqj", q, self.inverse))

    def pull_back(
        self,
        matrices: Complex[ndarray, "samples points dim dim"],
        image: Float[ndarray, "points 3"],
        operation: int,
    ) -> Complex[ndarray, "samples points dim dim"]:
        """U† D(q') U of one operation, from D at the images q' = q W^-1."""
        shape, permutation = matrices.shape, self.permutations[operation]
        n_atoms = len(permutation)
        blocks = matrices.reshape(*shape[:2], n_atoms, 3, n_atoms, 3)[:, :, permutation]
        blocks = blocks[:, :, :, :, permutation]
        Q = self.cartesian[operation]
        turned = np.einsum("ba,sqkbmc,cd->sqkamd", Q, blocks, Q, optimize=True)
        phase = np.exp(2j * np.pi * image @ self.shifts[operation].T)
        turned *= phase[:, :, None, None, None] * phase.conj()[:, None, None, :, None]
        return np.asarray(turned.reshape(shape))


def action_of(primitive: Structures, group: CrystalSymmetry) -> Action:
    """The action of the group of a primitive cell."""
    cell = primitive.cell[0].double().cpu().numpy()
    fractional = primitive.positions.double().cpu().numpy() @ np.linalg.inv(cell)
    images = fractional @ group.rotations.mT + group.translations[:, None]
    return Action(
        inverse=np.rint(np.linalg.inv(group.rotations)).astype(np.int64),
        cartesian=group.cartesian_rotations,
        permutations=group.permutations,
        shifts=np.rint(images - fractional[group.permutations]).astype(np.int64),
    )


def is_compatible(mesh: Mesh, action: Action) -> bool:
    """Whether the group maps the mesh onto itself."""
    numbers = np.array(mesh)
    moved = action.inverse * numbers[None, None, :] / numbers[None, :, None]
    return bool((np.abs(moved - np.rint(moved)) < SAME_POINT).all())


def compatible_mesh(wanted: Float[ndarray, "3"], action: Action) -> Mesh:
    """The mesh with the fewest points that has at least `wanted` divisions and the symmetry."""
    low = np.maximum(np.ceil(wanted - SAME_POINT), 1).astype(int)
    # Equal divisions always fit, so the search ends.
    a, b, c = (range(n, int(low.max()) + 1) for n in low)
    ordered = sorted(product(a, b, c), key=lambda mesh: (int(np.prod(mesh)), mesh))
    return next(mesh for mesh in ordered if is_compatible(mesh, action))


def supercell_mesh(cell: Float[ndarray, "3 3"], min_edge: float, action: Action) -> Mesh:
    """The smallest symmetric supercell whose edges are at least `min_edge` (Å)."""
    return compatible_mesh(min_edge / np.linalg.norm(cell, axis=1), action)


def dense_mesh(cell: Float[ndarray, "3 3"], spacing: float, action: Action) -> Mesh:
    """The coarsest symmetric mesh whose points are at most `spacing` (Å^-1, with 2 pi) apart."""
    lengths = 2 * np.pi * np.linalg.norm(np.linalg.inv(cell), axis=0)
    return compatible_mesh(lengths / spacing, action)


def mesh_points(mesh: Mesh) -> Float[ndarray, "points 3"]:
    """All k/N, 0 <= k < N, the last index running fastest."""
    return np.asarray(_integers(mesh) / np.array(mesh))


def opposites(mesh: Mesh) -> Int[ndarray, " points"]:
    """Place of -q of every point."""
    return _places(-_integers(mesh), mesh)


def irreducible_points(
    mesh: Mesh, action: Action
) -> tuple[Float[ndarray, "points 3"], Float[ndarray, " points"]]:
    """One point of every star (with time reversal) and its share of the mesh."""
    integers = _integers(mesh)
    first = np.arange(len(integers))
    first = np.minimum(first, opposites(mesh))
    for moved in _moved(mesh, action):
        image = _places(moved, mesh)
        first = np.minimum(first, np.minimum(image, opposites(mesh)[image]))
    kept, counts = np.unique(first, return_counts=True)
    return mesh_points(mesh)[kept], counts / len(integers)


def one_of_each_star(q: Float[ndarray, "points 3"], action: Action) -> Float[ndarray, "stars 3"]:
    """The first of the points of every star (with time reversal)."""
    kept: list[Float[ndarray, 3]] = []
    for point in q:
        images = action.images(point[None])[:, 0]
        images = np.concatenate([images, -images])
        differences = [images - other for other in kept]
        apart = [np.abs(d - np.rint(d)).max(axis=1).min() > ON_MESH for d in differences]
        if all(apart):
            kept.append(point)
    return np.array(kept).reshape(-1, 3)


def star_labels(
    q: Float[ndarray, "points 3"], mesh: Mesh, action: Action
) -> Int[ndarray, " points"] | None:
    """The first place in the mesh of the star (with time reversal) of each point.

    None if a point is not on the mesh.
    """
    scaled = q * np.array(mesh)
    integers = np.rint(scaled).astype(np.int64)
    if np.abs(scaled - integers).max() > ON_MESH:
        return None
    images = np.rint(action.images(integers / np.array(mesh)) * np.array(mesh)).astype(np.int64)
    places = _places(np.concatenate([images, -images]).reshape(-1, 3), mesh)
    return np.asarray(places.reshape(-1, len(q)).min(axis=0))


def project_mesh(
    matrices: Complex[ndarray, "samples points dim dim"],
    mesh: Mesh,
    action: Action,
    known: Bool[ndarray, "points atoms"] | None = None,
) -> Complex[ndarray, "samples points dim dim"]:
    """D̄ of every sample at all points of a symmetric mesh.

    known: the three columns of which atoms are given, at least one pair of every orbit, and zeros
    elsewhere; the mean over the group is then one over the operations that lead to a known pair.
    """
    total = np.zeros_like(matrices)
    count = np.zeros((len(opposites(mesh)), action.permutations.shape[1]))
    for operation, moved in enumerate(_moved(mesh, action)):
        there = _places(moved, mesh)
        total += action.pull_back(matrices[:, there], moved / np.array(mesh), operation)
        if known is not None:
            count += known[there][:, action.permutations[operation]]
    if known is None:
        return np.asarray(total / len(action.inverse))
    total /= np.repeat(count, 3, axis=1)[None, :, None, :]
    return np.asarray((total + total.conj().swapaxes(-1, -2)) / 2)


def irreducible_pairs(
    mesh: Mesh, action: Action
) -> tuple[Int[ndarray, " pairs"], Int[ndarray, " pairs"]]:
    """One (place in the mesh, atom) of every orbit, with time reversal."""
    n_atoms = action.permutations.shape[1]
    atoms = np.arange(n_atoms)
    opposite = opposites(mesh)
    first = np.arange(len(opposite) * n_atoms).reshape(-1, n_atoms)
    for moved, permutation in zip(_moved(mesh, action), action.permutations, strict=True):
        there = _places(moved, mesh)
        for place in (there, opposite[there]):
            first = np.minimum(first, place[:, None] * n_atoms + permutation[None, atoms])
    kept = np.unique(first)
    return kept // n_atoms, kept % n_atoms


def star_average(
    evaluate: Evaluate, q: Float[ndarray, "points 3"], action: Action
) -> Complex[ndarray, "samples points dim dim"]:
    """D̄ of every sample at any points, from all points of their stars, half by D(-q) = D(q)*."""
    images = action.images(q)
    points, place, flipped = _distinct(images.reshape(-1, 3))
    found = evaluate(points)[:, place]
    found[:, flipped] = found[:, flipped].conj()
    found = found.reshape(len(found), *images.shape[:2], *found.shape[2:])
    total = np.zeros_like(found[:, 0])
    for operation, image in enumerate(images):
        total += action.pull_back(found[:, operation], image, operation)
    return np.asarray(total / len(images))


def _distinct(
    q: Float[ndarray, "points 3"],
) -> tuple[Float[ndarray, "distinct 3"], Int[ndarray, " points"], Bool[ndarray, " points"]]:
    """Points that differ by more than a lattice vector and a sign; which each is, and its sign."""
    scale = 1 / SAME_POINT
    period = round(scale)
    plus = np.rint(q * scale).astype(np.int64) % period
    minus = -plus % period
    differs = plus != minus
    first = np.where(differs.any(1), differs.argmax(1), 0)
    rows = np.arange(len(q))
    flipped = plus[rows, first] > minus[rows, first]
    chosen = np.where(flipped[:, None], minus, plus)
    _, index, place = np.unique(chosen, axis=0, return_index=True, return_inverse=True)
    points = np.where(flipped[:, None], -q, q)[index]
    return points, place.reshape(-1), flipped


def _integers(mesh: Mesh) -> Int[ndarray, "points 3"]:
    return np.asarray(np.indices(mesh).reshape(3, -1).T)


def _places(integers: Int[ndarray, "points 3"], mesh: Mesh) -> Int[ndarray, " points"]:
    wrapped = np.mod(integers, np.array(mesh))
    return np.asarray(np.ravel_multi_index(tuple(wrapped.T), mesh))


def _moved(mesh: Mesh, action: Action) -> Int[ndarray, "operations points 3"]:
    """Numerators of q W^-1 of all points."""
    images = np.rint(action.images(mesh_points(mesh)) * np.array(mesh))
    return np.asarray(images.astype(np.int64))
