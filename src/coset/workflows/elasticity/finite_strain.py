"""Elastic constants from stresses of strained crystals: the check of those from derivatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import Quadrature
from coset.errors import NotConvergedError
from coset.potential import ModelPotential, Potential
from coset.structures import Properties, Structures, concatenate, strain
from coset.symmetry.tensors import PAIRS
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings

AMPLITUDES = (-0.01, -0.005, 0.005, 0.01)
DEGREE = 3  # of the polynomial in the strain, so that the slope has fourth order


@dataclass(frozen=True, kw_only=True, slots=True)
class FiniteStrain:
    """d stress/d strain in GPa, Voigt's notation, not symmetrized; largest residual of the fits."""

    tensor_GPa: Float[Tensor, "6 6"]
    residual_GPa: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedAverage:
    """A model averaged over the same rotations whoever asks: every workflow sees that average."""

    model: ModelPotential
    rule: Quadrature

    @property
    def cutoff(self) -> float:
        """Longest edge, Å."""
        return self.model.cutoff

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        return self.model.elements

    @property
    def level_of_theory(self) -> str:
        """What its energies approximate."""
        return self.model.level_of_theory

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError for what the model cannot take."""
        self.model.check_supported(structures)

    def __call__(self, structures: Structures) -> Properties:
        """Averaged predictions."""
        return replace(self.model, quadrature=self.rule)(structures)


def finite_strain(
    potential: Potential,
    one: Structures,
    *,
    ions: str = "relaxed",
    amplitudes: Sequence[float] = AMPLITUDES,
    force_tolerance: float = 1e-4,
) -> FiniteStrain:
    """Slopes of the Cauchy stress in the six strains of a crystal, all strained cells in one batch.

    The potential is taken as it is: `FixedAverage` gives it rotations to average over. Under a
    stress these are the `cauchy` constants. force_tolerance: eV/Å, for relaxed ions.

    Raises:
        NotConvergedError: if the ions of a strained cell do not come to their minimum.
    """
    strains = [_strain(a, b, size) for a, b in PAIRS for size in (0.0, *amplitudes)]
    cells = concatenate([strain(one.to(torch.float64), e[None]) for e in strains])
    stress = _stresses(potential, cells, force_tolerance if ions == "relaxed" else None)
    sizes = torch.tensor((0.0, *amplitudes), dtype=torch.float64)
    powers = sizes[:, None] ** torch.arange(DEGREE + 1)
    values = torch.stack([stress[:, a, b] for a, b in PAIRS], dim=1)
    by_strain = values.reshape(6, len(sizes), 6)
    fitted = torch.linalg.lstsq(powers.expand(6, -1, -1), by_strain).solution
    residual = (powers @ fitted - by_strain).abs().max()
    return FiniteStrain(
        tensor_GPa=fitted[:, 1].mT * GPA_PER_EV_PER_A3,
        residual_GPa=float(residual) * GPA_PER_EV_PER_A3,
    )


def _stresses(
    potential: Potential, cells: Structures, force_tolerance: float | None
) -> Float[Tensor, "systems 3 3"]:
    if force_tolerance is None:
        stress = potential(cells).stress
        assert stress is not None
        return stress
    settings = RelaxSettings(cell="fixed", symmetry="free", force_tolerance=force_tolerance)
    found = []
    for result in relax(potential, cells, settings):
        if result.status != "converged" or result.properties is None:
            raise NotConvergedError(f"the ions of a strained cell: {result.reason}")
        assert result.properties.stress is not None
        found.append(result.properties.stress)
    return torch.cat(found)


def _strain(a: int, b: int, size: float) -> Float[Tensor, "3 3"]:
    """Of size `size` in Voigt's sense: shears are halved."""
    result = torch.zeros(3, 3, dtype=torch.float64)
    result[a, b] += 0.5 * size
    result[b, a] += 0.5 * size
    return result
