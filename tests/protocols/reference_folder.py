"""A reference folder in the format of the protocols, made of Stillinger-Weber's silicon.

Values come from routes that the protocols do not take by default.
"""

import gzip
import json
from pathlib import Path

import ase.io
import numpy as np
import torch
from analytic_models import lonsdaleite, silicon, stillinger_weber

import coset
from coset.structures import Structures, make_structure
from coset.workflows.elasticity.finite_strain import finite_strain
from coset.workflows.elasticity.tensor import moduli
from coset.workflows.harmonic import HarmonicSettings, harmonic_supercell

PRIMITIVE = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
SUPERCELL = (2, 2, 2)
Q = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.25, 0.0, 0.25]])
WEIGHTS = (1, 3, 6)
J_PER_MOL_PER_EV = 96485.33212


def conventional() -> Structures:
    """Eight atoms of silicon in the cube."""
    one = silicon()
    edge = float(one.volume * 4) ** (1 / 3)
    base = np.array([(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)])
    places = np.concatenate([base, base + 0.25]) * edge
    cell = edge * torch.eye(3, dtype=torch.float64)
    numbers = torch.full((8,), 14)
    return make_structure(torch.from_numpy(places), numbers, cell=cell, pbc=(True,) * 3)


def make_reference(folder: Path) -> Path:
    """Every file that the protocols read."""
    relaxed = coset.relax(stillinger_weber(), silicon(), coset.TIGHT)[0].structures
    _elasticity(folder / "elasticity_mp_binaries.extxyz", relaxed)
    _heat_capacity(folder / "heat_capacity_alexandria_binaries.extxyz")
    _acwf(folder / "acwf")
    _kappa(folder / "kappa103")
    return folder


def _write(path: Path, frames: list[tuple[Structures, dict]]) -> None:
    path.parent.mkdir(exist_ok=True)
    atoms = [coset.to_ase(one)[0] for one, _ in frames]
    for frame, (_, info) in zip(atoms, frames, strict=True):
        frame.calc = None
        frame.info = info
    ase.io.write(path, atoms, format="extxyz")


def _elasticity(path: Path, relaxed: Structures) -> None:
    slopes = finite_strain(stillinger_weber(), relaxed, force_tolerance=1e-5).tensor_GPa
    hill = moduli((slopes + slopes.mT) / 2)
    values = {"K_vrh": hill.bulk_GPa, "G_vrh": hill.shear_GPa}
    frames = [(silicon(), "mp-149"), (lonsdaleite(), "mp-165"), (silicon(), "mp-1")]
    _write(path, [(one, {"mp_id": key} | values) for one, key in frames])


def _heat_capacity(path: Path) -> None:
    settings = coset.PhononSettings(
        supercell=(3, 3, 3), mesh=(16, 16, 16), frames=3, temperatures=(300.0,)
    )
    (found,) = coset.phonons(stillinger_weber(), silicon(), settings)
    heat = float(found.result.thermal.heat_capacity[0]) * J_PER_MOL_PER_EV
    _write(path, [(conventional(), {"mp_id": "mp-149", "heat_capacity": 4 * heat})])


def _acwf(folder: Path) -> None:
    folder.mkdir()
    fit = {"min_volume": 40.0, "bulk_modulus_ev_ang3": 0.6, "bulk_deriv": 4.0, "E0": 0.0}
    keys = ("Si-X/Diamond", "Si-X/SC", "O-X/BCC")
    for name, scale in (("AE-average", 1.0), ("vasp", 1.001)):
        fits = {key: fit | {"min_volume": 40.0 * scale} for key in keys}
        path = folder / f"results-unaries-verification-PBE-v1-{name}.json"
        path.write_text(json.dumps({"BM_fit_data": fits}))


def _kappa(folder: Path) -> None:
    info = {"mp_id": "mp-149", "fc2_supercell": np.diag(SUPERCELL), "q_mesh": np.array([4, 4, 4])}
    info |= {"fc3_supercell": np.diag(SUPERCELL), "primitive_matrix": PRIMITIVE}
    path = folder / "phononDB-PBE-structures.extxyz"
    _write(path, [(conventional(), info)])
    settings = HarmonicSettings(route="displacements", amplitude=0.002)
    found = harmonic_supercell(stillinger_weber(), conventional(), settings, SUPERCELL)
    frequencies = found.frequencies_THz(Q @ np.linalg.inv(PRIMITIVE))
    columns = {
        "mp_id": "mp-149",
        "qpoints": Q.tolist(),
        "weights": WEIGHTS,
        "frequencies": frequencies.tolist(),
        "kappa_TOT_ave": [100.0],
        "q_mesh": [4, 4, 4],
        "mode_kappa_TOT_ave": [np.full(frequencies.shape, 6400.0 / frequencies.size).tolist()],
    }
    table = {name: {"0": value} for name, value in columns.items()}
    packed = gzip.compress(json.dumps(table).encode())
    (folder / "kappas_phononDB_PBE_noNAC.json.gz").write_bytes(packed)
    base = {"_base": {"material_ids": ["mp-149"], "kappa_dft": [100.0]}}
    models = [
        {"label": label, "freq_w1": [w1], "imag_modes": [False], "kappa_ml": [90.0], "srme": [0.2]}
        for label, w1 in (("Bad", 0.5), ("Good", 0.1))
    ]
    lines = "\n".join(json.dumps(one) for one in (base, *models))
    (folder / "published-models.jsonl").write_text(lines + "\n")
