"""The verdict on a crystal: all wave vectors, then what an imaginary frequency has to survive."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Complex, Float
from numpy import ndarray

from coset.edge_model import Quadrature
from coset.potential import Potential
from coset.symmetry.average import sample_rules
from coset.symmetry.primitive import Primitive
from coset.workflows.observers import Step
from coset.workflows.phonons.dynamics import Dynamics
from coset.workflows.phonons.instability import (
    MAX_ATOMS,
    commensurate,
    directions,
    follow,
    mode_displacements,
)
from coset.workflows.phonons.mesh import (
    Action,
    Evaluate,
    Mesh,
    irreducible_points,
    star_average,
)
from coset.workflows.phonons.modes import Modes, eigenvalues, is_gamma, modes, quantile
from coset.workflows.phonons.samples import exact_evaluator
from coset.workflows.phonons.verdict import Verdict, first_verdict

NEXT_LEVEL = {
    "none": "project",
    "project": "standard",
    "light": "standard",
    "standard": "tight",
    "tight": "reference",
    "reference": "",
}
STARTS = 5
HALVINGS = 7
NEAREST = 0.02
"""Fraction of a reciprocal vector: closer to Gamma the search does not go, where lambda/q² is
constant and rounding is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """What the verdict is made from; evaluate: D(q) of the samples without interpolation.

    step: told what is done next; raises to stop.
    """

    potential: Potential
    primitive: Primitive
    action: Action
    rules: tuple[Quadrature, ...]
    dynamics: Dynamics
    evaluate: Evaluate | None
    supercell: Mesh
    level: str
    step: Step

    @property
    def quantile(self) -> float:
        """Standard errors that count as certain."""
        return quantile(len(self.dynamics.samples.blocks))

    def direct(self, q: Float[ndarray, "points 3"]) -> Complex[ndarray, "samples points dim dim"]:
        """Star-averaged D(q), interpolated where there are no exact derivatives."""
        if self.evaluate is None or self.dynamics.analytic is not None:
            return self.dynamics.matrices(q)
        found = star_average(self.evaluate, q, self.action)
        return np.asarray((found + found.conj().swapaxes(-1, -2)) / 2)

    def direct_modes(self, q: Float[ndarray, "points 3"]) -> Modes:
        """Modes without interpolation."""
        return self.modes_of(self.direct(q), q)

    def modes_of(
        self,
        matrices: Complex[ndarray, "samples points dim dim"],
        q: Float[ndarray, "points 3"],
    ) -> Modes:
        """Modes of what `direct` returns."""
        dynamics = self.dynamics
        doubt = None if dynamics.doubt is None else dynamics.doubt.matrices(q)[0]
        return modes(matrices, q, dynamics.masses, dynamics.noise, doubt)


def verdict(
    stability: Stability,
    path: tuple[Float[ndarray, "points 3"], Modes],
    mesh: Float[ndarray, "others 3"],
) -> Verdict:
    """The verdict on all wave vectors of the path, the mesh, the supercell, and the minima."""
    dynamics = stability.dynamics
    own, _ = irreducible_points(stability.supercell, stability.action)
    lowest = _minima(dynamics, mesh)
    found = [path[1], *(dynamics.modes(q) for q in (mesh, own, lowest))]
    every = Modes(
        values=np.concatenate([part.values for part in found]),
        errors=np.concatenate([part.errors for part in found]),
    )
    first = first_verdict(np.concatenate([path[0], mesh, own, lowest]), every, stability.quantile)
    if first.kind == "stable":
        return first
    point = np.array([first.q])
    again = first_verdict(point, stability.direct_modes(point), stability.quantile)
    if again.kind == "stable":
        reason = "interpolated frequencies fall below their error where direct ones do not"
        return replace(again, kind="undecided", reason=reason, settle="a larger supercell")
    if again.kind == "undecided":
        return replace(again, settle=_more(stability))
    return _examined(stability, again, np.concatenate([own, *_ends(path[0])]))


def _more(stability: Stability) -> str:
    level = NEXT_LEVEL[stability.level]
    return f"--average {level}" if level else "more frames, or a better model"


def _ends(points: Float[ndarray, "points 3"]) -> list[Float[ndarray, "1 3"]]:
    """Wave vectors of small denominators."""
    return [q[None] for q in points if commensurate(q) is not None]


