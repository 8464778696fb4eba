"""What a single evaluation tells about the broken symmetry of a model, free of charge.

Of forces and stress from gradients, or of those from direct heads where there are no gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from coset.structures import Properties
from coset.symmetry.projection import Projector
from coset.units import GPA_PER_EV_PER_A3


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationalError:
    """Standard errors of an average over rotations, from independent random frames of its rule.

    energy: eV, total; forces: eV/Å, largest component; stress_GPa: largest component, NaN where
    undefined. Blind to the
    error of the model.
    """

    energy: float
    forces: float
    stress_GPa: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """How far the raw predictions for one structure are from its symmetry.

    torque: eV/rad, dE under rigid rotation about x, y, z; 0 for an invariant model, None if the
    potential does not tell.
    force_deviation (eV/Å), stress_deviation_GPa: largest |F - P F| and |S - P S|, what the
    projection on the group removes; blind inside the symmetric subspace. rotational_error: where
    the properties are means over several frames.
    """

    torque: Float[ndarray, "3"] | None
    force_deviation: float
    stress_deviation_GPa: float
    rotational_error: RotationalError | None = None

    def times(self, n_cells: int) -> "Certificate":
        """That of a supercell: energies and torques are larger, the rest is the same."""
        torque, error = self.torque, self.rotational_error
        return replace(
            self,
            torque=None if torque is None else n_cells * torque,
            rotational_error=error and replace(error, energy=n_cells * error.energy),
        )


def rotational_error(error: Properties | None) -> RotationalError | None:
    """What a certificate says of the standard errors of one system."""
    if error is None or error.energy is None:
        return None
    forces, stress = _forces_and_stress(error)
    if forces is None or stress is None:
        return None
    return RotationalError(
        energy=float(error.energy[0]),
        forces=float(forces.abs().max()),
        stress_GPa=float(stress.abs().max()) * GPA_PER_EV_PER_A3,
    )


def certify(properties: Properties, projector: Projector) -> tuple[Properties, Certificate | None]:
    """Properties of one system with forces and stress projected, direct ones too; the certificate.

    No certificate if there are no forces or no stress.
    """
    projected = replace(
        properties,
        forces=_maybe(projector.forces, properties.forces),
        stress=_maybe(projector.stress, properties.stress),
        direct_forces=_maybe(projector.forces, properties.direct_forces),
        direct_stress=_maybe(projector.stress, properties.direct_stress),
    )
    (forces, stress), torque = _forces_and_stress(properties), properties.torque
    if forces is None or stress is None:
        return projected, None
    by_force, by_stress = projector.deviation(forces, stress)
    certificate = Certificate(
        torque=None if torque is None else torque[0].cpu().numpy(),
        force_deviation=float(by_force[0]),
        stress_deviation_GPa=float(by_stress[0]) * GPA_PER_EV_PER_A3,
    )
    return projected, certificate


def _forces_and_stress(properties: Properties) -> tuple[Tensor | None, Tensor | None]:
    if properties.forces is not None:
        return properties.forces, properties.stress
    return properties.direct_forces, properties.direct_stress


def _maybe(project: Callable[[Tensor], Tensor], value: Tensor | None) -> Tensor | None:
    return None if value is None else project(value)
