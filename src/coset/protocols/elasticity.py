"""Protocol `elasticity`: moduli of binaries with relaxed ions, against PBE."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coset.errors import ConfigError, NotConvergedError, check_choice
from coset.potential import ModelPotential, Potential
from coset.protocols.metrics import error_metrics, finished
from coset.protocols.records import (
    Entry,
    Found,
    Metric,
    Published,
    Row,
    Value,
    hash_ordered,
    sha256_hex,
)
from coset.protocols.references import existing, read_values
from coset.structures import Structures
from coset.workflows.crystals import relaxed_crystals
from coset.workflows.elasticity.finite_strain import finite_strain
from coset.workflows.elasticity.run import ElasticSettings, elastic
from coset.workflows.elasticity.tensor import moduli
from coset.workflows.relaxation import TIGHT, RelaxSettings

FILE = "elasticity_mp_binaries.extxyz"
BULK, SHEAR = "bulk_modulus_GPa", "shear_modulus_GPa"
ROUTES = ("exact", "strains")


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticityProtocol:
    """Hill's means of the constants with relaxed ions, in the potential's own geometry.

    subset: so many of the materials, those whose keys have the smallest sha256; None is all.
    route: `exact`, second derivatives of a model; `strains`, slopes of the stress of any potential
    in strained cells of these `amplitudes`, ions relaxed to `force_tolerance` (eV/Å).
    """

    name: ClassVar[str] = "elasticity"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    packages: ClassVar[tuple[str, ...]] = ()
    parity: ClassVar[tuple[str, ...]] = (BULK, SHEAR)

    subset: int | None = 200
    route: Literal["exact", "strains"] = "exact"
    elastic: ElasticSettings = field(default_factory=lambda: ElasticSettings(frames=3))
    relaxation: RelaxSettings = TIGHT
    amplitudes: tuple[float, ...] = (-0.01, -0.005, 0.005, 0.01)
    force_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("route", self.route, ROUTES)

    def entries(self, data: Path) -> list[Entry]:
        """Binaries with both moduli."""
        found = read_values(existing(data, FILE), {"K_vrh": BULK, "G_vrh": SHEAR})
        return hash_ordered(found, sha256_hex)[: self.subset]

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """Bulk and shear modulus."""
        if self.route == "strains":
            return _found(entry, self._strained(potential, entry.structures))
        if not isinstance(potential, ModelPotential):
            raise ConfigError(
                "exact derivatives need a model whose edges are known",
                code="ExactNeedsModel",
                field="route",
                hint="route 'strains' takes any potential",
            )
        (result,) = elastic(potential, entry.structures, self.elastic)
        if result.constants is None:
            return Found(status=result.status, code=result.code, reason=result.reason)
        found = _found(entry, result.constants.tensor_GPa)
        if result.status == "ok":
            return found
        return replace(found, status=result.status, code=result.code, reason=result.reason)

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Errors of the materials without fault."""
        done = finished(rows)
        return (*error_metrics(done, BULK, unit="GPa"), *error_metrics(done, SHEAR, unit="GPa"))

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """None in these data."""
        return ()

    def _strained(self, potential: Potential, one: Structures) -> Float[Tensor, "6 6"]:
        (start,) = relaxed_crystals(potential, one, self.relaxation)
        if start.structures is None or start.status != "converged":
            raise NotConvergedError(start.reason, code=start.code)
        slopes = finite_strain(
            potential,
            start.structures,
            amplitudes=self.amplitudes,
            force_tolerance=self.force_tolerance,
        ).tensor_GPa
        return (slopes + slopes.mT) / 2.0


def _found(entry: Entry, constants: Float[Tensor, "6 6"]) -> Found:
    """Hill's means, without fault if the crystal is stable against every strain."""
    hill, lowest = moduli(constants), float(torch.linalg.eigvalsh(constants)[0])
    own = {BULK: hill.bulk_GPa, SHEAR: hill.shear_GPa}
    stable = lowest > 0.0
    return Found(
        status="ok" if stable else "not_converged",
        code="" if stable else "UnstableStrain",
        reason="" if stable else f"unstable against strain: {lowest:.3g} GPa in one direction",
        values=tuple(Value(name=n, own=v, reference=entry.values[n]) for n, v in own.items()),
    )
