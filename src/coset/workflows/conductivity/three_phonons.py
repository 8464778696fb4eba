"""Matrix elements of three phonons for many triplets at once, as matrix products.

    V(q0 v0, q1 v1, q2 v2) = sum_{k a, l b, m c} e0(k a, v0) e1(l b, v1) e2(m c, v2)
                             Phi(k a, l b, m c; q1, q2) / sqrt(m_k m_l m_m),     q0 + q1 + q2 = G

For one triplet, Phi sums over all pairs of atoms of the supercell. Here q0 is the same for many
triplets: its sum and its eigenvectors are taken once, and what is left for a triplet is one sum
over the atoms. Phi is the mean over the three atoms that can stand in the first cell; phases are
means over the shortest vectors between two atoms. In one of the three means q0 takes no part: it
keeps both sums, which are those over one atom for all others at once.

Where the shortest vectors between three atoms close to a triangle the three means are equal, by
the symmetry of the force constants under permutation; the two cheap ones then stand for all.

References: L. Chaput et al., Phys. Rev. B 84, 094302 (2011), Eqs. 4 and 5; A. Togo, L. Chaput and
I. Tanaka, Phys. Rev. B 91, 094306 (2015), Eqs. 7 to 10.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Complex128, Float64, Int, Shaped
from numpy import ndarray
from torch import Tensor

WORKING_BYTES = 32 * 2**20  # of the largest array: what stays in a cache is fastest
TWO_PI_I = 2j * np.pi


@dataclass(frozen=True, slots=True)
class ThreePhonons:
    """Force constants of third order, ordered for the sums, and the phases of all wave vectors.

    n atoms in the primitive cell, each L times in the supercell, with an `anchor` in the first one.

    all_sums: of triangles that do not close, for the mean without q0. one_sum: for the two others.
    phases: of all atoms from all anchors. wave_vectors: fractional. positions: fractional, of the
    atoms of the primitive cell.
    """

    all_sums: Float64[Tensor, "n_cubed L L_27"]  # (k l m), atom l, (atom m, a b c)
    one_sum: Float64[Tensor, "n n_L_9 n_L_3"]  # anchor l, (m, atom m, b c), (k, atom k, a)
    phases: Complex128[Tensor, "points n L n"]
    wave_vectors: Float64[Tensor, "points 3"]
    positions: Float64[Tensor, "n 3"]

    @classmethod
    def build(
        cls,
        third: Float64[ndarray, "n atoms atoms 3 3 3"],
        closed: Shaped[ndarray, "n atoms atoms"],
        owners: Int[ndarray, " atoms"],
        masses: Float64[ndarray, " n"],
        shortest: Float64[ndarray, "vectors 3"],
        counts_and_starts: Int[ndarray, "atoms n 2"],
        wave_vectors: Float64[ndarray, "points 3"],
        positions: Float64[ndarray, "n 3"],
    ) -> Self:
        """From force constants in eV/Å³ with the first atom in the first cell.

        closed: is the triangle of shortest vectors unique and closed? owners: the primitive atom of
        every atom. masses: in u. shortest: fractional vectors; `counts_and_starts` says how many
        there are, from which row on, for every atom from every anchor.
        """
        order = np.argsort(owners, kind="stable")
        n, copies = len(third), len(owners) // len(third)
        heavy = masses[owners[order]]
        weight = np.sqrt(masses[:, None, None] * heavy[None, :, None] * heavy)
        shape = (n, n, copies, n, copies)
        by_mass = (third[:, order][:, :, order] / weight[..., None, None, None]).reshape(
            *shape, 3, 3, 3
        )
        is_closed = closed[:, order][:, :, order].astype(bool).reshape(*shape, 1, 1, 1)
        open_only = np.where(is_closed, 0.0, by_mass).transpose(0, 1, 3, 2, 4, 5, 6, 7)
        both = np.where(is_closed, 1.5, 1.0) * by_mass
        return cls(
            all_sums=_tensor(open_only.reshape(n**3, copies, copies * 27)),
            one_sum=_tensor(
                both.transpose(0, 3, 4, 5, 7, 1, 2, 6).reshape(n, n * copies * 9, n * copies * 3)
            ),
            phases=_phases(wave_vectors, shortest, counts_and_starts[order]).reshape(
                -1, n, copies, n
            ),
            wave_vectors=_tensor(wave_vectors),
            positions=_tensor(positions),
        )

    def squared(
        self,
        triplets: Int[Tensor, "triplets 3"],
        vectors: Complex128[Tensor, "points branches branches"],
    ) -> Float64[Tensor, "triplets branches branches branches"]:
        """|V|² of triplets of wave vectors, in eV²/Å⁶/u³; few different ones should stand first.

        vectors: eigenvectors of all wave vectors, as columns.
        """
        branches = vectors.shape[1]
        found = torch.empty(len(triplets), *(branches,) * 3, dtype=torch.float64)
        for point in torch.unique(triplets[:, 0]).tolist():
            rows = torch.nonzero(triplets[:, 0] == point)[:, 0]
            found[rows] = self._with_point(point, triplets[rows, 1:], vectors)
        return found

    def _with_point(
        self,
        point: int,
        pairs: Int[Tensor, "triplets 2"],
        vectors: Complex128[Tensor, "points branches branches"],
    ) -> Float64[Tensor, "triplets branches branches branches"]:
        """The same with one wave vector that stands first."""
        n, copies = self.positions.shape[0], self.phases.shape[2]
        own = vectors[point]
        branches = own.shape[1]
        waves = torch.einsum("klj,kav->jklav", self.phases[point], own.reshape(n, 3, branches))
        waves = waves.reshape(n, n * copies * 3, branches)
        summed = torch.complex(self.one_sum @ waves.real, self.one_sum @ waves.imag)
        summed = summed.reshape(n, n, copies, 9 * branches)
        step = max(1, WORKING_BYTES // (self.all_sums.numel() // copies * 16))
        found = []
        for some in torch.split(pairs, step):
            total = self.wave_vectors[point] + self.wave_vectors[some].sum(dim=1)
            turn = torch.exp(TWO_PI_I * (total @ self.positions.T))
            one, other = self.phases[some[:, 0]], self.phases[some[:, 1]]
            sums = self._without_own(one, other * turn[:, None, None, :], own)
            sums += _with_own(summed, other, turn).permute(2, 5, 0, 3, 1, 4)
            sums += _with_own(summed, one, turn).permute(2, 5, 1, 4, 0, 3)
            sums = sums.reshape(len(some), branches, 3 * n, 3 * n)
            first, second = vectors[some[:, 0]], vectors[some[:, 1]]
            element = first.transpose(1, 2)[:, None] @ sums @ second[:, None]
            found.append((element.real**2 + element.imag**2) / 9.0)
        return torch.cat(found)

    def _without_own(
        self,
        one: Complex128[Tensor, "triplets n L n"],
        other: Complex128[Tensor, "triplets n L n"],
        own: Complex128[Tensor, "n_3 branches"],
    ) -> Complex128[Tensor, "triplets branches n 3 n 3"]:
        """The mean with q0 in the first cell: sums over atoms l, then over atoms m.

        Real and imaginary parts are rows of real products.
        """
        count, n, copies, branches = *one.shape[:3], own.shape[1]
        rows = torch.view_as_real(one).permute(3, 1, 0, 4, 2)  # k l triplet part copy
        rows = rows[:, :, None].expand(n, n, n, count, 2, copies)
        half = rows.reshape(n**3, 2 * count, copies) @ self.all_sums
        half = half.reshape(n, n, n, count, 2 * copies, 27)
        other = other.permute(3, 1, 0, 2)  # k m triplet copy
        real = torch.cat([other.real, -other.imag], dim=-1)
        imaginary = torch.cat([other.imag, other.real], dim=-1)
        parts = torch.stack([real, imaginary], dim=-2)[:, None] @ half
        whole = torch.complex(parts[..., 0, :], parts[..., 1, :])
        whole = whole.reshape(n, n, n, count, 3, 9).permute(0, 4, 3, 1, 5, 2)
        found = own.T @ whole.reshape(3 * n, count * n * 9 * n)
        return found.reshape(branches, count, n, 3, 3, n).permute(1, 0, 2, 3, 5, 4)


def _with_own(
    summed: Complex128[Tensor, "n n L rest"],
    phases: Complex128[Tensor, "triplets n L n"],
    turn: Complex128[Tensor, "triplets n"],
) -> Complex128[Tensor, "n n triplets 3 3 branches"]:
    """The mean with the atom of another wave vector in the first cell, q0 summed already."""
    found = phases.permute(3, 1, 0, 2) @ summed
    n, _, count, rest = found.shape
    return (found * turn.T[:, None, :, None]).reshape(n, n, count, 3, 3, rest // 9)


def _phases(
    wave_vectors: Float64[ndarray, "points 3"],
    shortest: Float64[ndarray, "vectors 3"],
    counts_and_starts: Int[ndarray, "atoms n 2"],
) -> Complex128[Tensor, "points atoms_n"]:
    """exp(2 pi i q r), the mean over the shortest vectors r of every atom from every anchor."""
    counts, starts = counts_and_starts.reshape(-1, 2).T
    belongs = np.repeat(np.arange(len(counts)), counts)
    rows = np.concatenate([np.arange(s, s + c) for c, s in zip(counts, starts, strict=True)])
    waves = _tensor(np.exp(TWO_PI_I * (wave_vectors @ shortest[rows].T)) / counts[belongs])
    found = torch.zeros(len(wave_vectors), len(counts), dtype=torch.complex128)
    return found.index_add_(1, _tensor(belongs), waves)


def _tensor(array: Shaped[ndarray, "..."]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
