"""Time of energy, forces and stress with one thread.

It is the processor time of the process, so that other work on the machine counts little. With one
thread that has a core to itself it is the time on the clock.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk

from coset.ase_interface import from_ase
from coset.structures import Structures, concatenate
from model_card.subjects import Progress, Subject

CELLS = 32
CASES = ("one cell of 8 atoms", f"{CELLS} cells of 8 atoms", "one cell of 108 atoms")
REPEATS = 9
RATTLE = 0.02


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Median time of a call and atoms per second; published potentials take one cell at a time."""
    torch.set_num_threads(1)
    small = from_ase(bulk("NaCl", "rocksalt", a=5.64, cubic=True))
    large = from_ase(bulk("Cu", "fcc", a=3.63, cubic=True) * (3, 3, 3))
    cases = (small, concatenate([small] * CELLS), large)
    rows = {}
    for number, (name, structures) in enumerate(zip(CASES, cases, strict=True)):
        progress(number, len(cases))
        seconds = _seconds(subject, structures)
        rows[name] = {
            "ms_per_call": 1e3 * seconds,
            "atoms_per_second": len(structures.positions) / seconds,
        }
    return rows


def _seconds(subject: Subject, structures: Structures) -> float:
    """Median over calls, each with new positions; the first two only warm up."""
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(REPEATS + 2):
        noise = torch.randn(structures.positions.shape, generator=generator, dtype=torch.float64)
        moved = replace(structures, positions=structures.positions + RATTLE * noise)
        start = time.process_time()
        subject.potential(moved)
        times.append(time.process_time() - start)
    return float(np.median(times[2:]))
