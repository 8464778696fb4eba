"""Constants, and the only unit conversions in the package.

Inside the package energies are eV, lengths Å, masses amu, temperatures K. Any other unit is in the
name of the variable that carries it and is made here. Values: CODATA 2018.
"""

GPA_PER_EV_PER_A3 = 160.21766208
"""1 eV/Å³ in GPa."""

EV_A_PER_E2 = 14.399645478425668
"""e²/(4π ε0) in eV·Å: the prefactor of a Coulomb energy of unit charges."""
