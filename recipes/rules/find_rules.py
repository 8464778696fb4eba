"""Find and check the quadrature rules that stand in src/coset/symmetry/rules.json.

    python recipes/rules/find_rules.py --output src/coset/symmetry/rules.json  # all of them
    python recipes/rules/find_rules.py D4 5 C5 2  # a smaller one?

A rule for the group G whose nodes are whole orbits H R_k of a left group H solves

    sum_k w_k V_H^T D^l(R_k) V_G = 0,   1 <= l <= degree,

with V_H, V_G orthonormal columns that span the invariants of H and G among the real harmonics of
degree l: n_H(l) n_G(l) equations each, for 4 n_base - 1 unknowns. Levenberg-Marquardt from random
starts, steps R_k exp(delta), weights at least MIN_WEIGHT / n_base. Of several solutions the one
with the smallest residual beyond its degree is kept,

    score = sum_j DECAY^-j rho_(degree + j),   rho_l = |sum_k w_k D^l(R_k) P_G|^2 / n_G(l),

because rho_l is what is left of the power of degree l, averaged over random offsets of the rule.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from numpy.polynomial.legendre import legval
from scipy.spatial.transform import Rotation

from coset.symmetry.rules import rotation_group

MIN_WEIGHT = 0.25
EXACT = 1e-15
SOLVED = 1e-13
STEPS = 1000
SCORED_DEGREES = 3
DECAY = 5.0  # of the power per degree, about what trained models show
SEARCHES = (
    # group, degree, left group, nodes before the left group acts
    ("O", 3, "C1", 1),
    ("O", 5, "D2", 1),
    ("O", 7, "C1", 7),
    ("O", 9, "C5", 3),
    ("I", 5, "C1", 1),
    ("I", 9, "C1", 5),
    ("D6", 3, "C1", 3),
    ("D6", 5, "C1", 6),
    ("D6", 7, "C1", 17),
    ("D6", 9, "C1", 28),
    ("D4", 3, "C1", 3),
    ("D4", 5, "C1", 11),
    ("D4", 7, "C1", 20),
    ("D4", 9, "C5", 8),
    ("C6", 7, "C2", 16),
    ("C1", 3, "C1", 23),
)


@dataclass(frozen=True)
class Solution:
    """Base nodes R_k with weights of sum 1, the largest violated equation, the score."""

    nodes: Rotation
    weights: ndarray
    violation: float
    score: float = np.inf


@dataclass(frozen=True)
class Rule:
    """What is written down: nodes are h R_k for h in the left group, at the weight of R_k."""

    group: str
    degree: int
    left: str
    nodes: Rotation
    weights: ndarray


@dataclass(frozen=True)
class Sector:
    """Harmonics of one degree: generators of rotations, invariants of both groups as columns."""

    degree: int
    generators: ndarray
    left: ndarray
    right: ndarray


@dataclass(frozen=True)
class Problem:
    """A rule to be found: sectors with equations, and those beyond that tell good from better."""

    killed: tuple[Sector, ...]
    beyond: tuple[Sector, ...]


def main() -> None:
    """Search what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("search", nargs="*", help="GROUP DEGREE LEFT_GROUP N_BASE (default: all)")
    parser.add_argument("--starts", type=int, default=20, help="random starts of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file to write")
    args = parser.parse_args()
    searches = SEARCHES
    if args.search:
        group, degree, left, n_base = args.search
        searches = ((group, int(degree), left, int(n_base)),)
    found = [find(*search, n_starts=args.starts, seed=args.seed) for search in searches]
    rules = [rule for rule in found if rule]
    if args.output:
        args.output.write_text(as_text(rules), encoding="utf-8")


