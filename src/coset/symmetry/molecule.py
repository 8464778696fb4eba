"""Point group of a molecule or cluster: maps about its centroid that put atoms on atoms alike.

Two atoms not in line with the centroid fix a map, up to a mirror, by where they go: every pair like
them gives two candidates. Those that permute the atoms are fitted to all of them, and the largest
set that closes is made exactly a group by repeating

    Q_g <- polar(mean_h Q_gh Q_h^T)

which converges quadratically, to the ideal group in the frame that fits the molecule. A molecule on
a line has infinitely many operations: it gets 6mm or 6/mmm along the line, which leave the same
vectors and symmetric matrices.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

SWEEPS = 4  # errors 0.1, 1e-2, 1e-4, 1e-8, 1e-16
IDENTICAL = 1e-6  # angles and traces that belong to one kind of operation

Match = Callable[
    [Float[ndarray, "operations atoms 3"]],
    tuple[Int[ndarray, "operations atoms"], Float[ndarray, "operations atoms 3"]],
]
"""For each image of each atom the nearest site of its kind, and the way to it."""


class PointGroup(NamedTuple):
    """Maps x -> Q x about the centroid; name: after Schoenflies."""

    name: str
    rotations: Float[ndarray, "operations 3 3"]
    permutations: Int[ndarray, "operations atoms"]


def find_point_group(
    positions: Float[ndarray, "atoms 3"],
    labels: Int[ndarray, " atoms"],
    symprec: float,
    match: Match,
) -> PointGroup | None:
    """Point group of atoms given about their centroid (Å), None if atoms coincide.

    symprec (Å) limits the distance between an atom and the image of another.
    """
    frame = np.linalg.svd(positions)[2]
    if np.linalg.norm(positions @ frame[1:].T, axis=1).max() <= symprec:
        return _linear_group(positions, frame, symprec, match)
    pair = _base_pair(positions, labels, symprec)
    rotations, permutations = _fitted(
        positions, _candidates(positions, labels, pair, symprec), match
    )
    residual = _distance(positions @ rotations.mT - positions[permutations])
    near = residual <= symprec
    rotations, permutations = rotations[near], permutations[near]
    kept = largest_closed(_products(rotations, permutations, pair), residual[near])
    if not kept.any():
        return None
    rotations, permutations = rotations[kept], permutations[kept]
    rotations = _exact(rotations, _products(rotations, permutations, pair))
    return PointGroup(_schoenflies(rotations), rotations, permutations)


def shells(
    values: Float[ndarray, " atoms"], labels: Int[ndarray, " atoms"], tolerance: float
) -> Int[ndarray, " atoms"]:
    """Number of the shell of each atom: one label, and values without a gap above the tolerance."""
    order = np.lexsort((values, labels))
    apart = (np.diff(values[order]) > tolerance) | (np.diff(labels[order]) != 0)
    result = np.zeros(len(values), dtype=np.int64)
    result[order[1:]] = np.cumsum(apart)
    return result


def bijective(images: Int[ndarray, "operations atoms"]) -> Bool[ndarray, " operations"]:
    """Which operations put one atom on every site."""
    return np.asarray((np.sort(images, axis=1) == np.arange(images.shape[1])).all(axis=1))


def largest_closed(
    products: Int[ndarray, "operations operations"], residual: Float[ndarray, " operations"]
) -> Bool[ndarray, " operations"]:
    """The largest set of operations below one residual that contains all its products.

    products: place of g after h, -1 if it is not there.
    """
    for limit in np.unique(residual)[::-1]:
        kept = residual <= limit
        inside = products[np.ix_(kept, kept)]
        if inside.min() >= 0 and kept[inside].all():
            return np.asarray(kept)
    return np.asarray((products == np.arange(len(products))).all(axis=1))  # the identity


def _linear_group(
    positions: ndarray, frame: ndarray, symprec: float, match: Match
) -> PointGroup | None:
    """6/mmm along the first row of the frame if the molecule can be turned round, else 6mm."""
    images = np.stack([positions, -positions])
    permutations = match(images)[0]
    fits = _distance(images - positions[permutations]) <= symprec
    same, turned = fits & bijective(permutations)
    if not same:
        return None
    angles = np.arange(6) * np.pi / 3
    c, s = np.cos(angles), np.sin(angles)
    around = np.zeros((12, 3, 3))
    around[:, 0, 0] = 1.0
    around[:6, 1:, 1:] = np.array([[c, -s], [s, c]]).transpose(2, 0, 1)
    around[6:, 1:, 1:] = np.array([[c, s], [s, -c]]).transpose(2, 0, 1)
    rotations = frame.T @ around @ frame
    if not turned:
        return PointGroup("C∞v", rotations, np.repeat(permutations[:1], 12, axis=0))
    both = np.concatenate([rotations, -rotations])
    return PointGroup("D∞h", both, np.repeat(permutations, 12, axis=0))


def _base_pair(positions: ndarray, labels: ndarray, symprec: float) -> tuple[int, int]:
    """Two atoms far from the centroid and from one line with it, of kinds that are rare."""
    radius = np.linalg.norm(positions, axis=1)
    shell = shells(radius, labels, symprec)
    count = np.bincount(shell)[shell]
    first = int(np.where(2 * radius >= radius.max(), count, np.inf).argmin())
    across = np.linalg.norm(np.cross(positions, positions[first] / radius[first]), axis=1)
    return first, int(np.where(2 * across >= across.max(), count, np.inf).argmin())


def _candidates(
    positions: ndarray, labels: ndarray, pair: tuple[int, int], symprec: float
) -> Float[ndarray, "candidates 3 3"]:
    """The maps of the pair onto every pair like it, two for each."""
    radius, (first, second) = np.linalg.norm(positions, axis=1), pair
    places = [
        np.flatnonzero((labels == labels[atom]) & (abs(radius - radius[atom]) <= symprec))
        for atom in pair
    ]
    i, j = (grid.ravel() for grid in np.meshgrid(*places))
    length = np.linalg.norm(positions[first] - positions[second])
    alike = abs(np.linalg.norm(positions[i] - positions[j], axis=1) - length) <= 2 * symprec
    start = _frames(positions[[first]], positions[[second]])
    ends = _frames(positions[i[alike]], positions[j[alike]])
    mirrored = ends * np.array([1.0, 1.0, -1.0])[:, None]
    return np.asarray(np.concatenate([ends, mirrored]).mT @ start)


def _frames(first: ndarray, second: ndarray) -> Float[ndarray, "pairs 3 3"]:
    """Rows: towards the first atom, across to the side of the second, normal to both."""
    along = first / np.linalg.norm(first, axis=1, keepdims=True)
    normal = np.cross(along, second)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-300)
    return np.stack([along, np.cross(normal, along), normal], axis=1)


def _fitted(positions: ndarray, rotations: ndarray, match: Match) -> tuple[ndarray, ndarray]:
    """The maps that permute the atoms, without repetition, each fitted to all atoms (Kabsch).

    The determinant stays that of the candidate: a planar molecule fits either as well.
    """
    permutations = match(positions @ rotations.mT)[0]
    sign = np.where(np.linalg.det(rotations) > 0, 1, -1)
    keys = np.column_stack([sign, permutations])[bijective(permutations)]
    sign, permutations = np.split(np.unique(keys, axis=0), [1], axis=1)
    left, _, right = np.linalg.svd(positions[permutations].mT @ positions)
    left[:, :, 2] *= sign * (np.linalg.det(left) * np.linalg.det(right))[:, None]
    return left @ right, permutations


def _distance(gap: ndarray) -> Float[ndarray, " operations"]:
    return np.asarray(np.linalg.norm(gap, axis=2).max(axis=1))


def _products(
    rotations: ndarray, permutations: ndarray, pair: tuple[int, int]
) -> Int[ndarray, "operations operations"]:
    """Place of g after h, -1 if it is not there; the images of the pair and the sign tell."""
    n_atoms, sign = permutations.shape[1], np.linalg.det(rotations) > 0
    first, second = permutations[:, pair].T
    own = (first * n_atoms + second) * 2 + sign
    after = (permutations[:, first] * n_atoms + permutations[:, second]) * 2
    after += sign[:, None] == sign
    order = np.argsort(own)
    place = order[np.searchsorted(own, after, sorter=order).clip(max=len(own) - 1)]
    return np.where(own[place] == after, place, -1)


def _exact(rotations: ndarray, products: ndarray) -> Float[ndarray, "operations 3 3"]:
    """Rotations that multiply as the table says, to rounding."""
    for _ in range(SWEEPS):
        mean = (rotations[products] @ rotations.mT).mean(axis=1)
        left, _, right = np.linalg.svd(mean)
        rotations = left @ right
    return rotations


def _schoenflies(rotations: ndarray) -> str:
    """Symbol of a finite point group: its size, highest axis and mirrors tell."""
    trace, proper = np.trace(rotations, axis1=1, axis2=2), np.linalg.det(rotations) > 0
    angles = np.arccos(((trace[proper] - 1) / 2).clip(-1, 1))
    n = round(2 * np.pi / angles[angles > IDENTICAL].min(initial=2 * np.pi))
    n_proper, n_mirrors = proper.sum(), (~proper & (abs(trace - 1) < IDENTICAL)).sum()
    chiral = n_proper == len(rotations)
    if n_proper > 2 * n:
        ending = "d" if n_mirrors == 6 else "h"
        return {12: "T", 24: "O", 60: "I"}[int(n_proper)] + ("" if chiral else ending)
    if n_proper == 2 * n:
        ending = "h" if n_mirrors == n + 1 else "d"
        return f"D{n}" + ("" if chiral else ending)
    if chiral:
        return f"C{n}"
    if n == 1:
        return "Cs" if n_mirrors else "Ci"
    return {0: f"S{2 * n}", 1: f"C{n}h"}.get(int(n_mirrors), f"C{n}v")
