"""An analytic potential, written without the code it is used to test."""

from dataclasses import dataclass

import numpy as np
import torch

from coset.structures import Properties, Structures, split

CUTOFF = 6.0


@dataclass
class LennardJones:
    """E = sum over pairs of 4 e [(s/r)^12 - (s/r)^6] - shift, cut at 6 Å, image by image."""

    epsilon: float = 0.4
    sigma: float = 2.6
    broken: int | None = None  # atomic number that makes the energy NaN
    noise: float = 0.0  # eV/Å, random forces without symmetry
    cutoff = CUTOFF
    elements = frozenset(range(1, 119))
    level_of_theory = "Lennard-Jones"

    def check_supported(self, structures: Structures) -> None:
        """Everything is supported."""

    def __call__(self, structures: Structures) -> Properties:
        """Energy, forces, stress and torque."""
        parts = [self._single(one) for one in split(structures)]
        energy, forces, stress = (
            torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True)
        )
        return Properties(
            energy=energy, forces=forces, stress=stress, torque=torch.zeros(len(structures), 3)
        )

    def _single(self, one: Structures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, cell = one.positions.numpy(), one.cell[0].numpy()
        numbers = []
        volume = abs(np.linalg.det(cell))
        for axis in range(3):
            height = volume / np.linalg.norm(np.cross(cell[axis - 1], cell[axis - 2]))
            span = np.ptp(np.linalg.solve(cell.T, x.T)[axis])
            numbers.append(int(np.ceil(CUTOFF / height + span)) if one.pbc[0, axis] else 0)
        grid = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in numbers]), -1).reshape(-1, 3)
        r = x[None, :, None] - x[:, None, None] + (grid @ cell)[None, None]
        d = np.linalg.norm(r, axis=-1)
        near = (d > 1e-9) & (d < CUTOFF)
        d = np.where(near, d, 1.0)
        s6, cut = (self.sigma / d) ** 6, (self.sigma / CUTOFF) ** 6
        pair = np.where(near, 4 * self.epsilon * (s6 * s6 - s6 - cut * cut + cut), 0.0)
        slope = np.where(near, 4 * self.epsilon * (-12 * s6 * s6 + 6 * s6) / d, 0.0)
        pull = (slope / d)[..., None] * r
        forces = pull.sum((1, 2))
        virial = 0.5 * np.einsum("ijka,ijkb->ab", pull, r)
        generator = np.random.default_rng(int(1e6 * abs(x).sum()) % 2**32)
        forces = forces + self.noise * generator.normal(size=forces.shape)
        energy = 0.5 * pair.sum()
        if self.broken in one.atomic_numbers.tolist():
            energy = np.nan
        return np.array([energy]), forces, virial[None] / volume
