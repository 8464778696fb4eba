"""Calculators both ways: a potential for ASE, and any ASE calculator as a potential."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError, all_changes
from ase.calculators.calculator import Calculator as AseCalculator
from ase.outputs import Properties as Outputs
from ase.outputs import all_outputs
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from numpy import ndarray

from coset.ase_interface.atoms import as_numpy, error_of, from_ase, to_ase
from coset.errors import ConfigError
from coset.potential import Potential
from coset.structures import Properties, Structures, atoms_of, split, validate


def results_of(
    properties: Properties, structures: Structures, system: int = 0, *, direct: bool = False
) -> dict[str, Any]:
    """Energy, forces and stress of one system by their names in ASE, what is undefined left out."""
    rows, _ = atoms_of(structures, torch.tensor([system], device=structures.cell.device))
    forces = properties.direct_forces if direct else properties.forces
    stress = properties.direct_stress if direct else properties.stress
    results: dict[str, Any] = {}
    if properties.energy is not None and bool(torch.isfinite(properties.energy[system])):
        results["energy"] = float(properties.energy[system])
    if forces is not None and bool(torch.isfinite(forces[rows]).all()):
        results["forces"] = as_numpy(forces[rows])
    if stress is not None and bool(torch.isfinite(stress[system]).all()):
        results["stress"] = full_3x3_to_voigt_6_stress(as_numpy(stress[system]))
    return results


class Calculator(AseCalculator):
    """A potential as an ASE calculator.

    forces: `conservative` (the gradient of the energy) or `direct` (heads of the network).
    `results["torque"]` (eV/rad) is zero for an invariant model.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self, potential: Potential, *, forces: Literal["conservative", "direct"] = "conservative"
    ) -> None:
        """Bind the potential; nothing is evaluated."""
        super().__init__()
        if forces not in ("conservative", "direct"):
            expected = "expected 'conservative' or 'direct'"
            raise ConfigError(f"forces = {forces!r}, {expected}", field="forces")
        self.potential = potential
        self.forces = forces
        self._evaluated: dict[str, Any] | None = None
        self._evaluated_by: tuple[Potential, str] = (potential, forces)

    def _get_name(self) -> str:
        return "coset"

    def reset(self) -> None:
        """Forget the last evaluation."""
        super().reset()
        self._evaluated = None

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """Names of what differs, in any bit, from the structure of the last evaluation."""
        potential, forces = self._evaluated_by
        same_source = potential is self.potential and forces == self.forces
        if self._evaluated is None or not same_source:
            return list(all_changes)
        now, before = _state(atoms), self._evaluated
        return [key for key in now if not np.array_equal(now[key], before[key])]

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:  # noqa: ANN401  (as in ASE)
        """One result, of the structure the calculator shows if none is given."""
        shown = self.atoms if atoms is None else atoms  # ASE would not look at the former again
        return super().get_property(name, shown, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = (),
    ) -> None:
        """Evaluate the potential and fill `results`."""
        atoms = self.get_atoms() if atoms is None else atoms
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs three periodic directions, this structure has pbc = {atoms.pbc}"
            )
        structures = from_ase(atoms)
        predicted = self.potential(structures)
        if self.forces == "direct" and predicted.direct_forces is None:
            raise ConfigError("this potential has no direct forces", field="forces")
        self.results = results_of(predicted, structures, direct=self.forces == "direct")
        self.results["free_energy"] = self.results["energy"]
        if predicted.atomic_energies is not None:
            self.results["energies"] = as_numpy(predicted.atomic_energies)
        if predicted.torque is not None:
            self.results["torque"] = as_numpy(predicted.torque[0])
        self.atoms = atoms.copy()
        self._evaluated, self._evaluated_by = _state(self.atoms), (self.potential, self.forces)

    def export_properties(self) -> Outputs:
        """Copies of the results that ASE has a name for."""
        named = {key: value for key, value in self.results.items() if key in all_outputs}
        return Outputs(deepcopy(named))


def _state(atoms: Atoms) -> dict[str, Any]:
    """A copy of everything of a frame that a potential can depend on."""
    return {
        "positions": atoms.positions.copy(),
        "numbers": atoms.numbers.copy(),
        "cell": atoms.cell.array.copy(),
        "pbc": atoms.pbc.copy(),
        "charge": atoms.info.get("charge", 0),
        "spin": atoms.info.get("spin", 1),
    }


@dataclass(frozen=True, kw_only=True)
class CalculatorPotential:
    """Any ASE calculator as a potential, evaluated for one structure after the other.

    cutoff: Å, how far its forces reach. Stress is NaN unless periodic in 3D and implemented.
    """

    calculator: BaseCalculator
    cutoff: float
    elements: frozenset[int] = frozenset(range(1, 119))
    level_of_theory: str = ""

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError for the first system with an element that is not known."""
        for system, one in enumerate(split(structures)):
            if unknown := set(one.atomic_numbers.tolist()) - self.elements:
                raise error_of(
                    "UnknownElement",
                    "atomic_numbers",
                    f"elements {sorted(unknown)} are not among those of the calculator",
                    str(system),
                )

    def __call__(self, structures: Structures) -> Properties:
        """Energy, forces and stress of every system, in float64."""
        validate(structures)
        results = [self._evaluate(atoms) for atoms in to_ase(structures)]
        energies, forces, stresses = zip(*results, strict=True)
        like = structures.cell.double()
        return Properties(
            energy=like.new_tensor(energies),
            forces=like.new_tensor(np.concatenate(forces)),
            stress=like.new_tensor(np.stack(stresses)),
        )

    def _evaluate(self, atoms: Atoms) -> tuple[float, ndarray, ndarray]:
        # Calculators compare arrays only: without this a new charge would give the old results.
        self.calculator.atoms, self.calculator.results = None, {}
        energy = float(self.calculator.get_property("energy", atoms))
        forces = np.asarray(self.calculator.get_property("forces", atoms))
        stress = np.full((3, 3), np.nan)
        if atoms.pbc.all() and "stress" in self.calculator.implemented_properties:
            found = np.asarray(self.calculator.get_property("stress", atoms))
            stress = found if found.shape == (3, 3) else voigt_6_to_full_3x3_stress(found)
        return energy, forces, stress
