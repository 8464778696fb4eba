"""The named protocols for published potentials, with records like those of `coset bench`.

Usage:
    python protocol_peers.py NAME --peer chgnet|sevennet --data FOLDER -o FOLDER [--limit N]

FOLDER of the data as for `coset bench`. The environment is that of
`benchmarks/accuracy/model_card/subjects.py`. These potentials know no exact derivatives: elastic
constants come from strained cells, phonons from displacements of 0.03 Å in the same supercells.
Their network runs in float32, so that relaxations end at 0.005 eV/Å and 0.02 GPa.
"""

import argparse
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "accuracy"))

from model_card.subjects import PUBLISHED

from coset.protocols.elasticity import ElasticityProtocol
from coset.protocols.eos_acwf import EosAcwfProtocol
from coset.protocols.frequencies import Frequencies103Protocol
from coset.protocols.heat_capacity import HeatCapacityProtocol
from coset.protocols.kappa import TWELVE, KappaProtocol
from coset.protocols.manifest import manifest_of
from coset.protocols.runs import run_benchmark
from coset.workflows.conductivity.results import PHONONDB_V1
from coset.workflows.harmonic import HarmonicSettings
from coset.workflows.relaxation import RelaxSettings

RELAXATION = RelaxSettings(force_tolerance=0.005, stress_tolerance_GPa=0.02, max_steps=300)
HARMONIC = HarmonicSettings(route="displacements", amplitude=0.03, relaxation=RELAXATION)
PROTOCOLS = {
    "elasticity": ElasticityProtocol(
        route="strains", relaxation=RELAXATION, force_tolerance=RELAXATION.force_tolerance
    ),
    "eos-acwf": EosAcwfProtocol(),
    "frequencies-103": Frequencies103Protocol(harmonic=HARMONIC),
    "heat-capacity": HeatCapacityProtocol(harmonic=HARMONIC),
    "kappa-12": KappaProtocol(
        name="kappa-12",
        materials=TWELVE,
        conductivity=replace(PHONONDB_V1, relaxation=RELAXATION),
    ),
}


def main():
    """Measure one potential with one protocol; the same command goes on."""
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    subject, benchmark = PUBLISHED[options.peer](), PROTOCOLS[options.name]
    manifest = manifest_of(benchmark, options.data, subject.facts(), torch.device("cpu"))
    entries, start = benchmark.entries(options.data)[: options.limit], time.monotonic()

    def observer(done, last):
        said = "" if last is None else f"{last.formula} {last.status}"
        seconds = time.monotonic() - start
        print(
            f"\r{done}/{len(entries)} after {seconds:.0f} s {said}      ", end="", file=sys.stderr
        )
        return False

    rows = run_benchmark(
        benchmark, subject.potential, manifest, entries, options.output, observer=observer
    )
    bad = [f"{row.formula} {row.code}" for row in rows if row.status != "ok"]
    print(f"\n{subject.name}, {options.name}: {len(rows)} of {len(entries)}; not ok: {bad}")
    print(f"settings {manifest.settings_sha256[:12]}, manifest {manifest.sha256[:12]}")
    for metric in benchmark.summary(rows):
        print(f"{metric.name:36} {metric.group:7} {metric.value:10.4g} ({metric.count})")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PROTOCOLS)
    parser.add_argument("--peer", choices=PUBLISHED, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
