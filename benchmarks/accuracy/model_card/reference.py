"""Reference data, read from the folder that `--data` names; nothing of it is stored with the code.

Energies eV, forces eV/Å, stress eV/Å³ positive in tension.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.collections import dcdft
from ase.data import atomic_numbers
from ase.io import read

from coset.ase_interface import from_ase
from coset.data.formula import formula_hash
from coset.data.sources import Chunk, read_ase, read_corpus
from coset.data.store import Frames, join_frames
from coset.structures import Structures
from coset.units import GPA_PER_EV_PER_A3

CORPUS = "corpus/valid-000.npz"
DIATOMICS = "dft/diatomics_PBE.extxyz"
ELASTICITY = "reference/elasticity_mp_binaries.extxyz"
PROTOTYPES = "reference/kappa103/phononDB-PBE-structures.extxyz"
ACWF = "reference/acwf/results-unaries-verification-PBE-v1-AE-average.json"
CUBIC = {"FCC": "fcc", "BCC": "bcc", "SC": "sc", "Diamond": "diamond"}

F_ELEMENTS = frozenset(range(57, 72)) | frozenset(range(89, 104))
MAGNETIC = frozenset({8, 24, 25, 26, 27, 28})
"""O and Cr to Ni: without spin these are other solids than those in the training data."""
NOBLE_GASES = frozenset({2, 10, 18, 36, 54, 86})


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A crystal at its reference geometry.

    bulk_modulus_GPa: NaN if there is none. volume_only: the shape of the cell is no reference.
    """

    name: str
    structure: Structures
    bulk_modulus_GPa: float
    volume_only: bool = False

    @property
    def unseen(self) -> bool:
        """Whether its formula is held out from training (bucket 0 of 10)."""
        return formula_hash(self.structure.atomic_numbers.tolist()) % 10 == 0


def read_frames(path: Path) -> Frames:
    """All labelled frames of a corpus file or of a file that ASE reads."""
    reader: Callable[[Path], Iterator[Chunk]] = read_corpus if path.suffix == ".npz" else read_ase
    return join_frames([chunk.frames for chunk in reader(path)])


def structures_of(frames: Frames) -> Structures:
    """The geometries, as one batch."""
    n_atoms = torch.from_numpy(frames.n_atoms.astype(np.int64))
    return Structures(
        positions=torch.from_numpy(frames.positions.astype(np.float64)),
        atomic_numbers=torch.from_numpy(frames.numbers.astype(np.int64)),
        cell=torch.from_numpy(frames.cell.astype(np.float64)),
        pbc=torch.from_numpy(frames.pbc),
        system_index=torch.repeat_interleave(n_atoms),
        charge=torch.zeros_like(n_atoms),
        spin_multiplicity=torch.ones_like(n_atoms),
    )


def equations_of_state(data: Path) -> list[Reference]:
    """All-electron PBE averages for every element in four cubic structures, without spin.

    Reference: E. Bosoni et al., Nat. Rev. Phys. 6, 45 (2024).
    """
    fits = json.loads((data / ACWF).read_text())["BM_fit_data"]
    found = []
    for key, fit in fits.items():
        symbol, structure = key.split("-X/")
        atoms = with_volume(bulk(symbol, CUBIC[structure], a=1.0), fit["min_volume"])
        modulus = fit["bulk_modulus_ev_ang3"] * GPA_PER_EV_PER_A3
        found.append(reference(f"{symbol} {structure}", atoms, modulus))
    return found


def ground_state(symbol: str) -> Reference:
    """An element with spin by all-electron PBE; only its volume was optimized there.

    Reference: K. Lejaeghere et al., Science 351, aad3000 (2016).
    """
    atoms, facts = dcdft[symbol], dcdft.data[symbol]
    one = reference(
        symbol, with_volume(atoms, facts["wien2k_volume"] * len(atoms)), facts["wien2k_B"]
    )
    return replace(one, volume_only=True)


def elastic_binaries(data: Path) -> dict[str, Reference]:
    """Relaxed binaries of the Materials Project with their Voigt-Reuss-Hill moduli, by mp-id."""
    return {
        atoms.info["mp_id"]: reference(
            f"{atoms.symbols} {atoms.info['mp_id']}", atoms, float(atoms.info["K_vrh"])
        )
        for atoms in read(data / ELASTICITY, ":")
    }


def prototype_binaries(data: Path, moduli: dict[str, Reference]) -> dict[str, Reference]:
    """Rocksalt, zincblende and wurtzite binaries relaxed with PBE, by formula and space group.

    moduli: where an mp-id is looked up for its bulk modulus.
    """
    found = {}
    for atoms in read(data / PROTOTYPES, ":"):
        known = moduli.get(atoms.info["mp_id"])
        key = f"{atoms.info['name']} {atoms.info['symm.no']}"
        found[key] = reference(key, atoms, known.bulk_modulus_GPa if known else float("nan"))
    return found


def reference(name: str, atoms: Atoms, bulk_modulus_GPa: float) -> Reference:
    """A reference crystal from an ASE structure, whose labels are dropped."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    return Reference(name=name, structure=from_ase(plain), bulk_modulus_GPa=bulk_modulus_GPa)


def with_volume(atoms: Atoms, volume: float) -> Atoms:
    """The same crystal scaled to a volume in Å³."""
    scaled = atoms.copy()
    scaled.set_cell(atoms.cell * (volume / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    return scaled


def element_of(one: Reference) -> int:
    """Atomic number of an elemental crystal."""
    return atomic_numbers[one.name.split()[0]]
