"""Accurate, fast, unconstrained interatomic potentials, with the symmetries of physics restored.

    import coset

    potential = coset.load_model("model.ckpt")
    results = coset.relax(potential, coset.from_ase(atoms))

Names are imported when they are first used, so that `import coset` costs little more than torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coset.ase_interface import Calculator as Calculator
    from coset.ase_interface import CalculatorPotential as CalculatorPotential
    from coset.ase_interface import fixed_atoms as fixed_atoms
    from coset.ase_interface import from_ase as from_ase
    from coset.ase_interface import read_structures as read_structures
    from coset.ase_interface import to_ase as to_ase
    from coset.ase_interface import write_structures as write_structures
    from coset.catalog import list_models as list_models
    from coset.checkpoint import load_checkpoint as load_checkpoint
    from coset.checkpoint import save_checkpoint as save_checkpoint
    from coset.diagnostics import inspect_installation as inspect_installation
    from coset.errors import CheckpointError as CheckpointError
    from coset.errors import ConfigError as ConfigError
    from coset.errors import CosetError as CosetError
    from coset.errors import MissingExtraError as MissingExtraError
    from coset.errors import StructureError as StructureError
    from coset.loading import LoadSettings as LoadSettings
    from coset.loading import load_model as load_model
    from coset.metatrain_import import import_metatrain as import_metatrain
    from coset.potential import ModelPotential as ModelPotential
    from coset.potential import Potential as Potential
    from coset.structures import Properties as Properties
    from coset.structures import Structures as Structures
    from coset.workflows.conductivity.results import Conductivity as Conductivity
    from coset.workflows.conductivity.results import ConductivitySettings as ConductivitySettings
    from coset.workflows.conductivity.run import conductivity as conductivity
    from coset.workflows.convex_hull import HullEntry as HullEntry
    from coset.workflows.elasticity.run import Elasticity as Elasticity
    from coset.workflows.elasticity.run import ElasticSettings as ElasticSettings
    from coset.workflows.elasticity.run import elastic as elastic
    from coset.workflows.eos import EosSettings as EosSettings
    from coset.workflows.eos import EquationOfState as EquationOfState
    from coset.workflows.eos import eos as eos
    from coset.workflows.evaluate import evaluate as evaluate
    from coset.workflows.hessian import hessian as hessian
    from coset.workflows.hull import HullDistance as HullDistance
    from coset.workflows.hull import HullSettings as HullSettings
    from coset.workflows.hull import hull as hull
    from coset.workflows.phonons.results import Phonons as Phonons
    from coset.workflows.phonons.results import PhononSettings as PhononSettings
    from coset.workflows.phonons.run import phonons as phonons
    from coset.workflows.quasi_harmonic import QuasiHarmonic as QuasiHarmonic
    from coset.workflows.quasi_harmonic import QuasiHarmonicSettings as QuasiHarmonicSettings
    from coset.workflows.quasi_harmonic import quasi_harmonic as quasi_harmonic
    from coset.workflows.relax import relax as relax
    from coset.workflows.relaxation import TIGHT as TIGHT
    from coset.workflows.relaxation import Relaxation as Relaxation
    from coset.workflows.relaxation import RelaxSettings as RelaxSettings

__version__ = "0.1.0"

_HOMES = {
    "coset.ase_interface": (
        "Calculator",
        "CalculatorPotential",
        "fixed_atoms",
        "from_ase",
        "read_structures",
        "to_ase",
        "write_structures",
    ),
    "coset.catalog": ("list_models",),
    "coset.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "coset.diagnostics": ("inspect_installation",),
    "coset.errors": (
        "CheckpointError",
        "ConfigError",
        "CosetError",
        "MissingExtraError",
        "StructureError",
    ),
    "coset.loading": ("LoadSettings", "load_model"),
    "coset.metatrain_import": ("import_metatrain",),
    "coset.potential": ("ModelPotential", "Potential"),
    "coset.structures": ("Properties", "Structures"),
    "coset.workflows.elasticity.run": ("ElasticSettings", "Elasticity", "elastic"),
    "coset.workflows.eos": ("EosSettings", "EquationOfState", "eos"),
    "coset.workflows.evaluate": ("evaluate",),
    "coset.workflows.conductivity.run": ("conductivity",),
    "coset.workflows.conductivity.results": ("Conductivity", "ConductivitySettings"),
    "coset.workflows.convex_hull": ("HullEntry",),
    "coset.workflows.hessian": ("hessian",),
    "coset.workflows.hull": ("HullDistance", "HullSettings", "hull"),
    "coset.workflows.phonons.results": ("PhononSettings", "Phonons"),
    "coset.workflows.phonons.run": ("phonons",),
    "coset.workflows.quasi_harmonic": (
        "QuasiHarmonic",
        "QuasiHarmonicSettings",
        "quasi_harmonic",
    ),
    "coset.workflows.relax": ("relax",),
    "coset.workflows.relaxation": ("TIGHT", "Relaxation", "RelaxSettings"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'coset' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """All public names."""
    return [*__all__, "__version__"]
