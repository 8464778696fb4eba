"""Write the training and validation files of the demonstration model.

Usage: python make_dataset.py CORPUS [--output FOLDER] [--limit N]

CORPUS is a folder of labeled shards (train-NNN.npz, valid-NNN.npz). Frames that contain
only the elements below and no force above MAX_FORCE are written as extended XYZ with the
keys E (eV), F (eV/Å) and S (eV/Å³, NaN where the frame is not periodic in three directions).
Whole formulas, about one in sixty, are set aside for validation.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

ELEMENTS = tuple(
    "H Li B C N O F Na Mg Al Si P S Cl Ca Ti Fe Ni Cu Zn Ga As Sr Mo Cs Ba W Au".split()  # noqa: SIM905
)
MAX_FORCE = 20.0
# Share of frames kept, by kind number of the corpus; kinds not listed are kept in full.
KEEP = {7: 0.5, 9: 0.5, 10: 0.7, 12: 0.7, 13: 0.3, 14: 0.0}
VALIDATION_MODULUS, VALIDATION_RESIDUE = 60, 48  # a class without common compounds


def read_frames(folder):
    """Yield every frame of every shard as a dictionary."""
    for path in sorted(Path(folder).glob("*-*.npz")):
        data = dict(np.load(path))
        for index, (start, stop) in enumerate(pairwise(data["ptr"])):
            frame = {key: data[key][start:stop] for key in ("numbers", "positions", "forces")}
            for key in ("cell", "pbc", "energy", "stress", "kind", "formula_hash"):
                frame[key] = data[key][index]
            yield frame


def is_wanted(frame, allowed, rng):
    """Return whether a frame has only allowed elements, moderate forces, and is drawn."""
    if not allowed[frame["numbers"]].all():
        return False
    if np.linalg.norm(frame["forces"], axis=1).max() > MAX_FORCE:
        return False
    return rng.random() < KEEP.get(int(frame["kind"]), 1.0)


def is_held_out(frame):
    """Return whether the frame's formula belongs to the validation set."""
    return int(frame["formula_hash"]) // 10 % VALIDATION_MODULUS == VALIDATION_RESIDUE


def to_extxyz(frame):
    """Format one frame as an extended XYZ block."""
    cell = np.where(frame["pbc"][:, None], frame["cell"], 0.0)
    lattice = " ".join(f"{x:.8f}" for x in cell.ravel())
    stress = " ".join(f"{x:.8f}" for x in frame["stress"].ravel())
    pbc = " ".join("FT"[int(p)] for p in frame["pbc"])
    lines = [
        f"{len(frame['numbers'])}",
        f'Lattice="{lattice}" Properties=species:S:1:pos:R:3:F:R:3 '
        f'E={frame["energy"]:.8f} S="{stress}" pbc="{pbc}"',
    ]
    for z, x, f in zip(frame["numbers"], frame["positions"], frame["forces"], strict=True):
        values = " ".join(f"{v:.6f}" for v in (*x, *f))
        lines.append(f"{chemical_symbols[z]} {values}")
    return "\n".join(lines) + "\n"


def main():
    """Select, shuffle, split and write the frames."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--limit", type=int, help="keep at most this many frames per file")
    arguments = parser.parse_args()

    allowed = np.zeros(256, dtype=bool)
    allowed[[atomic_numbers[symbol] for symbol in ELEMENTS]] = True
    rng = np.random.default_rng(0)
    frames = [f for f in read_frames(arguments.corpus) if is_wanted(f, allowed, rng)]
    rng.shuffle(frames)

    held_out = [is_held_out(frame) for frame in frames]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("valid", True)):
        part = [f for f, out in zip(frames, held_out, strict=True) if out is wanted][
            : arguments.limit
        ]
        atoms = sum(len(f["numbers"]) for f in part)
        (arguments.output / f"{name}.xyz").write_text("".join(map(to_extxyz, part)))
        print(f"{name}.xyz: {len(part)} frames, {atoms} atoms")


if __name__ == "__main__":
    main()
