"""D(q), modes and thermal energies of a crystal whose force constants are known in samples."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float
from numpy import ndarray

from coset.structures import Structures
from coset.workflows.phonons.by_phonopy import Lattice, lattice_of
from coset.workflows.phonons.interpolation import Interpolation, interpolation
from coset.workflows.phonons.modes import Modes, eigenvalues, modes
from coset.workflows.phonons.samples import Samples, mass_roots

DOUBLE_NOISE = 1e-9
"""Of the largest squared frequency: the rounding of exact derivatives in float64."""

CHUNK = 256
"""Wave vectors at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dynamics:
    """Interpolated samples with their masses (amu) and errors.

    doubt: the numerical error of the mean, known only where it varies with q. noise: the constant
    part, eV/Å²/amu. lattices: without and with polar terms, None without Born charges.
    """

    masses: Float[ndarray, " atoms"]
    samples: Interpolation
    doubt: Interpolation | None
    noise: float
    lattice: Lattice
    analytic: Lattice | None

    def matrices(
        self, q: Float[ndarray, "points 3"], directions: Float[ndarray, "points 3"] | None = None
    ) -> Complex[ndarray, "samples points dim dim"]:
        """D(q) of every sample; with polar terms, at Gamma along the direction given."""
        found = self.samples.matrices(q)
        if self.analytic is None:
            return found
        polar = self.lattice.matrices(q, directions) - self.analytic.matrices(q)
        return np.asarray(found + polar)

    def modes(
        self, q: Float[ndarray, "points 3"], directions: Float[ndarray, "points 3"] | None = None
    ) -> Modes:
        """Squared frequencies with errors."""
        parts = []
        for first in range(0, len(q), CHUNK):
            part = slice(first, first + CHUNK)
            own = None if directions is None else directions[part]
            doubt = None if self.doubt is None else self.doubt.matrices(q[part])[0]
            matrices = self.matrices(q[part], own)
            parts.append(modes(matrices, q[part], self.masses, self.noise, doubt))
        return Modes(
            values=np.concatenate([part.values for part in parts]),
            errors=np.concatenate([part.errors for part in parts]),
        )

    def sample_values(
        self, q: Float[ndarray, "points 3"]
    ) -> Float[ndarray, "samples points branches"]:
        """Squared frequencies of each sample by itself."""
        parts = [q[first : first + CHUNK] for first in range(0, len(q), CHUNK)]
        found = [eigenvalues(self.matrices(part), part, self.masses) for part in parts]
        return np.concatenate(found, axis=1)


def dynamics_of(
    primitive: Structures, samples: Samples, masses: Float[ndarray, " atoms"], born: str | None
) -> Dynamics:
    """From force constants; born: text of a BORN file, for polar terms."""
    roots, mesh = mass_roots(masses), samples.mesh
    mean = samples.force_constants.mean(axis=0)
    lattice = lattice_of(primitive, mesh, mean, born)
    doubt = samples.doubt
    # The block of the first cell on itself is the mean of D(q) over the zone.
    largest = np.abs(np.linalg.eigvalsh(mean[0] / roots)).max()
    return Dynamics(
        masses=masses,
        samples=interpolation(primitive, mesh, samples.force_constants / roots),
        doubt=None if doubt is None else interpolation(primitive, mesh, doubt[None] / roots),
        noise=max(DOUBLE_NOISE * float(largest), samples.asymmetry),
        lattice=lattice,
        analytic=None if born is None else lattice_of(primitive, mesh, mean),
    )