def find(
    group: str, degree: int, left: str, n_base: int, *, n_starts: int, seed: int
) -> Rule | None:
    """The best rule that the starts lead to, checked and reported; None if there is none."""
    rng = np.random.default_rng(seed)
    problem = make_problem(group, degree, left)
    solutions = [solve(problem, n_base, rng) for _ in range(n_starts)]
    found = [one for one in solutions if one.violation < SOLVED]
    name = f"{group} degree {degree}, {len(rotation_group(left)) * n_base} nodes ({left})"
    if not found:
        sys.stdout.write(f"{name}: nothing from {n_starts} starts\n")
        return None
    best = min(found, key=lambda one: one.score)
    nodes = best.nodes
    if left == "C1":
        nodes = nodes[0].inv() * nodes
    killed, kept = residuals(group, degree, left, nodes, best.weights)
    if killed > 1e-13 or kept < 1e-3:
        raise ValueError(f"{name}: residual {killed:.1e} up to its degree, {kept:.1e} beyond")
    sys.stdout.write(
        f"{name}: {len(found)} of {n_starts} starts, score {best.score:.3f} of "
        f"{max(one.score for one in found):.3f}, residual {killed:.1e}, beyond {kept:.2f}\n"
    )
    return Rule(group, degree, left, nodes, best.weights)


def make_problem(group: str, degree: int, left: str) -> Problem:
    """The equations of a search."""
    sectors = []
    for l in range(1, degree + SCORED_DEGREES + 1):  # noqa: E741
        generators = harmonic_generators(l)
        columns = (invariants(l, generators, name) for name in (left, group))
        sectors.append(Sector(l, generators, *columns))
    live = [one for one in sectors if one.left.size and one.right.size]
    return Problem(
        tuple(one for one in live if one.degree <= degree),
        tuple(one for one in live if one.degree > degree),
    )


def solve(problem: Problem, n_base: int, rng: np.random.Generator) -> Solution:
    """Levenberg-Marquardt from one random start."""
    nodes, logits = Rotation.random(n_base, random_state=rng), 0.3 * rng.normal(size=n_base)
    r, J = equations(problem, nodes, logits)
    damping = 1e-2
    for _ in range(STEPS):
        if np.abs(r).max(initial=0.0) < EXACT or damping > 1e6:
            break
        rows = np.concatenate([J, np.sqrt(damping) * np.eye(J.shape[1])])
        target = np.concatenate([-r, np.zeros(J.shape[1])])
        step = np.linalg.lstsq(rows, target, rcond=None)[0]
        turns, shifts = step[: 3 * n_base].reshape(n_base, 3), step[3 * n_base :]
        moved = nodes * Rotation.from_rotvec(turns), logits + shifts
        new_r, new_J = equations(problem, *moved)
        if new_r @ new_r < r @ r:
            (nodes, logits), r, J = moved, new_r, new_J
            damping = max(damping / 5, 1e-14)
        else:
            damping *= 4
    weights = softened(logits)[0]
    score = 0.0
    for sector in problem.beyond:
        left = sector.left.T @ wigner(sector.degree, sector.generators, nodes.as_rotvec())
        mean = np.einsum("k,kij->ij", weights, left @ sector.right)
        lag = sector.degree - problem.beyond[0].degree
        score += DECAY**-lag * float((mean**2).sum()) / sector.right.shape[1]
    return Solution(nodes, weights, float(np.abs(r).max(initial=0.0)), score)


def equations(problem: Problem, nodes: Rotation, logits: ndarray) -> tuple[ndarray, ndarray]:
    """Residuals and their derivatives with respect to turns of the nodes and to the logits."""
    weights, by_logits = softened(logits)
    residual, jacobian = [np.zeros(0)], [np.zeros((0, 4 * len(logits)))]
    for sector in problem.killed:
        left = sector.left.T @ wigner(sector.degree, sector.generators, nodes.as_rotvec())
        values = (left @ sector.right).reshape(len(logits), -1)
        turned = np.einsum("kij,ajm,mn->kain", left, sector.generators, sector.right)
        by_turns = weights[:, None, None] * turned.reshape(len(logits), 3, -1)
        residual.append(weights @ values)
        by_turns = by_turns.reshape(3 * len(logits), -1)
        jacobian.append(np.concatenate([by_turns, by_logits.T @ values]).T)
    return np.concatenate(residual), np.concatenate(jacobian)


