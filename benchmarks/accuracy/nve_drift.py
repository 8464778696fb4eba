"""Energy drift of constant-energy molecular dynamics through the ASE calculator.

Usage: python nve_drift.py MODEL [--picoseconds 2] [--dtype float64]

Rattled crystals at 300 K, time steps of 0.5, 1 and 2 fs. Prints the slope of the total energy and
its spread; for exact forces the spread falls with the square of the time step.
"""

import argparse
import warnings

import numpy as np
import torch
from ase import units
from ase.build import bulk
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

import coset

CRYSTALS = {
    "Al32": lambda: bulk("Al", "fcc", 4.05, cubic=True) * (2, 2, 2),
    "Si64": lambda: bulk("Si", "diamond", 5.43, cubic=True) * (2, 2, 2),
    "NaCl64": lambda: bulk("NaCl", "rocksalt", 5.64, cubic=True) * (2, 2, 2),
}


def drift(calculator, atoms, time_step, picoseconds):
    """Slope (meV/atom/ps) and standard deviation (meV/atom) of the total energy."""
    atoms.calc = calculator
    generator = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=generator)
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, time_step * units.fs)
    times, energies = [], []

    def record():
        times.append(dynamics.get_time() / units.fs / 1000.0)
        energies.append(1000.0 * atoms.get_total_energy() / len(atoms))

    dynamics.attach(record)
    dynamics.run(int(1000 * picoseconds / time_step))
    slope = np.polyfit(times, energies, 1)[0]
    return slope, float(np.std(energies))


def main():
    """Run all crystals and time steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--picoseconds", type=float, default=2.0)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="one of the crystals")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    potential = coset.load_model(options.model, coset.LoadSettings(dtype=options.dtype))
    calculator = coset.Calculator(potential)
    for name, build in CRYSTALS.items():
        if options.only not in (None, name):
            continue
        for time_step in (2.0, 1.0, 0.5):
            slope, spread = drift(calculator, build(), time_step, options.picoseconds)
            print(
                f"{name:8s} {time_step:4.1f} fs: drift {slope:+.2e} meV/atom/ps, "
                f"spread {spread:.2e} meV/atom",
                flush=True,
            )


if __name__ == "__main__":
    main()
