"""What it costs to remove the orientation from an energy: coset's rules against metatomic's grids.

Usage: python cost.py MODEL.ckpt --python PYTHON_WITH_METATRAIN [--orientations 8] [--few 6]
       [--repeats 3] [--crystals Si Al] [--substitute Si=Al O=Ni] [--threads 1]

Energy, forces and stress of one checkpoint in float64, of five crystals, in random orientations and
in the one where the cell lies along the axes. Ours is `coset.evaluate` at its levels; theirs are
SymmetrizedCalculator and SymmetrizedModel in a process of their own (symmetrized_worker.py). Errors
are against the mean over several random offsets of our rule of degree 9, projected. Our rules turn
with the crystal, so their errors are the same in all orientations: those of the same rules with
random offsets are given, too.
First come the times: after a warm-up both codes in turn, medians of `repeats`, each in another
orientation. Adds a JSON row per crystal to benchmarks/results/symmetry-cost.jsonl, which
cost_report.py reads. With --keep FILE the other code's values are kept there for another run.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ase.data import atomic_numbers
from crystals import crystals, exact

import coset
from coset.ase_interface import to_ase
from coset.loading import LoadSettings
from coset.structures import rotate
from coset.symmetry.average import averaged_properties
from coset.symmetry.certificate import certify
from coset.symmetry.crystal import find_group
from coset.symmetry.projection import make_projector
from coset.symmetry.rules import LEVELS, coset_rule, haar_offsets, identify
from coset.units import GPA_PER_EV_PER_A3

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "symmetry-cost.jsonl"
OURS = ("none", "project", "standard", "tight")
CHEAP = ("plain", "calculator 3", "calculator 3 proper", "model", "model 3")
SLOW = (
    "calculator 3 group",
    *("calculator 5", "calculator 5 proper", "model 5"),
    *("calculator 7", "calculator 7 proper", "model 7"),
)
METHODS = (*OURS, *CHEAP, *SLOW)
SEED = 300
"""Of the random orientations in which errors are taken."""
WARM_UP = 2
MOST = 6_500
"""Atoms times evaluations: calls that take more, minutes, are not made."""
QUANTITIES = ("energy_meV_per_atom", "forces_meV_per_A", "stress_GPa")


@dataclass(frozen=True, kw_only=True)
class Values:
    """eV, eV/Å, eV/Å³."""

    energy: float
    forces: torch.Tensor
    stress: torch.Tensor

    def turned(self, turn: torch.Tensor) -> "Values":
        """Those of the crystal turned by a matrix."""
        return Values(
            energy=self.energy,
            forces=self.forces @ turn.mT,
            stress=turn @ self.stress @ turn.mT,
        )

    def error(self, other: "Values") -> list[float]:
        """Difference of the energies, largest component of that of forces and of stress."""
        return [
            1e3 * abs(self.energy - other.energy) / len(self.forces),
            1e3 * float((self.forces - other.forces).abs().max()),
            GPA_PER_EV_PER_A3 * float((self.stress - other.stress).abs().max()),
        ]


class Counting:
    """An edge model that counts the rotated copies it is evaluated for."""

    def __init__(self, model: Any) -> None:
        """Nothing counted."""
        self.model, self.count = model, 0
        self.geometry, self.memory_per_batch = model.geometry, model.memory_per_batch

    def network(self, edge_vectors, *rest, **options):
        """The network of the model."""
        self.count += len(edge_vectors)
        return self.model.network(edge_vectors, *rest, **options)


class Ours:
    """coset.evaluate."""

    def __init__(self, checkpoint):
        """Load the model."""
        potential = coset.load_model(checkpoint, LoadSettings(dtype="float64", device="cpu"))
        self.counter = Counting(potential.model)
        self.potential = replace(potential, model=self.counter)

    def __call__(self, method, one):
        """Values, seconds, evaluations."""
        self.counter.count = 0
        start, cpu = time.perf_counter(), time.process_time()
        (found,) = coset.evaluate(self.potential, one, average=method)
        seconds = [time.perf_counter() - start, time.process_time() - cpu]
        if found.properties is None:
            raise RuntimeError(f"{found.code}: {found.reason}")
        own = found.properties
        values = Values(energy=float(own.energy[0]), forces=own.forces, stress=own.stress[0])
        return values, seconds, self.counter.count


class Theirs:
    """The process that has metatomic."""

    def __init__(self, python, checkpoint, threads, keep):
        """Start it and wait for its versions."""
        self.keep = None if keep is None else Path(keep)
        self.kept = {}
        if self.keep is not None and self.keep.exists():
            self.kept = dict(json.loads(line) for line in self.keep.open(encoding="utf-8"))
        self.digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
        worker = HERE / "symmetrized_worker.py"
        command = (python, worker, checkpoint, "--threads", str(threads))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = json.loads(self.process.stdout.readline())

    def remembered(self, method, one):
        """The same, from an earlier run if it is kept."""
        if self.keep is None:
            return self(method, one)
        content = self.digest + method + repr((one.positions.tolist(), one.cell.tolist()))
        key = hashlib.sha256(content.encode()).hexdigest()
        if key not in self.kept:
            values, seconds, count = self(method, one)
            row = values.energy, values.forces.tolist(), values.stress.tolist(), seconds, count
            self.kept[key] = row
            with self.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, row]) + "\n")
        energy, forces, stress, seconds, count = self.kept[key]
        tensors = (torch.tensor(x, dtype=torch.float64) for x in (forces, stress))
        forces, stress = tensors
        return Values(energy=energy, forces=forces, stress=stress), seconds, count

    def __call__(self, method, one):
        """Values, seconds, evaluations."""
        found = self.ask(method, one)
        values = Values(
            energy=found["energy"],
            forces=torch.tensor(found["forces"], dtype=torch.float64),
            stress=torch.tensor(found["stress"], dtype=torch.float64),
        )
        return values, found["seconds"], found["evaluations"]

    def count(self, method, one):
        """Evaluations, without any."""
        return self.ask(method, one, count=True)["evaluations"]

    def ask(self, method, one, **extra):
        """The answer to a request."""
        atoms = to_ase(one)[0]
        request = extra | {
            "method": method,
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.tolist(),
            "pbc": atoms.pbc.tolist(),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def averages(ours, one, degree, count, seed):
    """Projected averages by a rule with random offsets."""
    group = find_group(one, 1e-5)
    projector = make_projector([group])
    operations = torch.from_numpy(group.cartesian_rotations)
    found = []
    for offset in haar_offsets(count, seed):
        rule = coset_rule(operations, degree, offset=offset)
        own, _ = certify(averaged_properties(ours.potential, one, [rule]), projector)
        found.append(Values(energy=float(own.energy[0]), forces=own.forces, stress=own.stress[0]))
    return found


def reference_of(ours, one, count):
    """The mean over random offsets of the rule of degree 9, and its standard error."""
    found = averages(ours, one, 9, count, seed=100)
    mean = Values(
        energy=sum(v.energy for v in found) / count,
        forces=torch.stack([v.forces for v in found]).mean(0),
        stress=torch.stack([v.stress for v in found]).mean(0),
    )
    return mean, {name: x / (count - 1) ** 0.5 for name, x in rms(found, [mean] * count).items()}


def rms(found, expected):
    """Root mean squares of the errors."""
    errors = torch.tensor([a.error(b) for a, b in zip(found, expected, strict=True)])
    return dict(zip(QUANTITIES, errors.square().mean(0).sqrt().tolist(), strict=True))


def warm_up(ours, theirs, one):
    """Evaluations of every method; those not too dear called until they are as fast as they get."""
    counts = {}
    for method in METHODS:
        if method not in OURS:
            counts[method] = theirs.count(method, one)
            if counts[method] * len(one.atomic_numbers) > MOST:
                continue
        for turn in haar_offsets(1 if method in SLOW else WARM_UP, seed=200):
            _, _, counts[method] = (ours if method in OURS else theirs)(method, rotate(one, turn))
    return counts


def made(counts, one):
    """The methods that are tried on a crystal."""
    return [name for name in METHODS if counts[name] * len(one.atomic_numbers) <= MOST]


def times_of(ours, theirs, one, counts, repeats):
    """Median seconds of every method on the clock and of the processor, all in turn."""
    seconds = {method: [] for method in made(counts, one)}
    for number, turn in enumerate(haar_offsets(repeats, seed=201)):
        for method, taken in seconds.items():
            if number and method in SLOW:
                continue
            taken.append((ours if method in OURS else theirs)(method, rotate(one, turn))[1])
    return [
        {method: median(pair[kind] for pair in taken) for method, taken in seconds.items()}
        for kind in (0, 1)
    ]


def errors_of(code, method, one, turns, reference):
    """Root mean squares over the orientations."""
    found = [code(method, rotate(one, turn))[0] for turn in turns]
    return rms(found, [reference.turned(turn) for turn in turns])


def facts_of(one):
    """What the crystal is."""
    group = find_group(one, 1e-5)
    operations = torch.from_numpy(group.cartesian_rotations)
    return {
        "atoms": len(one.atomic_numbers),
        "primitive_atoms": len(group.first_atoms),
        "space_group": group.number,
        "point_group": identify(operations).hermann_mauguin,
    }


def check_agreement(name, one, ours, theirs):
    """The largest differences of a plain evaluation, which must be those of rounding."""
    difference = ours("none", one)[0].error(theirs("plain", one)[0])
    if difference[0] > 1e-6 or difference[1] > 1e-3 or difference[2] > 1e-5:
        raise RuntimeError(f"the codes differ on {name}: {difference} ({QUANTITIES})")
    return dict(zip(QUANTITIES, difference, strict=True))


def errors_in_all(name, one, counts, ours, theirs, options):
    """Errors of every method in random orientations and along the axes, and of the reference."""
    reference, uncertainty = reference_of(ours, one, options.references)
    turns, along = haar_offsets(options.orientations, SEED), torch.eye(3).double()[None]
    random, aligned = {}, {}
    for method in made(counts, one):
        code = ours if method in OURS else theirs.remembered
        own = turns[: options.few] if method in SLOW else turns
        random[method] = errors_of(code, method, one, own, reference)
        aligned[method] = errors_of(code, method, one, along, reference)
        say(f"{name:8} {method:20} {random[method]}")
    count = options.orientations
    offset = {
        level: rms(averages(ours, one, LEVELS[level].degree, count, 400), [reference] * count)
        for level in ("standard", "tight")
    }
    return {
        "reference_error": uncertainty,
        "errors": random,
        "aligned_errors": aligned,
        "offset_errors": offset,
    }


def say(text):
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def parsed():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--python", required=True, help="interpreter that has metatrain")
    parser.add_argument("--label", default="", help="what the checkpoint is, for the table")
    parser.add_argument("--crystals", nargs="*", default=list(crystals()))
    parser.add_argument("--substitute", nargs="*", default=[], help="Si=Al: an unknown element")
    parser.add_argument("--orientations", type=int, default=8)
    parser.add_argument("--few", type=int, default=6, help="orientations of dear methods")
    parser.add_argument("--references", type=int, default=10, help="offsets of the reference")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", help="file for the values of the other code")
    return parser.parse_args()


def main() -> None:
    """Measure every crystal."""
    options = parsed()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    pairs = [pair.split("=") for pair in options.substitute]
    substitutes = {atomic_numbers[a]: atomic_numbers[b] for a, b in pairs}
    ours = Ours(options.checkpoint)
    theirs = Theirs(options.python, options.checkpoint, options.threads, options.keep)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "model": options.label or Path(options.checkpoint).name,
        "versions": theirs.versions | {"coset": coset.__version__, "our torch": torch.__version__},
        "orientations": [options.orientations, options.few],
        "references": options.references,
    }
    chosen = {name: exact(crystals()[name], substitutes) for name in options.crystals}
    agreement = {name: check_agreement(name, one, ours, theirs) for name, one in chosen.items()}
    counts = {name: warm_up(ours, theirs, one) for name, one in chosen.items()}
    say("warm")
    seconds = {
        name: times_of(ours, theirs, one, counts[name], options.repeats)
        for name, one in chosen.items()
    }
    say("times are done")
    RESULTS.parent.mkdir(exist_ok=True)
    for name, one in chosen.items():
        row = (
            facts
            | facts_of(one)
            | {
                "crystal": name,
                "plain_difference": agreement[name],
                "evaluations": counts[name],
                "seconds": seconds[name][0],
                "processor_seconds": seconds[name][1],
            }
        )
        row |= errors_in_all(name, one, counts[name], ours, theirs, options)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
