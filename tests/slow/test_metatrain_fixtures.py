"""Every checkpoint that metatrain keeps of its own past versions is read, bit for bit.

Needs an installed metatrain: in this environment, or in that of the interpreter named by the
environment variable COSET_METATRAIN_PYTHON.
"""

import gzip
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from coset.checkpoint import load_checkpoint, save_checkpoint
from coset.errors import CheckpointError
from coset.loading import LoadSettings, potential_of
from coset.metatrain_import import import_metatrain
from coset.pet.model import Pet
from coset.structures import make_structure

pytestmark = pytest.mark.slow

LOCATE = "import importlib.util as u; print(u.find_spec('metatrain').submodule_search_locations[0])"
REFERENCE = """
import sys
import warnings

warnings.simplefilter("ignore")
import numpy as np
import torch
from metatrain.utils.io import model_from_checkpoint

for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    checkpoint = torch.load(source, weights_only=False)
    model = model_from_checkpoint(checkpoint, context="export").eval()
    llpr = {n: t for n, t in model.state_dict().items() if not n.startswith("model.")}
    pet = getattr(model, "model", model)
    arrays = {f"weights/{n}": t.numpy() for n, t in pet.backend.state_dict().items()}
    if pet is not model:
        arrays |= {f"llpr/{n}": t.numpy() for n, t in llpr.items()}
    for name, scales in pet.scaler.model.scales.items():
        arrays[f"scales/{name}"] = scales.block().values.numpy()
    for name, energies in pet.additive_models[0].model.weights.items():
        arrays[f"baseline/{name}"] = energies.block().values.numpy()
    np.savez(target, **arrays)
"""
"""What metatrain itself makes of the files (it runs them: they are its own)."""


def metatrain_python():
    """An interpreter that has metatrain, or None."""
    if named := os.environ.get("COSET_METATRAIN_PYTHON"):
        return named
    return sys.executable if find_spec("metatrain") else None


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    """Unpacked PET and LLPR checkpoints, each with the numbers of metatrain."""
    python = metatrain_python()
    if python is None:
        pytest.skip("metatrain is not installed and COSET_METATRAIN_PYTHON is not set")
    located = subprocess.run([python, "-c", LOCATE], capture_output=True, text=True, check=True)
    root, folder = Path(located.stdout.strip()), tmp_path_factory.mktemp("metatrain")
    pairs = {}
    for packed in sorted(root.glob("*/tests/checkpoints/*.ckpt.gz")):
        kind = packed.parents[2].name
        path = folder / f"{kind}-{packed.stem}"
        path.write_bytes(gzip.decompress(packed.read_bytes()))
        if kind in ("pet", "llpr"):
            pairs[path] = path.with_suffix(".npz")
    arguments = [str(path) for pair in pairs.items() for path in pair]
    subprocess.run([python, "-c", REFERENCE, *arguments], check=True, capture_output=True)
    return folder, pairs


def our_name(name):
    """Our name of a weight of metatrain."""
    parts = name.split(".")
    if parts[0].endswith("last_layers"):
        del parts[3]
    return ".".join(parts)


def test_all_versions_give_the_numbers_of_metatrain(fixtures, tmp_path):
    _, pairs = fixtures
    assert len(pairs) >= 43
    versions = set()
    for path, reference in pairs.items():
        checkpoint = import_metatrain(path)
        versions.add(checkpoint.provenance.source_format.split()[2])
        Pet(checkpoint.hypers).load_state_dict(dict(checkpoint.weights), strict=True)
        arrays = dict(np.load(reference, allow_pickle=False))
        arrays.pop("weights/species_to_species_index")
        n_weights = 0
        for key, expected in arrays.items():
            kind, name = key.split("/", 1)
            if kind == "weights":
                found = checkpoint.weights[our_name(name)].numpy()
                n_weights += 1
            elif kind == "llpr":
                found = checkpoint.llpr[name].numpy()
            elif kind == "scales":
                found = np.reshape(checkpoint.scales[name], expected.shape)
            else:
                found = np.reshape(list(checkpoint.baseline[name].values()), expected.shape)
            assert found.dtype == expected.dtype, (path, key)
            assert found.tobytes() == expected.tobytes(), (path, key)
        assert n_weights == len(checkpoint.weights)
        saved = save_checkpoint(checkpoint, tmp_path / path.stem)
        assert load_checkpoint(saved).scales == checkpoint.scales
    assert versions >= {f"v{i}" for i in range(1, 17)}


def test_predictions_agree_with_metatrain(fixtures, tmp_path):
    _, pairs = fixtures
    outputs = {path: tmp_path / f"{path.stem}.npz" for path in pairs}
    arguments = [str(word) for pair in outputs.items() for word in pair]
    script = Path(__file__).with_name("metatrain_reference.py")
    subprocess.run([metatrain_python(), script, *arguments], check=True, capture_output=True)
    for path, output in outputs.items():
        checkpoint, arrays = import_metatrain(path), dict(np.load(output, allow_pickle=False))
        target = str(arrays["energy_name"])
        settings = LoadSettings(target=target, dtype="float64", device="cpu")
        potential = potential_of(checkpoint, settings)
        for label in sorted({key.partition("/")[0] for key in arrays if "/" in key}):
            field = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{label}/")}
            one = make_structure(
                torch.from_numpy(field["positions"]),
                torch.from_numpy(field["numbers"]),
                cell=torch.from_numpy(field["cell"]),
                pbc=field["pbc"].tolist(),
                charge=int(field["charge"]),
                spin_multiplicity=int(field["spin"]),
            )
            found = potential(one)
            per_atom = abs(float(found.energy) - float(field["energy"])) / len(field["numbers"])
            scale = max(1.0, np.abs(field["forces"]).max())
            forces = np.abs(found.forces.numpy() - field["forces"]).max()
            assert per_atom <= 1e-9 * scale, (path.name, label, per_atom)
            assert forces <= 1e-8 * scale, (path.name, label, forces)
            if "stress" in field:
                stress = np.abs(found.stress[0].numpy() - field["stress"]).max()
                assert stress <= 1e-9 * scale, (path.name, label, stress)


def test_other_architectures_are_refused(fixtures):
    folder, pairs = fixtures
    others = [path for path in folder.glob("*.ckpt") if path not in pairs]
    assert others
    for path in others:
        with pytest.raises(CheckpointError):
            import_metatrain(path)
