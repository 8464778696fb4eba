"""The border to ASE: frames and files in, files out, calculators both ways.

The only folder that imports ase: inside the package nothing knows `Atoms`.
"""

from coset.ase_interface.atoms import fixed_atoms, from_ase, to_ase
from coset.ase_interface.calculators import Calculator, CalculatorPotential
from coset.ase_interface.files import Loaded, read_structures, result_file, write_structures

__all__ = [
    "Calculator",
    "CalculatorPotential",
    "Loaded",
    "fixed_atoms",
    "from_ase",
    "read_structures",
    "result_file",
    "to_ase",
    "write_structures",
]
