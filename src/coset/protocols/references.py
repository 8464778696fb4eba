"""Reading the reference data of the protocols: what the files hold, in our structures and units."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coset.ase_interface import read_structures
from coset.data.formula import SYMBOLS
from coset.protocols.records import Entry, Spectrum, missing_reference
from coset.structures import Structures, make_structure
from coset.units import GPA_PER_EV_PER_A3

CUBIC = {
    "SC": (((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)), 1),
    "FCC": (((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)), 1),
    "BCC": (((-0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5)), 1),
    "Diamond": (((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)), 2),
}
"""Primitive vectors in units of the cubic lattice constant, and atoms."""


def existing(data: Path, name: str) -> Path:
    """The path of a file of the reference data.

    Raises:
        ConfigError: "NoReference", if it is not there.
    """
    path = data / name
    if not path.is_file():
        raise missing_reference(path, "no such file")
    return path


def sha256_of(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_values(path: Path, names: dict[str, str]) -> list[Entry]:
    """Frames with `mp_id` and numbers; names: what each number is called here, by its name there.

    Raises:
        ConfigError: "NoReference", if a frame lacks one.
    """
    found = []
    for info, one in _frames(path, ("mp_id", *names)):
        values = {own: float(info[name]) for name, own in names.items()}
        found.append(Entry(key=str(info["mp_id"]), structures=one, values=values))
    return found


def read_cubic(path: Path) -> list[Entry]:
    """Elements in cubic structures with V0 (Å³ per atom), B0 (GPa) and B1 of a file of ACWF."""
    found = []
    for key, fit in _json(path)["BM_fit_data"].items():
        symbol, structure = key.split("-X/")
        if fit is None or structure not in CUBIC:
            continue
        values = {
            "volume_A3_per_atom": fit["min_volume"] / CUBIC[structure][1],
            "bulk_modulus_GPa": fit["bulk_modulus_ev_ang3"] * GPA_PER_EV_PER_A3,
            "bulk_modulus_derivative": fit["bulk_deriv"],
        }
        one = _cubic(SYMBOLS.index(symbol), structure, values["volume_A3_per_atom"])
        found.append(Entry(key=f"{symbol}-{structure}", structures=one, values=values))
    return found


def read_spectra(structures: Path, phonons: Path) -> list[Entry]:
    """Crystals with their supercells and phonons without polar terms, kappa as a value (W/mK)."""
    table = _json(phonons)
    place = {name: key for key, name in table["mp_id"].items()}
    found = []
    for info, one in _frames(structures, ("mp_id", "fc2_supercell")):
        key = place.get(str(info["mp_id"]))
        if key is None:
            raise missing_reference(phonons, f"no phonons of {info['mp_id']}")
        supercell = np.array(info["fc2_supercell"])
        if np.any(supercell != np.diag(np.diag(supercell))):
            raise missing_reference(structures, f"supercell of {info['mp_id']} is not diagonal")
        spectrum = Spectrum(
            supercell=(int(supercell[0, 0]), int(supercell[1, 1]), int(supercell[2, 2])),
            primitive_matrix=np.array(info.get("primitive_matrix", np.eye(3)), dtype=float),
            q_points=np.array(table["qpoints"][key]),
            weights=np.array(table["weights"][key]),
            frequency_THz=np.array(table["frequencies"][key]),
            share=np.array(table["mode_kappa_TOT_ave"][key][0]) / np.prod(table["q_mesh"][key]),
        )
        values = {"kappa_W_per_mK": float(table["kappa_TOT_ave"][key][0])}
        found.append(
            Entry(key=str(info["mp_id"]), structures=one, values=values, spectrum=spectrum)
        )
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _frames(path: Path, needed: Sequence[str]) -> list[tuple[dict[str, Any], Structures]]:
    found = []
    for frame in read_structures([str(path)]):
        if frame.atoms is None or frame.structures is None:
            raise missing_reference(path, f"frame {frame.index}: {frame.error}")
        missing = [name for name in needed if name not in frame.atoms.info]
        if missing:
            raise missing_reference(path, f"frame {frame.index} has no {', '.join(missing)}")
        found.append((frame.atoms.info, frame.structures))
    return found


def _json(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    found: dict[str, Any] = json.loads(text)
    return found


def _cubic(number: int, structure: str, volume: float) -> Structures:
    vectors, n_atoms = CUBIC[structure]
    unit = torch.tensor(vectors, dtype=torch.float64)
    cell = unit * (volume * n_atoms / float(torch.linalg.det(unit).abs())) ** (1 / 3)
    positions = torch.tensor([(0.0,) * 3, (0.25,) * 3], dtype=torch.float64)[:n_atoms]
    return make_structure(
        positions @ cell,
        torch.full((n_atoms,), number),
        cell=cell,
        pbc=(True, True, True),
    )
