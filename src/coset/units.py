"""Constants, and the only unit conversions in the package.

Inside the package energies are eV, lengths Å, masses amu, temperatures K. Any other unit is in the
name of the variable that carries it and is made here. Values: CODATA 2018.
"""

GPA_PER_EV_PER_A3 = 160.2176634
"""1 eV/Å³ in GPa."""

EV_A_PER_E2 = 14.399645478425668
"""e²/(4π ε0) in eV·Å: the prefactor of a Coulomb energy of unit charges."""

THZ_PER_ROOT = 15.633304239856
"""sqrt(1 eV/Å²/amu)/2π in THz: a frequency from the root of a squared angular frequency."""

EV_PER_THZ = 4.135667696923859e-3
"""Energy h f of a quantum of 1 THz."""

EV_PER_K = 8.617333262145179e-5
"""Boltzmann's constant."""

_EV_PER_KJ_PER_MOL = 1e3 / (6.02214076e23 * 1.602176634e-19)

EV_PER_UNIT = {
    "eV": 1.0,
    "meV": 1e-3,
    "kJ/mol": _EV_PER_KJ_PER_MOL,
    "kcal/mol": 4.184 * _EV_PER_KJ_PER_MOL,
    "Hartree": 27.211386245988,
    "Ha": 27.211386245988,
    "Rydberg": 13.605693122994,
    "Ry": 13.605693122994,
}
"""Energy units of foreign files in eV; 1 cal = 4.184 J."""

ANGSTROM_PER_UNIT = {"A": 1.0, "Å": 1.0, "Bohr": 0.529177210903, "nm": 10.0}
"""Length units of foreign files in Å."""
