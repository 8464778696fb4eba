"""The loss and its parameter gradients are those of metatrain's own PET trainer.

`golden/make_metatrain_loss.py` runs that trainer up to its first gradient, with Huber losses and
without rotations. Per term, with the mean over all entries that have a label, it takes the Huber
function of

    energy                                   (E - E') / (N s_E)      E' without the baseline
    positions gradient of the energy         (F - F') / s_E
    strain gradient of the energy            (W - V S') / (N s_E)    9 components, not symmetrized
    non_conservative_forces                  (F - F') / s_F(Z)
    non_conservative_stress                  (S - S') / s_S          S = sym(W_head) / V

which are our `energy`, `forces`, `virial`, `direct_forces` and `direct_stress` with
`huber = "component"` and the same weights and deltas, and with the stress listed in the trainer's
`per_structure_targets` (else it divides that by N, too).
Needs an installed metatrain, as the other tests of this folder do.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from coset.data.geometry import structures_of
from coset.data.pairs import needed_pairs
from coset.data.store import Frames
from coset.loading import network_of
from coset.metatrain_import import import_metatrain
from coset.metatrain_upgrade import NEWEST, network_state, without_block_names
from coset.training.batches import Counts, batch_of
from coset.training.loss import loss_terms, predict
from coset.training.settings import LossSettings, Term

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "golden" / "make_metatrain_loss.py"
RELATIVE = {"solver": 1e-10, "fixed": 1e-10, "zbl": 1e-6}
"""Of a loss, or of the largest component of a gradient. Seen are 1e-14, sums in another order. The
repulsion of metatrain has constants in float32, whose last digit depends on the place of a pair in
the batch."""
LOSSES = ("direct", "conservative", "both")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, structures and reference numbers, as the script wrote them."""
    named = os.environ.get("COSET_METATRAIN_PYTHON")
    if named is None and find_spec("metatrain") is None:
        pytest.skip("metatrain is not installed and COSET_METATRAIN_PYTHON is not set")
    path = tmp_path_factory.mktemp("loss")
    subprocess.run([named or sys.executable, SCRIPT, path], check=True, capture_output=True)
    return path


def frames_of(arrays):
    """The labelled structures of the script."""
    n_atoms = arrays["n_atoms"]
    ones = np.ones(len(n_atoms), np.int64)
    return Frames(
        **arrays,
        atomic_energies=np.full(n_atoms.sum(), np.nan),
        charge=0 * ones,
        spin_multiplicity=ones,
        kind=0 * ones,
        unit=ones,
        formula_hash=0 * ones,
    )


def count(frames):
    """Labels of all kinds."""
    return Counts(
        energies=int(np.isfinite(frames.energy).sum()),
        atoms=int(np.isfinite(frames.forces).all(1).sum()),
        stresses=int(np.isfinite(frames.stress).all((1, 2)).sum()),
    )


def settings_of(arrays):
    """The loss of a case."""
    terms = {
        key.split("/")[1]: Term(weight=float(value), delta=float(arrays[f"delta/{key[7:]}"]))
        for key, value in arrays.items()
        if key.startswith("weight/")
    }
    return LossSettings(**terms, huber="component")


def part(arrays, name):
    """The tensors below `name`."""
    return {
        key.partition("/")[2]: torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith(f"{name}/")
    }


def relative_error(found, expected):
    """Largest deviation in units of the largest component."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", RELATIVE)
def test_loss_and_gradients_are_those_of_metatrain(folder, name, loss):
    case = f"{name}-{loss}"
    arrays = dict(np.load(folder / f"{case}.npz", allow_pickle=False))
    checkpoint = import_metatrain(folder / f"{case}.ckpt")
    network = network_of(checkpoint, torch.float64).requires_grad_(True)
    frames = frames_of(dict(np.load(folder / "structures.npz", allow_pickle=False)))
    baseline = np.zeros(119)
    for number, energy in checkpoint.baseline["energy"].items():
        baseline[number] = energy
    pairs = needed_pairs(structures_of(frames), network)
    batch = batch_of(frames, pairs, baseline, None, np.arange(len(frames)))

    settings, counts = settings_of(arrays), count(frames)
    predictions = predict(network, batch, settings)
    terms = loss_terms(network, predictions, batch, settings, counts)
    sum(terms.values()).backward()

    losses = part(arrays, "loss")
    assert terms.keys() == losses.keys() == settings.weights().keys()
    of_losses = {name: relative_error(terms[name].detach(), losses[name]) for name in losses}
    state = network_state(part(arrays, "gradient"), NEWEST, large_scale=False)
    expected = without_block_names(state, set())
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == dict(network.named_parameters()).keys()
    of_gradients = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(of_gradients, key=of_gradients.get)
    terms_within, gradients_within = max(of_losses.values()), of_gradients[worst]
    print(f"{case}: terms {terms_within:.1e}, gradients {gradients_within:.1e} ({worst})")  # noqa: T201
    assert all(error <= RELATIVE[name] for error in of_losses.values()), of_losses
    assert all(error <= RELATIVE[name] for error in of_gradients.values()), of_gradients
