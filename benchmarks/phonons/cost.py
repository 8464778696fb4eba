"""What phonons cost at equal error: coset's routes against phonopy with metatomic calculators.

Usage: python cost.py MODEL.ckpt --python PYTHON_WITH_METATRAIN [--crystals Si NaCl TiO2 CaTiO3]
       [--turns 6] [--few 2] [--reference reference] [--references 4] [--methods ...]
       [--threads 1] [--output FILE]

Both codes evaluate one checkpoint in float64, on the same relaxed primitive cell (coset, space
group kept, average `tight`) and the same supercell. The other code is phonopy in a process of its
own (phonopy_worker.py): its default displacements, these with
both signs, or all of them, with the plain calculator or with SymmetrizedCalculator. Each of its
methods is run in random orientations of the crystal, each of ours with random offsets of its rule;
both in turn. Every run is one sample of D(q) at one wave vector of each star of the mesh. Errors
are the largest difference of a frequency from those of the mean of several offsets of our rule of
degree 9, translations at Gamma left out: root mean square over the means of any 1, 2, ... of the
samples, which take the time of so many. Times are medians.
Adds a JSON row per crystal to benchmarks/results/phonons-cost.jsonl, which cost_report.py reads.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import torch
from phonon_crystals import case_of, starting_points

import coset
from coset.loading import LoadSettings
from coset.symmetry.average import sample_rules
from coset.symmetry.rules import haar_offsets
from coset.workflows.phonons.interpolation import interpolation
from coset.workflows.phonons.mesh import action_of, star_average
from coset.workflows.phonons.modes import eigenvalues, in_thz
from coset.workflows.phonons.samples import (
    displacement_samples,
    exact_evaluator,
    exact_samples,
    irreducible_samples,
    mass_roots,
)

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "phonons-cost.jsonl"
OURS = (
    *("exact irreducible", "exact project", "exact light", "exact standard", "exact tight"),
    "displacements project",
)
THEIRS = ("plain default", "plain irreducible", "plain all", "calculator 3 irreducible")
OFFSETS = 16
"""Random rotations drawn at once: those of neighboring seeds are not independent."""
MOST_ATOMS = 40
"""Primitive cells from which on only one supercell of SymmetrizedCalculator is timed."""


class Ours:
    """The parts of `coset.phonons` that make force constants."""

    def __init__(self, checkpoint):
        """Load the model."""
        self.potential = coset.load_model(checkpoint, LoadSettings(dtype="float64", device="cpu"))
        self.single = self.potential.single_precision()

    def __call__(self, method, case, number):
        """D(q) with the rule turned by random offset `number`, and the seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        route, level = method.split()
        few, group = level == "irreducible", case.primitive.group
        level = "project" if few else level
        rules = sample_rules(case.one, group, level, OFFSETS, 1000)[number : number + 1]
        action = action_of(case.one, group)
        if few:
            found = irreducible_samples(
                self.single, case.one, rules, case.mesh, action, case.masses
            )
        elif route == "exact":
            evaluate = exact_evaluator(self.single, case.one, rules, case.masses)
            found = exact_samples(evaluate, case.mesh, action, case.masses)
        else:
            found = displacement_samples(self.potential, case.primitive, rules, case.mesh, 0.01)
        constants = found.force_constants / mass_roots(case.masses)
        matrices = interpolation(case.one, case.mesh, constants).matrices(case.q)[0]
        return matrices, [time.perf_counter() - start, time.process_time() - cpu]

    def at_points(self, level, case, count):
        """D(q) of `count` offsets of the rule of a level, at the wave vectors alone."""
        rules = sample_rules(case.one, case.primitive.group, level, count, 7000)
        evaluate = exact_evaluator(self.potential, case.one, rules, case.masses)
        return star_average(evaluate, case.q, case.action)