def _examined(
    stability: Stability, first: Verdict, candidates: Float[ndarray, "points 3"]
) -> Verdict:
    """`unstable` if the most unstable commensurate mode survives all tests, else `undecided`."""
    n_atoms = len(stability.primitive.structures.atomic_numbers)
    small = np.array(
        [
            (cells := commensurate(q)) is not None and np.prod(cells) * n_atoms <= MAX_ATOMS
            for q in candidates
        ]
    )
    undecided = replace(first, kind="undecided")
    if not small.any():
        return replace(undecided, reason="no small supercell holds it", settle="a larger supercell")
    q = candidates[small]
    found = stability.dynamics.modes(q)
    worst = first_verdict(q, found, stability.quantile)
    if worst.kind != "unstable":
        reason = "it is imaginary only where no small supercell holds its wave"
        return replace(undecided, reason=reason, settle="a larger supercell")
    point = np.array([worst.q])
    matrices = stability.direct(point)
    sure = first_verdict(point, stability.modes_of(matrices, point), stability.quantile)
    if sure.kind != "unstable":
        reason = "direct derivatives contradict the interpolated ones"
        return replace(sure, kind="undecided", reason=reason, settle="a larger supercell")
    if (higher := _at_higher_level(stability, point)) is not None and higher > 0.0:
        reason = "it is real at the next level of averaging"
        return replace(sure, kind="undecided", reason=reason, settle=_more(stability))
    return _followed(stability, sure, matrices.mean(axis=0)[0])


def _at_higher_level(stability: Stability, point: Float[ndarray, "1 3"]) -> float | None:
    """Lowest lambda with one rule of the next level; None without exact derivatives or levels."""
    level = NEXT_LEVEL[stability.level]
    if stability.evaluate is None or not level:
        return None
    primitive, masses = stability.primitive, stability.dynamics.masses
    rules = sample_rules(primitive.structures, primitive.group, level, 1, 1)
    evaluate = exact_evaluator(stability.potential, primitive.structures, rules, masses)
    matrices = star_average(evaluate, point, stability.action)
    return float(eigenvalues(matrices, point, masses).min())


def _followed(stability: Stability, sure: Verdict, matrix: Complex[ndarray, "dim dim"]) -> Verdict:
    """Follow the mode down."""
    q, masses = np.array(sure.q), stability.dynamics.masses
    cells = commensurate(q)
    assert cells is not None
    vector = directions(stability.primitive, masses, matrix, q, cells)[0]
    moved = mode_displacements(stability.primitive.structures, q, vector, masses, cells)
    found = follow(
        stability.potential, stability.primitive, stability.rules, moved, cells, stability.step
    )
    known = replace(sure, amplitude=found.amplitude, drop=found.drop, drop_error=found.drop_error)
    if found.is_real:
        return replace(known, reason="an imaginary mode lowers the energy")
    reason = "the energy along the imaginary mode falls by no more than its error"
    if not found.falls:
        reason = "the energy along the imaginary mode rises at small amplitudes"
    return replace(known, kind="undecided", reason=reason, settle=_more(stability))


def _minima(dynamics: Dynamics, mesh: Float[ndarray, "points 3"]) -> Float[ndarray, "starts 3"]:
    """Local minima of lambda_1(q)/sum sin²(pi q), a sound velocity near Gamma, from five points."""
    away = mesh[~is_gamma(mesh)]
    if not len(away):
        return np.full((1, 3), 0.5)
    points = away[np.argsort(_softness(dynamics, away), kind="stable")[:STARTS]]
    lowest = _softness(dynamics, points)
    steps = np.indices((3, 3, 3)).reshape(3, -1).T - 1.0
    width = 0.05
    for _ in range(HALVINGS):
        near = points[:, None] + width * steps
        values = _softness(dynamics, near.reshape(-1, 3)).reshape(near.shape[:2])
        best = values.argmin(axis=1)
        rows = np.arange(len(points))
        better = values[rows, best] < lowest
        points = np.where(better[:, None], near[rows, best], points)
        lowest = np.where(better, values[rows, best], lowest)
        width = width if better.any() else width / 2
    return np.asarray(points)


def _softness(dynamics: Dynamics, q: Float[ndarray, "points 3"]) -> Float[ndarray, " points"]:
    mean = dynamics.matrices(q).mean(axis=0)
    lowest = eigenvalues(mean, q, dynamics.masses).min(axis=1)
    centered = np.abs(q - np.rint(q)).max(axis=1)
    scale = (np.sin(np.pi * q) ** 2).sum(axis=1)
    softness = lowest / np.maximum(scale, 1e-30)
    return np.where(centered < NEAREST, np.inf, softness)
