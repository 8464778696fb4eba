"""From second derivatives in displacements and strains to elastic constants and what they mean.

The energy of a strain s with relaxed ions is the minimum over u of u H u/2 + u L s + s E s/2, so

    A = (E - L^T H+ L)/V      clamped ions: A = E/V

with H+ the inverse on what is no translation. A comes from the energy. Under a stress the constants
that answer for stability and waves are those of the Cauchy stress, B = d stress/d strain.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from coset.derivatives import StrainDerivatives
from coset.symmetry.crystal import CrystalSymmetry
from coset.symmetry.projection import make_projector, project_hessian
from coset.symmetry.tensors import PAIRS, project_internal_strain, project_rank_four


@dataclass(frozen=True, kw_only=True, slots=True)
class Moduli:
    """Of a polycrystal without texture, GPa: bounds of Voigt and Reuss, and Hill's means.

    bulk, shear, young and poisson are those of Hill; anisotropy is the universal one, 0 if
    isotropic. NaN where the crystal is not stable: an unstable shear leaves the bulk moduli.
    """

    bulk_voigt_GPa: float
    bulk_reuss_GPa: float
    shear_voigt_GPa: float
    shear_reuss_GPa: float
    bulk_GPa: float
    shear_GPa: float
    young_GPa: float
    poisson: float
    anisotropy: float


def projected(found: StrainDerivatives, group: CrystalSymmetry) -> StrainDerivatives:
    """Derivatives of one system with the symmetry of its group."""
    projector = make_projector([group])
    return StrainDerivatives(
        energy=found.energy,
        gradient=projector.forces(found.gradient),
        strain_gradient=projector.stress(found.strain_gradient[None])[0],
        hessian=project_hessian(found.hessian, group),
        internal_strain=project_internal_strain(found.internal_strain, group),
        strain=project_rank_four(found.strain, group),
    )


def relaxed_constants(found: StrainDerivatives, volume: float) -> Float[Tensor, "3 3 3 3"]:
    """A in eV/Å³, ions relaxed."""
    coupling = found.internal_strain.flatten(0, 1).flatten(1)
    softened = coupling.mT @ pseudo_inverse(found.hessian) @ coupling
    return (found.strain - softened.reshape(3, 3, 3, 3)) / volume


def pseudo_inverse(hessian: Float[Tensor, "atoms 3 atoms 3"]) -> Float[Tensor, "dim dim"]:
    """H+ = (P H P + k T T^T)^-1 - T T^T/k: the inverse for displacements without translation."""
    matrix, translations = _matrix(hessian)
    outer = translations @ translations.mT
    rest = torch.eye(len(matrix)).to(matrix) - outer
    shift = float(matrix.diagonal().abs().mean()) + 1.0
    inverse: Tensor = torch.linalg.inv(rest @ matrix @ rest + shift * outer)
    return inverse - outer / shift


def optical_modes(
    hessian: Float[Tensor, "atoms 3 atoms 3"],
) -> tuple[Float[Tensor, " modes"], Float[Tensor, "dim modes"]]:
    """Eigenvalues of H without masses (eV/Å², ascending) and vectors, translations left out."""
    matrix, translations = _matrix(hessian)
    rest = torch.eye(len(matrix)).to(matrix) - translations @ translations.mT
    basis = torch.linalg.eigh(rest).eigenvectors[:, 3:]
    values, vectors = torch.linalg.eigh(basis.mT @ matrix @ basis)
    return values, basis @ vectors


def cauchy_constants(
    energy_constants: Float[Tensor, "3 3 3 3"], stress: Float[Tensor, "3 3"]
) -> Float[Tensor, "3 3 3 3"]:
    """B = A + (s_ik d_jl + s_il d_jk + s_jk d_il + s_jl d_ik)/4 - s_ij d_kl = d stress/d strain.

    Not symmetric in ij and kl unless the stress s is a pressure.
    Reference: D. C. Wallace, Thermodynamics of Crystals, equations 2.24-2.36.
    """
    unit = torch.eye(3).to(stress)
    four = sum(
        torch.einsum(f"{first},{second}->ijkl", stress, unit)
        for first, second in (("ik", "jl"), ("il", "jk"), ("jk", "il"), ("jl", "ik"))
    )
    return energy_constants + 0.25 * four - torch.einsum("ij,kl->ijkl", stress, unit)


def moduli(constants_GPa: Float[Tensor, "6 6"]) -> Moduli:
    """Averages over orientations of symmetric elastic constants (Voigt's notation).

    Reference: R. Hill, Proc. Phys. Soc. A 65, 349 (1952); anisotropy: S. I. Ranganathan,
    M. Ostoja-Starzewski, Phys. Rev. Lett. 101, 055504 (2008), equation 8.
    """
    C = constants_GPa
    S = torch.linalg.pinv(C)
    bulk_voigt, softness = float(C[:3, :3].sum()) / 9.0, float(S[:3, :3].sum())
    bulk_reuss = 1.0 / softness if softness > 0.0 else float("nan")
    shear_voigt, shear_reuss = _shear_sum(C, 1.0, 3.0) / 15.0, 15.0 / _shear_sum(S, 4.0, 3.0)
    if float(torch.linalg.eigvalsh(C)[0]) <= 0.0:
        shear_reuss = float("nan")
    bulk, shear = 0.5 * (bulk_voigt + bulk_reuss), 0.5 * (shear_voigt + shear_reuss)
    return Moduli(
        bulk_voigt_GPa=bulk_voigt,
        bulk_reuss_GPa=bulk_reuss,
        shear_voigt_GPa=shear_voigt,
        shear_reuss_GPa=shear_reuss,
        bulk_GPa=bulk,
        shear_GPa=shear,
        young_GPa=9.0 * bulk * shear / (3.0 * bulk + shear),
        poisson=(3.0 * bulk - 2.0 * shear) / (6.0 * bulk + 2.0 * shear),
        anisotropy=5.0 * shear_voigt / shear_reuss + bulk_voigt / bulk_reuss - 6.0,
    )


def young_modulus(
    constants_GPa: Float[Tensor, "6 6"], directions: Float[Tensor, "*points 3"]
) -> Float[Tensor, "*points"]:
    """1/(S_abcd n_a n_b n_c n_d) in GPa along unit vectors n, S the inverse of C."""
    products = torch.stack([directions[..., a] * directions[..., b] for a, b in PAIRS], dim=-1)
    compliance = torch.linalg.inv(constants_GPa)
    along: Tensor = 1.0 / ((products @ compliance) * products).sum(-1)
    return along


def _shear_sum(matrix: Tensor, normal: float, shear: float) -> float:
    """The sum N (11 + 22 + 33 - 12 - 13 - 23) + S (44 + 55 + 66) with factors N and S."""
    diagonal = float(matrix.diagonal()[:3].sum())
    mixed = float(matrix[0, 1] + matrix[0, 2] + matrix[1, 2])
    return normal * (diagonal - mixed) + shear * float(matrix.diagonal()[3:].sum())


def _matrix(hessian: Tensor) -> tuple[Tensor, Tensor]:
    n = len(hessian)
    matrix = hessian.reshape(3 * n, 3 * n)
    translations = torch.eye(3).to(matrix).repeat(n, 1) / n**0.5
    return 0.5 * (matrix + matrix.mT), translations
