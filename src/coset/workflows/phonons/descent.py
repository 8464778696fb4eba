"""From an unstable crystal down into subgroups of its group, to a tree of minima.

Each unstable mode at Gamma or a zone boundary moves the crystal along directions that keep as many
operations as possible; there it relaxes in the group that is left. The new structure counts if its
energy is lower by more than two standard errors, in the same frames; where it is unstable itself,
the descent goes on.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from coset.potential import ModelPotential, Potential
from coset.structures import Structures, repeat
from coset.symmetry.average import averaged_properties, sample_rules
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import Primitive, unreduced
from coset.workflows.phonons.instability import (
    MAX_ATOMS,
    SMALLEST_DROP,
    SYMPREC,
    Step,
    commensurate,
    directions,
    follow,
    mode_displacements,
)
from coset.workflows.phonons.mesh import Mesh, irreducible_points
from coset.workflows.phonons.stability import Stability
from coset.workflows.relax import relax
from coset.workflows.relaxation import TIGHT, Progress

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


def descend(stability: Stability, level: str, frames: int) -> tuple[Minimum, ...]:
    """The tree of minima below a crystal, parents first; level: of averaging."""
    tree: list[Minimum] = []
    for q, displacements, cells in _starts(stability):
        walk = _Walk(stability.potential, level, frames, q, tree, stability.step)
        walk.down(stability.primitive, displacements, cells, (-1, 0))
    return tuple(tree)


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
    ) -> None:
        """Add what lies below `above` along one mode; place: of the parent, and depth."""
        parent, depth = place
        rules = sample_rules(above.structures, above.group, self.level, self.frames)
        found = follow(self.potential, above, rules, displacements, cells, self.step)
        if not found.is_real:
            return
        settings = replace(TIGHT, symprec=SYMPREC, average=self.level)
        exact = isinstance(self.potential, ModelPotential)
        (relaxed,) = relax(
            self.potential,
            found.cell,
            replace(settings, check_stability=exact),
            observer=self.relaxing,
        )
        if relaxed.structures is None or relaxed.status in ("failed", "rejected"):
            return
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
        if stability is None or stability.mode is None or stability.verdict != "unstable":
            return
        if accepted and depth + 1 < MAX_DEPTH:
            child = unreduced(relaxed.structures, find_group(relaxed.structures, 1e-5))
            mode = torch.from_numpy(stability.mode)
            mode = mode / torch.linalg.vector_norm(mode, dim=1).max()
            if len(mode) == n_atoms:
                self.down(child, mode, (1, 1, 1), (len(self.tree) - 1, depth + 1))

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


def _starts(
    stability: Stability,
) -> list[tuple[tuple[float, float, float], Float[Tensor, "images 3"], Mesh]]:
    """Unstable modes at Gamma and where -q is q, each along its most symmetric directions."""
    points, _ = irreducible_points((2, 2, 2), stability.action)
    found = stability.direct_modes(points)
    unstable = found.values + stability.quantile * found.errors < 0.0
    result = []
    one, masses = stability.primitive.structures, stability.dynamics.masses
    for place in np.flatnonzero(unstable.any(axis=1)):
        q = points[place]
        cells = commensurate(q)
        if cells is None or int(np.prod(cells)) * len(one.atomic_numbers) > MAX_ATOMS:
            continue
        matrix = stability.direct(q[None]).mean(axis=0)[0]
        x, y, z = (float(k) for k in q)
        result += [
            ((x, y, z), mode_displacements(one, q, vector, masses, cells), cells)
            for vector in directions(stability.primitive, masses, matrix, q, cells)
        ]
    return result
