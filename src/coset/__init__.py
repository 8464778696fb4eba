"""Accurate, fast, unconstrained interatomic potentials, with the symmetries of physics restored."""

__version__ = "0.1.0"