def softened(logits: ndarray) -> tuple[ndarray, ndarray]:
    """Weights of sum 1, at least MIN_WEIGHT / n, and their derivatives [weights, logits]."""
    share = np.exp(logits - logits.max())
    share /= share.sum()
    weights = MIN_WEIGHT / len(logits) + (1 - MIN_WEIGHT) * share
    return weights, (1 - MIN_WEIGHT) * (np.diag(share) - np.outer(share, share))


def harmonic_generators(degree: int) -> ndarray:
    """Generators of rotations about x, y, z on real harmonics, antisymmetric: [3, 2l+1, 2l+1]."""
    m = np.arange(-degree, degree + 1)
    raising = np.diag(np.sqrt(degree * (degree + 1) - m[:-1] * (m[:-1] + 1)), -1)
    momentum = np.array([(raising + raising.T) / 2, (raising - raising.T) / 2j, np.diag(m)])
    to_real = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=complex)
    to_real[degree, degree] = 1
    for k in range(1, degree + 1):
        sign = (-1) ** k
        to_real[degree + k, [degree + k, degree - k]] = np.array([sign, 1]) / 2**0.5
        to_real[degree - k, [degree + k, degree - k]] = np.array([-1j * sign, 1j]) / 2**0.5
    return np.asarray((to_real @ (-1j * momentum) @ to_real.conj().T).real)


def wigner(degree: int, generators: ndarray, rotation_vectors: ndarray) -> ndarray:
    """D^l = exp(v . L) of rotation vectors v: [nodes, 2l+1, 2l+1]."""
    angle = np.linalg.norm(rotation_vectors, axis=1)
    safe = np.where(angle > 0, angle, 1.0)
    axis = np.where(angle[:, None] > 0, rotation_vectors / safe[:, None], (0.0, 0.0, 1.0))
    vectors = np.linalg.eigh(1j * np.einsum("ka,aij->kij", axis, generators))[1]
    phase = np.exp(-1j * angle[:, None] * np.arange(-degree, degree + 1))
    return np.asarray(((vectors * phase[:, None]) @ vectors.conj().swapaxes(1, 2)).real)


def invariants(degree: int, generators: ndarray, group: str) -> ndarray:
    """Orthonormal columns that span the invariants of a group among harmonics of one degree."""
    turns = Rotation.from_matrix(rotation_group(group).numpy()).as_rotvec()
    values, vectors = np.linalg.eigh(wigner(degree, generators, turns).mean(axis=0))
    return np.asarray(vectors[:, values > 0.5])


def residuals(
    group: str, degree: int, left: str, nodes: Rotation, weights: ndarray
) -> tuple[float, float]:
    """Largest |mean_hg sum_k w_k P_l(a . h R_k g b)| up to the degree and at the next one.

    Over 2l + 2 random unit vectors a and b, which span all matrix elements of D^l: no Wigner matrix
    and no square, so it sees 1e-14.
    """
    rng = np.random.default_rng(1)
    H, G = rotation_group(left).numpy(), rotation_group(group).numpy()
    found = []
    for l in range(1, degree + 2):  # noqa: E741
        a, b = rng.normal(size=(2, 2 * l + 2, 3))
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        rows, columns = a @ H, np.einsum("gij,bj->gbi", G, b)
        cosines = np.einsum("hai,kij,gbj->hkgab", rows, nodes.as_matrix(), columns, optimize=True)
        mean = np.einsum("k,hkgab->ab", weights, legval(cosines, np.eye(l + 1)[l]))
        found.append(np.abs(mean).max() / len(H) / len(G))
    return max(found[:-1], default=0.0), found[-1]


def as_text(rules: list[Rule]) -> str:
    """JSON, with one line x, y, z, w, weight per base node."""
    parts = []
    for rule in rules:
        head = f'"group": "{rule.group}", "degree": {rule.degree}, "left": "{rule.left}"'
        table = np.column_stack([rule.nodes.as_quat(canonical=True), rule.weights]).tolist()
        lines = ",\n".join(f"    {json.dumps(row)}" for row in table)
        parts.append(f'  {{{head}, "nodes": [\n{lines}\n  ]}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


if __name__ == "__main__":
    main()
