"""Squared frequencies of several samples of D(q), with their errors.

lambda_j = eigenvalue of D̄ = mean of the samples,   e its eigenvector
delta lambda_j = e†(D_k - D̄) e for sample k, the mean over a degenerate group
s² = s_rot² + s_num²,   s_rot = sd(delta lambda_j)/sqrt(samples)
f = sign(lambda) sqrt|lambda| THZ_PER_ROOT
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Num
from numpy import ndarray
from scipy.special import stdtrit

from coset.units import THZ_PER_ROOT

DEGENERATE = 1e-6
"""Of the largest eigenvalue: closer ones are one group."""

AT_GAMMA = 1e-9

THREE_SIGMA = 0.99865
"""Of a normal distribution, one-sided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """Squared angular frequencies (eV/Å²/amu) in ascending order, with their standard errors s."""

    values: Float[ndarray, "points branches"]
    errors: Float[ndarray, "points branches"]


def modes(
    samples: Complex[ndarray, "samples points dim dim"],
    q: Float[ndarray, "points 3"],
    masses: Float[ndarray, " atoms"],
    noise: float,
    doubt: Complex[ndarray, "points dim dim"] | None = None,
) -> Modes:
    """Of the mean of the samples. At Gamma translations are exactly zero.

    s_num is the `noise` (eV/Å²/amu) and |e† doubt e|.
    """
    n_points, dim = samples.shape[1:3]
    doubts = np.zeros(samples.shape[1:]) if doubt is None else doubt
    values, errors, gamma = np.empty((n_points, dim)), np.empty((n_points, dim)), is_gamma(q)
    values[~gamma], errors[~gamma] = _solve(samples[:, ~gamma], doubts[~gamma], noise)
    if gamma.any():
        basis = vibrations(masses)
        inner, uncertain = (basis.T @ m @ basis for m in (samples[:, gamma], doubts[gamma]))
        zeros = np.zeros((int(gamma.sum()), 3))
        found, uncertain = _solve(inner, uncertain, noise)
        found, uncertain = np.hstack([zeros, found]), np.hstack([zeros, uncertain])
        order = np.argsort(found, axis=1, kind="stable")
        values[gamma] = np.take_along_axis(found, order, axis=1)
        errors[gamma] = np.take_along_axis(uncertain, order, axis=1)
    return Modes(values=values, errors=errors)


def eigenvalues(
    matrices: Complex[ndarray, "*more points dim dim"],
    q: Float[ndarray, "points 3"],
    masses: Float[ndarray, " atoms"],
) -> Float[ndarray, "*more points branches"]:
    """Ascending; at Gamma the first three are the translations, exactly zero."""
    values = np.linalg.eigvalsh(matrices)
    gamma = is_gamma(q)
    if gamma.any():
        basis = vibrations(masses)
        values[..., gamma, :3] = 0.0
        values[..., gamma, 3:] = np.linalg.eigvalsh(basis.T @ matrices[..., gamma, :, :] @ basis)
    return values


def is_gamma(q: Float[ndarray, "points 3"]) -> ndarray:
    """Which wave vectors are lattice vectors."""
    return np.asarray(np.abs(q - np.rint(q)).max(axis=1) < AT_GAMMA)


def vibrations(masses: Float[ndarray, " atoms"]) -> Float[ndarray, "dim inner"]:
    """Orthonormal basis of what is perpendicular to the translations, in mass-weighted space."""
    translations = np.kron(np.sqrt(masses / masses.sum())[:, None], np.eye(3))
    complete = np.linalg.qr(np.hstack([translations, np.eye(len(translations))]))[0]
    return np.asarray(complete[:, 3:])


def translation_residual(
    samples: Complex[ndarray, "samples dim dim"], masses: Float[ndarray, " atoms"]
) -> float:
    """Largest |T† D(Gamma) T| over translations T, of any sample, as a frequency in THz."""
    translations = np.kron(np.sqrt(masses / masses.sum())[:, None], np.eye(3))
    return float(in_thz(np.abs(translations.T @ samples @ translations)).max())


def in_thz(values: Float[ndarray, "*shape"]) -> Float[ndarray, "*shape"]:
    """sign(lambda) sqrt|lambda|, imaginary frequencies as negative."""
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)) * THZ_PER_ROOT)


def errors_in_thz(found: Modes) -> Float[ndarray, "points branches"]:
    """Half the distance between the frequencies of lambda + s and lambda - s; finite at zero."""
    above, below = found.values + found.errors, found.values - found.errors
    return np.asarray((in_thz(above) - in_thz(below)) / 2)


def quantile(n_samples: int) -> float:
    """What stands for three standard errors with so few samples (Student); 3 for a single one."""
    return 3.0 if n_samples == 1 else float(stdtrit(n_samples - 1, THREE_SIGMA))


def _solve(
    samples: Complex[ndarray, "samples points dim dim"],
    doubt: Num[ndarray, "points dim dim"],
    noise: float,
) -> tuple[Float[ndarray, "points dim"], Float[ndarray, "points dim"]]:
    mean = samples.mean(axis=0)
    values, vectors = np.linalg.eigh(mean)
    if not values.size:
        return values, values
    changes = np.concatenate([samples - mean, doubt[None]])
    shifts = np.einsum("qaj,sqab,qbj->sqj", vectors.conj(), changes, vectors, optimize=True).real
    shifts = _over_groups(shifts, values)
    errors = np.hypot(np.abs(shifts[-1]), noise)
    if len(samples) > 1:
        errors = np.hypot(errors, shifts[:-1].std(axis=0, ddof=1) / np.sqrt(len(samples)))
    return values, errors


def _over_groups(
    changes: Float[ndarray, "samples points dim"], values: Float[ndarray, "points dim"]
) -> Float[ndarray, "samples points dim"]:
    """The mean over each group of degenerate eigenvalues."""
    dim = values.shape[1]
    near = np.diff(values, axis=1) < DEGENERATE * np.abs(values).max()
    group = np.cumsum(np.hstack([np.zeros((len(values), 1), dtype=bool), ~near]), axis=1)
    member = group[:, :, None] == np.arange(dim)
    share = member / np.maximum(member.sum(axis=1, keepdims=True), 1)
    spread = np.einsum("sqj,qjg,qkg->sqk", changes, share, member.astype(float), optimize=True)
    return np.asarray(spread)
