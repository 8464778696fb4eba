"""Layer group of a slab, periodic in two directions: the operations that map it onto itself.

Sites are fractional along the two lattice vectors and lengths (Å) along the normal, which are never
wrapped. An operation (W|t) maps the plane lattice onto itself and the normal up or down; t follows
from the image of one atom, then from the mean over all of them,

    t = mean_i (s_perm[i] - W s_i) = (1 - W) mean_i s_i + (sum of lattice vectors) / n_atoms

so that translations of operations that close also add up, to rounding. Pure translations come
first, then one representative for each W.

The space group of the slab with vacuum would not do: that search loses operations where noise is
larger, as a fraction of a short vector, than the distance of two layers, of a long one.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from coset.symmetry.molecule import Match, bijective, largest_closed, shells


class Layer(NamedTuple):
    """Cell rows are the lattice vectors where `periodic`, else the unit normal."""

    cell: Float[ndarray, "3 3"]
    periodic: Bool[ndarray, "3"]
    sites: Float[ndarray, "atoms 3"]
    labels: Int[ndarray, " atoms"]


class Operations(NamedTuple):
    """Maps s -> W s + t, where they put the atoms, and the largest distance to a site there, Å."""

    rotations: Int[ndarray, "operations 3 3"]
    translations: Float[ndarray, "operations 3"]
    permutations: Int[ndarray, "operations atoms"]
    residual: Float[ndarray, " operations"]

    def take(self, rows: ndarray) -> "Operations":
        """The operations at the given places."""
        return Operations(*(array[rows] for array in self))


def find_layer_group(
    layer: Layer, symprec: float, match: Match
) -> tuple[Operations, Operations] | None:
    """Representatives and pure translations of the layer group, None if atoms coincide.

    symprec (Å) limits the distance between an atom and the image of another.
    """
    height = layer.sites[:, ~layer.periodic][:, 0]
    kind = shells(abs(height - height.mean()), layer.labels, symprec)
    rarest = np.flatnonzero(kind == np.bincount(kind).argmin())
    identity = np.eye(3, dtype=np.int64)[None]
    pure = _search(layer, identity, rarest, symprec, match)
    pure = pure.take(largest_closed(_sums(pure, rarest[0]), pure.residual))
    if not len(pure.residual):
        return None
    orbit = pure.permutations.min(axis=0)
    targets = rarest[orbit[rarest] == rarest]
    found = _search(layer, _lattice_maps(layer, symprec), targets, symprec, match)
    to_orbit = orbit[found.permutations]
    found = found.take((to_orbit == to_orbit[:, orbit]).all(axis=1))  # orbits go onto orbits
    found = found.take(np.argsort(found.residual, kind="stable"))  # of each W the best
    found = found.take(np.unique(found.rotations, axis=0, return_index=True)[1])
    return found.take(largest_closed(_products(found, orbit), found.residual)), pure


def _search(
    layer: Layer, rotations: ndarray, targets: ndarray, symprec: float, match: Match
) -> Operations:
    """Operations with the given W that put the first target on one of the targets."""
    mean = layer.sites.mean(axis=0) * ~layer.periodic
    translations = mean - rotations @ mean
    images = layer.sites @ rotations.mT + translations[:, None]
    way = layer.sites[targets] - images[:, targets[:1]]
    level = abs(way[:, :, ~layer.periodic][:, :, 0]) <= symprec
    which, _ = np.nonzero(level)
    shift = way[level] * layer.periodic
    permutations, gap = match(images[which] + shift[:, None])
    mean_gap = gap.mean(axis=1) * layer.periodic
    distance = np.linalg.norm((gap - mean_gap[:, None]) @ layer.cell, axis=2).max(axis=1)
    translations = translations[which] + shift + mean_gap
    found = Operations(rotations[which], translations, permutations, distance)
    return found.take(bijective(permutations) & (distance <= symprec))


def _lattice_maps(layer: Layer, tolerance: float) -> Int[ndarray, "maps 3 3"]:
    """W of all maps of the plane lattice onto itself, lengths within tolerance, up and down."""
    plane = layer.cell[layer.periodic]
    basis = _reduction(plane)
    blocks = np.array(list(product((-1, 0, 1), repeat=4))).reshape(-1, 2, 2)
    probes = np.array([[1, 0], [0, 1], [1, 1], [1, -1]])
    before = np.linalg.norm(probes @ basis @ plane, axis=1)
    after = np.linalg.norm(probes @ blocks.mT @ basis @ plane, axis=2)
    invertible = abs(np.linalg.det(blocks).round()) == 1
    blocks = blocks[invertible & (abs(after - before) <= tolerance).all(axis=1)]
    blocks = np.rint(basis.T @ blocks @ np.linalg.inv(basis.T)).astype(np.int64)
    maps = np.zeros((2, len(blocks), 3, 3), dtype=np.int64)
    maps[:, :, np.outer(layer.periodic, layer.periodic)] = blocks.reshape(-1, 4)
    maps[:, :, ~layer.periodic, ~layer.periodic] = np.array([1, -1])[:, None, None]
    return maps.reshape(-1, 3, 3)


def _reduction(plane: Float[ndarray, "2 3"]) -> Int[ndarray, "2 2"]:
    """Integer combinations of two vectors that are shortest (Gauss)."""
    basis = np.eye(2, dtype=np.int64)
    while True:
        short, long = sorted(basis, key=lambda row: float(np.linalg.norm(row @ plane)))
        along = (long @ plane) @ (short @ plane) / np.sum((short @ plane) ** 2)
        basis = np.array([short, long - round(along) * short])
        if abs(along) <= 0.5 + 1e-9:
            return basis


def _sums(pure: Operations, atom: int) -> Int[ndarray, "pure pure"]:
    """Place of the sum of two pure translations, -1 if it is not there."""
    places = np.full(pure.permutations.shape[1], -1)
    places[pure.permutations[:, atom]] = np.arange(len(pure.permutations))
    return np.asarray(places[pure.permutations[:, pure.permutations[:, atom]]])


def _products(found: Operations, orbit: ndarray) -> Int[ndarray, "operations operations"]:
    """Place of g after h modulo pure translations, -1 if it is not there."""
    W, permutations = found.rotations, found.permutations
    same = ((W[:, None] @ W)[:, :, None] == W).all(axis=(3, 4))
    place = same.argmax(axis=2)
    agree = (orbit[permutations[:, permutations]] == orbit[permutations[place]]).all(axis=2)
    return np.where(same.any(axis=2) & agree, place, -1)
