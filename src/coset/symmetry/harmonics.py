"""Matrices of the irreducible representations of O(3), and their invariants under a point group.

D^l(R) is real and orthogonal, a representation: D(R R') = D(R) D(R'). A sector (l, p) has the
matrices D^lp(R) = p D^l(-R) for improper R; natural parity is p = (-1)^l.
Source: L. C. Biedenharn, J. D. Louck, Angular Momentum in Quantum Physics (1981), ch. 3.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def generators(degree: int) -> Float[Tensor, "3 dim dim"]:
    """G_a = d/dt D(exp(t [e_a]x)) at t = 0, real and antisymmetric; dim = 2 l + 1, float64."""
    dim = 2 * degree + 1
    m = torch.arange(-degree, degree + 1, dtype=torch.float64)
    raising = torch.zeros(dim, dim, dtype=torch.complex128)
    step = torch.sqrt(degree * (degree + 1) - m[:-1] * (m[:-1] + 1))
    raising[torch.arange(1, dim), torch.arange(dim - 1)] = step.to(torch.complex128)
    lowering = raising.mT.conj()
    j = torch.stack(
        [0.5 * (raising + lowering), -0.5j * (raising - lowering), torch.diag(m).to(raising)]
    )
    basis = _real_basis(degree)
    turned = -1j * (basis @ j @ basis.mT.conj())
    return turned.real.contiguous()


def _real_basis(degree: int) -> Tensor:
    """Rows: real combinations of |m>, in the order of m."""
    dim, half = 2 * degree + 1, 1.0 / math.sqrt(2.0)
    basis = torch.zeros(dim, dim, dtype=torch.complex128)
    basis[degree, degree] = 1.0
    for m in range(1, degree + 1):
        sign = (-1.0) ** m
        basis[degree + m, degree - m], basis[degree + m, degree + m] = half, sign * half
        basis.imag[degree - m, degree - m] = half
        basis.imag[degree - m, degree + m] = -sign * half
    return basis


def representation(
    degree: int, parity: int, rotations: Float[Tensor, "nodes 3 3"]
) -> Float[Tensor, "nodes dim dim"]:
    """D^lp of orthogonal matrices, by Euler angles R = Z(a) Y(b) Z(c) of their proper part."""
    signs = torch.sign(torch.linalg.det(rotations))
    r = rotations * signs[:, None, None]
    sine = torch.hypot(r[:, 0, 2], r[:, 1, 2])
    turned = sine > 1e-9
    b = torch.atan2(sine, r[:, 2, 2])  # 0 or pi where not turned
    a = torch.atan2(r[:, 1, 2], r[:, 0, 2]) * turned
    c = torch.where(
        turned, torch.atan2(r[:, 2, 1], -r[:, 2, 0]), torch.atan2(r[:, 1, 0], r[:, 1, 1])
    )
    _, y, z = generators(degree)
    matrices = (
        torch.matrix_exp(a[:, None, None] * z)
        @ torch.matrix_exp(b[:, None, None] * y)
        @ torch.matrix_exp(c[:, None, None] * z)
    )
    return torch.where(signs[:, None, None] > 0, matrices, parity * matrices)


def invariants(
    degree: int, parity: int, operations: Float[Tensor, "operations 3 3"]
) -> Float[Tensor, "dim columns"]:
    """Orthonormal columns V with D^lp(g) V = V for every operation; Pi_G = V V^T."""
    projector = representation(degree, parity, operations).mean(0)
    values, vectors = torch.linalg.eigh(0.5 * (projector + projector.mT))
    alive: Tensor = vectors[:, values > 0.5]
    return alive
