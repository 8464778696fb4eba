"""From an unstable crystal down into subgroups of its group, to a tree of minima.

Each unstable mode at Gamma, at a point with -q = q or at an end of the path (K of a hexagonal
crystal) moves it along directions that keep as many operations as possible; there it relaxes in the
group that is left. The new structure counts if its
energy is lower by more than two standard errors, in the same frames; where it is unstable itself,
the descent goes on.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy import ndarray
from torch import Tensor

from coset.potential import ModelPotential, Potential
from coset.structures import Structures, repeat
from coset.symmetry.average import averaged_properties, sample_rules
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import Primitive, unreduced
from coset.workflows.observers import Step
from coset.workflows.phonons.instability import (
    MAX_ATOMS,
    SMALLEST_DROP,
    SYMPREC,
    commensurate,
    directions,
    follow,
    mode_displacements,
)
from coset.workflows.phonons.mesh import Mesh, irreducible_points, one_of_each_star
from coset.workflows.phonons.modes import errors_in_thz, in_thz
from coset.workflows.phonons.stability import Stability
from coset.workflows.phonons.verdict import found_at
from coset.workflows.relax import relax
from coset.workflows.relaxation import TIGHT, Progress, Relaxation

MAX_DEPTH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimum:
    """A structure below an unstable one.

    parent: its place in the tree, -1 for the crystal itself. q: of the mode, in the primitive cell
    of the crystal; Gamma below the first level. drop, drop_error: eV per atom, from the parent.
    accepted: lower by more than two standard errors. verdict: on its own modes at Gamma, "" where
    that is not known.
    """

    parent: int
    q: tuple[float, float, float]
    structures: Structures
    space_group: int | None
    drop: float
    drop_error: float
    accepted: bool
    verdict: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Instability:
    """The softest mode of a wave vector where some are imaginary by more than their error.

    n_modes: how many are. outcomes: of each direction that was followed.
    """

    q: tuple[float, float, float]
    frequency_THz: float
    error_THz: float
    n_modes: int
    outcomes: tuple[str, ...]


def descend(
    stability: Stability, ends: Float[ndarray, "points 3"], level: str, frames: int
) -> tuple[tuple[Instability, ...], tuple[Minimum, ...]]:
    """The instabilities of a crystal and the tree of minima below it, parents first.

    ends: wave vectors to look at, besides Gamma and those with -q = q. level: of averaging.
    """
    halves, _ = irreducible_points((2, 2, 2), stability.action)
    points = one_of_each_star(np.concatenate([halves, ends]), stability.action)
    matrices = stability.direct(points)
    found = stability.modes_of(matrices, points)
    below_zero = found.values + stability.quantile * found.errors < 0.0
    tree: list[Minimum] = []
    listed = []
    for place in np.flatnonzero(below_zero.any(axis=1)):
        at = found_at(found, int(place))
        softest = int(at.values[0].argmin())
        x, y, z = (round(float(k), 12) + 0.0 for k in points[place])
        walk = _Walk(stability.potential, level, frames, (x, y, z), tree, stability.step)
        listed.append(
            Instability(
                q=(x, y, z),
                frequency_THz=float(in_thz(at.values)[0, softest]),
                error_THz=float(errors_in_thz(at)[0, softest]),
                n_modes=int(below_zero[place].sum()),
                outcomes=_outcomes(stability, walk, points[place], matrices[:, place].mean(axis=0)),
            )
        )
    return tuple(listed), tuple(tree)


def _outcomes(
    stability: Stability,
    walk: "_Walk",
    q: Float[ndarray, "3"],
    matrix: Complex[ndarray, "dim dim"],
) -> tuple[str, ...]:
    """What lies along each of the most symmetric directions of the softest modes."""
    one, masses = stability.primitive.structures, stability.dynamics.masses
    cells = commensurate(q)
    if cells is None:
        return ("not followed: no small supercell holds its wave",)
    if (n_atoms := int(np.prod(cells)) * len(one.atomic_numbers)) > MAX_ATOMS:
        return (f"not followed: its supercell has {n_atoms} atoms, at most {MAX_ATOMS} are",)
    return tuple(
        walk.down(
            stability.primitive, mode_displacements(one, q, vector, masses, cells), cells, (-1, 0)
        )
        for vector in directions(stability.primitive, masses, matrix, q, cells)
    )


@dataclass(frozen=True, slots=True)
class _Walk:
    potential: Potential
    level: str
    frames: int
    q: tuple[float, float, float]
    tree: list[Minimum]
    step: Step

    def down(
        self,
        above: Primitive,
        displacements: Float[Tensor, "images 3"],
        cells: Mesh,
        place: tuple[int, int],
    ) -> str:
        """Add what lies below `above` along one mode, and say what that is.

        place: of the parent, and depth.
        """
        parent, depth = place
        rules = sample_rules(above.structures, above.group, self.level, self.frames)
        found = follow(self.potential, above, rules, displacements, cells, self.step)
        if not found.is_real:
            return "the energy along it falls by no more than its error"
        relaxed = self._relaxed(found.cell)
        if relaxed.structures is None or relaxed.status in ("failed", "rejected"):
            return f"its relaxation failed: {relaxed.reason}"
        drops = self._drops(repeat(above.structures, cells), relaxed.structures)
        error = float(drops.std(ddof=1)) / len(drops) ** 0.5 if len(drops) > 1 else 0.0
        n_atoms = len(relaxed.structures.atomic_numbers)
        drop = float(drops.mean())
        accepted = drop > max(2.0 * error, SMALLEST_DROP)
        stability = relaxed.stability
        self.tree.append(
            Minimum(
                parent=parent,
                q=self.q,
                structures=relaxed.structures,
                space_group=relaxed.space_group_after,
                drop=drop / n_atoms,
                drop_error=error / n_atoms,
                accepted=accepted,
                verdict="" if stability is None else stability.verdict,
                reason=relaxed.reason,
            )
        )
        own = len(self.tree) - 1
        if stability is None or stability.mode is None or stability.verdict != "unstable":
            return f"minimum {own}"
        if accepted and depth + 1 < MAX_DEPTH:
            child = unreduced(relaxed.structures, find_group(relaxed.structures, 1e-5))
            mode = torch.from_numpy(stability.mode)
            mode = mode / torch.linalg.vector_norm(mode, dim=1).max()
            if len(mode) == n_atoms:
                self.down(child, mode, (1, 1, 1), (own, depth + 1))
        return f"minimum {own}"

    def _relaxed(self, start: Structures) -> Relaxation:
        """Relaxed in its group, and again if what it comes to has a larger one."""
        exact = isinstance(self.potential, ModelPotential)
        settings = replace(TIGHT, symprec=SYMPREC, average=self.level, check_stability=exact)
        while True:
            (one,) = relax(self.potential, start, settings, observer=self.relaxing)
            if one.structures is None or one.status in ("failed", "rejected"):
                return one
            if find_group(one.structures, SYMPREC).order <= find_group(start, SYMPREC).order:
                return one
            start = one.structures

    def relaxing(self, progress: Progress) -> bool:
        """Stops only by what `step` raises."""
        self.step(f"structure {len(self.tree) + 1} below, {progress.note}")
        return False

    def _drops(self, above: Structures, below: Structures) -> Float[ndarray, " frames"]:
        """Energy lost in each frame of one rule, that of the group below."""
        group = find_group(below, 1e-5)
        losses = []
        self.step("energies of what was found")
        for rule in sample_rules(below, group, self.level, self.frames):
            high, low = (averaged_properties(self.potential, x, [rule]) for x in (above, below))
            assert high.energy is not None
            assert low.energy is not None
            losses.append(float(high.energy[0] - low.energy[0]))
        return np.array(losses)
