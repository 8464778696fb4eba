"""Protocol `frequencies-103`: phonons of binaries in the supercells of their PBE reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from coset.errors import StructureError
from coset.potential import Potential
from coset.protocols.metrics import finished, mean_metrics
from coset.protocols.records import (
    Entry,
    Found,
    Metric,
    Published,
    Row,
    Spectrum,
    Value,
    hash_ordered,
    sha256_hex,
)
from coset.protocols.references import existing, read_lines, read_spectra
from coset.workflows.harmonic import HarmonicSettings, harmonic_supercell
from coset.workflows.relaxation import TIGHT

STRUCTURES = "kappa103/phononDB-PBE-structures.extxyz"
PHONONS = "kappa103/kappas_phononDB_PBE_noNAC.json.gz"
PUBLISHED = "kappa103/published-models.jsonl"
MAE, BIAS, DISTANCE = "frequency_mae_THz", "frequency_bias_THz", "spectrum_distance_THz"
LARGEST, IMAGINARY = "max_frequency_THz", "imaginary"
QUANTILES = 33
"""Of every spectrum, kept for parity plots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frequencies103Protocol:
    """Frequencies at all wave vectors of the reference, without polar terms.

    gamma_tolerance: THz, how imaginary translations at Gamma may be.
    """

    name: ClassVar[str] = "frequencies-103"
    files: ClassVar[tuple[str, ...]] = (STRUCTURES, PHONONS)
    packages: ClassVar[tuple[str, ...]] = ("phonopy",)
    parity: ClassVar[tuple[str, ...]] = ()

    harmonic: HarmonicSettings = field(
        default_factory=lambda: HarmonicSettings(
            amplitude=0.03, relaxation=replace(TIGHT, max_steps=300)
        )
    )
    gamma_tolerance_THz: float = 0.01

    def entries(self, data: Path) -> list[Entry]:
        """All materials."""
        found = read_spectra(existing(data, STRUCTURES), existing(data, PHONONS))
        return hash_ordered(found, sha256_hex)

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """Errors of the modes, branch by branch, and quantiles of both spectra."""
        spectrum = entry.spectrum
        assert spectrum is not None
        found = harmonic_supercell(potential, entry.structures, self.harmonic, spectrum.supercell)
        q = spectrum.q_points @ np.linalg.inv(spectrum.primitive_matrix)
        own = found.frequencies_THz(q)
        if own.shape != spectrum.frequency_THz.shape:
            raise StructureError(
                f"{own.shape[1]} branches, expected {spectrum.frequency_THz.shape[1]}",
                code="OtherPrimitiveCell",
            )
        levels = np.linspace(0.0, 1.0, QUANTILES)
        curves = [
            quantiles(values, spectrum.weights, levels) for values in (own, spectrum.frequency_THz)
        ]
        return Found(
            status=found.status,
            code=found.code,
            reason=found.reason,
            values=self._values(own, spectrum),
            own=tuple(curves[0].round(4).tolist()),
            reference=tuple(curves[1].round(4).tolist()),
        )

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Means over the materials."""
        done = finished(rows)
        return (
            *mean_metrics(done, MAE),
            *mean_metrics(done, BIAS),
            *mean_metrics(done, DISTANCE),
            *mean_metrics(done, IMAGINARY, _percent, called="with_imaginary_modes_percent"),
        )

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """Distances of spectra and imaginary modes of other models, over the same materials."""
        path = data / PUBLISHED
        if not path.is_file():
            return ()
        head, *models = read_lines(path)
        names = head["_base"]["material_ids"]
        places = [place for place, name in enumerate(names) if name in set(keys)]
        found = [_published(model, places) for model in models]
        return tuple(sorted(found, key=lambda one: one.metrics[0].value))

    def _values(
        self, own: Float[ndarray, "points branches"], spectrum: Spectrum
    ) -> tuple[Value, ...]:
        weights = spectrum.weights / spectrum.weights.sum()
        error = own - spectrum.frequency_THz
        imaginary = is_imaginary(own, spectrum.q_points, self.gamma_tolerance_THz)
        return (
            Value(name=MAE, own=float(weights @ np.abs(error).mean(axis=1))),
            Value(name=BIAS, own=float(weights @ error.mean(axis=1))),
            Value(
                name=DISTANCE,
                own=spectrum_distance(own, spectrum.frequency_THz, spectrum.weights),
            ),
            Value(
                name=LARGEST, own=float(own.max()), reference=float(spectrum.frequency_THz.max())
            ),
            Value(name=IMAGINARY, own=float(imaginary)),
        )


def is_imaginary(
    frequencies: Float[ndarray, "points branches"],
    q: Float[ndarray, "points 3"],
    tolerance: float,
) -> bool:
    """Whether a mode off Gamma or an optical one is negative, or a translation below -tolerance."""
    at_gamma = np.abs(q - np.rint(q)).max(axis=1) < 1e-8
    translations = frequencies[at_gamma, :3]
    others = (frequencies[~at_gamma].ravel(), frequencies[at_gamma, 3:].ravel())
    return bool((np.concatenate(others) < 0.0).any() or (translations < -tolerance).any())


def spectrum_distance(
    one: Float[ndarray, "points branches"],
    other: Float[ndarray, "points branches"],
    weights: Int[ndarray, " points"],
) -> float:
    """Mean distance between modes of equal rank in both spectra (Wasserstein-1), THz."""
    counts = np.repeat(weights, one.shape[1])
    first, second = (np.repeat(values.ravel(), counts) for values in (one, other))
    return float(np.abs(np.sort(first) - np.sort(second)).mean())


def quantiles(
    values: Float[ndarray, "points branches"],
    weights: Int[ndarray, " points"],
    levels: Float[ndarray, " levels"],
) -> Float[ndarray, " levels"]:
    """Of all modes of the mesh."""
    everything = np.repeat(values.ravel(), np.repeat(weights, values.shape[1]))
    return np.asarray(np.quantile(everything, levels))


def _percent(values: Float[ndarray, " rows"]) -> float:
    return 100.0 * float(values.mean())


def _published(model: dict[str, list[float | None]], places: list[int]) -> Published:
    distances = [d for place in places if (d := model["freq_w1"][place]) is not None]
    imaginary = [bool(model["imag_modes"][place]) for place in places]
    metrics = (
        _metric(DISTANCE, np.array(distances, dtype=float)),
        _metric("with_imaginary_modes_percent", 100.0 * np.array(imaginary, dtype=float)),
    )
    return Published(name=str(model["label"]), metrics=metrics)


def _metric(name: str, values: Float[ndarray, " rows"]) -> Metric:
    mean = float(values.mean()) if len(values) else float("nan")
    return Metric(name=name, group="all", value=mean, count=len(values))
