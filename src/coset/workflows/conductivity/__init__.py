"""Lattice thermal conductivity; `run` is where to begin."""
