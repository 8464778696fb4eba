"""Named benchmarks: frozen settings, records that resume, one manifest with a hash."""

from collections.abc import Callable

from coset.protocols.elasticity import ElasticityProtocol
from coset.protocols.eos_acwf import EosAcwfProtocol
from coset.protocols.frequencies import Frequencies103Protocol
from coset.protocols.heat_capacity import HeatCapacityProtocol
from coset.protocols.kappa import TWELVE, KappaProtocol
from coset.protocols.records import Benchmark

PROTOCOLS: dict[str, Callable[[], Benchmark]] = {
    "elasticity": ElasticityProtocol,
    "eos-acwf": EosAcwfProtocol,
    "frequencies-103": Frequencies103Protocol,
    "heat-capacity": HeatCapacityProtocol,
    "kappa-103": KappaProtocol,
    "kappa-12": lambda: KappaProtocol(name="kappa-12", materials=TWELVE),
}
"""Every protocol by its name, with the settings that the name stands for."""

COMPLETE: dict[str, Callable[[], Benchmark]] = {
    "elasticity": lambda: ElasticityProtocol(subset=None),
    "heat-capacity": lambda: HeatCapacityProtocol(max_atoms=None),
}
"""Protocols that take a subset, without it."""
