"""Which relaxations lose symmetry: keep, nothing, averaging alone, and ASE's FixSymmetry.

Usage: python retention.py FILES... [--model NAME] [--count 1000] [--ase-count 100]
       [--average-count 100] [--threads 1]

Crystals are drawn from the files, symmetrized, displaced at random within their group (0.05 Å) and
strained within it (2 %), then relaxed to the same thresholds with the same potential. A relaxation
loses symmetry if its final structure at symprec 1e-5 has fewer operations than its start. Prints a
table and adds JSON rows to benchmarks/results/retention.jsonl.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

import coset
from coset.ase_interface import Calculator, from_ase, read_structures, to_ase
from coset.errors import StructureError
from coset.structures import Structures, concatenate, deform, select, split
from coset.symmetry.crystal import find_group, symmetrize
from coset.symmetry.projection import make_projector
from coset.units import GPA_PER_EV_PER_A3

RESULTS = Path(__file__).parent.parent / "results" / "retention.jsonl"
SYMPREC, FINAL = 1e-2, 1e-5
DISPLACEMENT, STRAIN = 0.05, 0.02


def start_of(one: Structures, seed: int) -> Structures:
    """The crystal in its group, displaced and strained at random within it."""
    one = one.to(torch.float64)
    group = find_group(one, SYMPREC)
    exact = symmetrize(one, group)
    projector = make_projector([group])
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(exact.positions.shape, generator=generator, dtype=torch.float64)
    strain = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    moves = projector.forces(DISPLACEMENT * moves)
    strain = projector.stress(STRAIN * 0.5 * (strain + strain.mT))
    moved = type(exact)(
        **{name: getattr(exact, name) for name in exact.__dataclass_fields__}
        | {"positions": exact.positions + moves}
    )
    return deform(moved, torch.eye(3, dtype=torch.float64) + strain)


def starts_of(files, potential, count, max_atoms):
    """`count` crystals of the files that the potential knows, with their groups at 1e-5 Å."""
    loaded = [s.structures for s in read_structures(files) if s.structures is not None]
    order = np.random.default_rng(0).permutation(len(loaded))
    starts, groups = [], []
    for place in order:
        one = loaded[place]
        known = set(one.atomic_numbers.tolist()) <= potential.elements
        if len(one.atomic_numbers) > max_atoms or not known or not bool(one.pbc.all()):
            continue
        try:
            start = start_of(one, int(place))
            group = find_group(start, FINAL)
        except StructureError:
            continue
        if group.order > 1:
            starts.append(start)
            groups.append(group)
        if len(starts) == count:
            break
    return concatenate(starts), groups


def with_coset(potential, starts, settings):
    """Final structures, converged, evaluations, seconds."""
    began = time.perf_counter()
    results = coset.relax(potential, starts, settings)
    seconds = time.perf_counter() - began
    finals = [result.structures for result in results]
    converged = [result.status == "converged" for result in results]
    return finals, converged, sum(result.n_evaluations for result in results), seconds


def with_ase(potential, starts, settings):
    """The same with FixSymmetry and BFGS, one structure after the other."""
    began, finals, converged, calls = time.perf_counter(), [], [], 0
    for one in split(starts):
        atoms = to_ase(one)[0]
        atoms.set_constraint(FixSymmetry(atoms, symprec=SYMPREC))
        atoms.calc = Calculator(potential)
        run = BFGS(FrechetCellFilter(atoms), logfile=None)
        done = False
        for _ in run.irun(fmax=0.0, steps=settings.max_steps):
            calls += 1
            force = np.linalg.norm(atoms.get_forces(), axis=1).max()
            stress = np.abs(atoms.get_stress()).max() * GPA_PER_EV_PER_A3
            done = force <= settings.force_tolerance and stress <= settings.stress_tolerance_GPa
            if done:
                break
        finals.append(from_ase(atoms))
        converged.append(bool(done))
    return finals, converged, calls, time.perf_counter() - began


def judged(name, outcome, groups):
    """One row: how many lost an operation, converged; evaluations and seconds per structure."""
    finals, converged, calls, seconds = outcome
    lost = [
        find_group(final, FINAL).order % group.order != 0
        for final, group in zip(finals, groups, strict=False)
    ]
    count = len(finals)
    row = {
        "method": name,
        "structures": count,
        "lost_percent": 100.0 * sum(lost) / count,
        "converged_percent": 100.0 * sum(converged) / count,
        "evaluations_per_structure": calls / count,
        "seconds_per_structure": seconds / count,
    }
    print(
        "  ".join(f"{k} {v:.4g}" if not isinstance(v, str) else f"{v:28}" for k, v in row.items())
    )
    sys.stdout.flush()
    return row


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default="coset-xs-0")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--ase-count", type=int, default=100)
    parser.add_argument("--average-count", type=int, default=100)
    parser.add_argument("--max-atoms", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    potential = coset.load_model(options.model)
    starts, groups = starts_of(options.files, potential, options.count, options.max_atoms)
    some, few = torch.arange(min(options.average_count, len(starts))), options.ase_count
    keep, free = coset.RelaxSettings(), coset.RelaxSettings(symmetry="free")
    averaged = coset.RelaxSettings(symmetry="free", average="standard")
    part = select(starts, torch.arange(min(few, len(starts))))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "model": options.model,
    }
    methods = [
        ("keep", lambda: with_coset(potential, starts, keep)),
        ("free", lambda: with_coset(potential, starts, free)),
    ]
    if len(some):
        methods += [
            ("keep, the part averaged", lambda: with_coset(potential, select(starts, some), keep)),
            ("free, averaged", lambda: with_coset(potential, select(starts, some), averaged)),
        ]
    if few:
        methods += [
            ("keep, the part of ASE", lambda: with_coset(potential, part, keep)),
            ("ASE FixSymmetry, BFGS", lambda: with_ase(potential, part, keep)),
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    for name, run in methods:
        row = judged(name, run(), groups)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts | row) + "\n")


if __name__ == "__main__":
    main()