class Theirs:
    """The process that has phonopy and metatomic."""

    def __init__(self, python, checkpoint, threads):
        """Start it and wait for its versions."""
        command = (python, HERE / "phonopy_worker.py", checkpoint, "--threads", str(threads))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = json.loads(self.process.stdout.readline())

    def __call__(self, method, case, number, **extra):
        """D(q) in random orientation `number`, the seconds, and what else the answer says."""
        calculator, displacements = method.rsplit(" ", 1)
        request = extra | {
            "method": calculator,
            "displacements": displacements,
            "turn": haar_offsets(OFFSETS, 500)[number].tolist(),
            "numbers": case.one.atomic_numbers.tolist(),
            "positions": case.one.positions.tolist(),
            "cell": case.one.cell[0].tolist(),
            "mesh": case.mesh,
            "q": case.q.tolist(),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        parts = answer.pop("matrices", None)
        matrices = None if parts is None else np.array(parts[0]) + 1j * np.array(parts[1])
        return matrices, answer.pop("seconds"), answer


def frequencies(matrices, case):
    """THz, translations at Gamma set to zero."""
    return in_thz(eigenvalues(matrices[None], case.q, case.masses)[0])


def errors_of(samples, expected, case):
    """Largest error (THz) of the means of 1, 2, ... samples, root mean square over all choices."""
    squares = []
    for count in range(1, len(samples) + 1):
        means = [np.mean(chosen, axis=0) for chosen in combinations(samples, count)]
        largest = [np.abs(frequencies(one, case) - expected).max() for one in means]
        squares.append(np.mean(np.square(largest)))
    return np.sqrt(squares).tolist()


def reference_of(ours, case, level, count):
    """Frequencies of the mean over random offsets, and the error of that mean (THz)."""
    samples = ours.at_points(level, case, count)
    expected = frequencies(samples.mean(axis=0), case)
    single = errors_of(samples, expected, case)[0]
    return expected, single / max(count - 1, 1) ** 0.5


def run(ours, theirs, case, options):
    """Samples and seconds of every method, both codes in turn."""
    samples, seconds, facts = {}, {}, {}
    methods = [name for name in options.methods if name != "exact light" or has_light(case)]
    for number in range(options.turns):
        for method in methods:
            cheap = method in ("exact irreducible", "exact project") or method.startswith("plain")
            dear = not cheap
            if number >= (options.few if dear else options.turns):
                continue
            own = method in OURS
            if not own and "calculator" in method and len(case.masses) >= MOST_ATOMS:
                estimate(theirs, method, case, number, facts)
                continue
            found = (ours if own else theirs)(method, case, number)
            samples.setdefault(method, []).append(found[0])
            seconds.setdefault(method, []).append(found[1])
            facts[method] = {} if own else found[2]
            say(f"{method} {number}: {found[1]}")
    return samples, seconds, facts


def has_light(case):
    """Whether `light` has several nodes in this crystal; with one it is `project`."""
    (rule,) = sample_rules(case.one, case.primitive.group, "light", 1)
    return len(rule.weights) > 1


def estimate(theirs, method, case, number, facts):
    """Seconds of all supercells from those of one."""
    if number:
        return
    _, taken, answer = theirs(method, case, number, most=1)
    wall, cpu = (x * answer["supercells"] for x in taken)
    facts[method] = answer | {
        "estimated": True,
        "seconds": wall,
        "processor_seconds": cpu,
        "samples": 0,
    }


def row_of(ours, theirs, name, options):
    """Everything about one crystal."""
    case = case_of(ours.potential, name)
    say(f"{name}: mesh {case.mesh}, {len(case.q)} wave vectors")
    samples, seconds, facts = run(ours, theirs, case, options)
    expected, uncertainty = reference_of(ours, case, options.reference, options.references)
    say(f"reference ± {uncertainty}")
    methods = {}
    for method, known in facts.items():
        methods[method] = dict(known)
        if method in samples:
            wall, cpu = (median(pair[kind] for pair in seconds[method]) for kind in (0, 1))
            methods[method] |= {
                "samples": len(samples[method]),
                "seconds": wall,
                "processor_seconds": cpu,
                "errors_THz": errors_of(samples[method], expected, case),
            }
        say(f"{method}: {methods[method]}")
    return {
        "crystal": name,
        "atoms": len(case.masses),
        "space_group": case.primitive.group.number,
        "mesh": case.mesh,
        "wave_vectors": len(case.q),
        "highest_THz": float(expected.max()),
        "lowest_THz": float(expected.min()),
        "reference": [options.reference, options.references],
        "reference_error_THz": uncertainty,
        "methods": methods,
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
    parser.add_argument("--crystals", nargs="*", default=list(starting_points()))
    parser.add_argument("--methods", nargs="*", default=[*OURS, *THEIRS])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--few", type=int, default=2, help="samples of methods that take long")
    parser.add_argument("--reference", default="reference", help="level of the reference")
    parser.add_argument("--references", type=int, default=4, help="offsets of the reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure every crystal."""
    options = parsed()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    ours = Ours(options.checkpoint)
    theirs = Theirs(options.python, options.checkpoint, options.threads)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "model": options.label or Path(options.checkpoint).name,
        "versions": theirs.versions | {"coset": coset.__version__, "our torch": torch.__version__},
    }
    for name in options.crystals:
        row = facts | row_of(ours, theirs, name, options)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
