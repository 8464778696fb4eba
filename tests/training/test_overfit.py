"""The whole path: a store, a run of two stages, and a model that has learned its structures."""

from dataclasses import replace

import numpy as np
import pytest
from factories import HYPERS
from training_data import CONSERVATIVE, DIRECT, frames_of, make_settings, training_structures

from coset.checkpoint import load_checkpoint
from coset.data.store import StoreWriter
from coset.loading import LoadSettings, potential_of
from coset.pet.hypers import NetworkHypers
from coset.training.loop import train
from coset.training.settings import BatchSettings, StageSettings, Term

NETWORK = NetworkHypers(
    d_pet=32, d_node=128, d_head=32, d_feedforward=64, n_heads=4, n_gnn_layers=2
)


@pytest.mark.slow
def test_thirty_two_structures_are_learned_by_heart(tmp_path):
    structures = training_structures(32)
    writer = StoreWriter(tmp_path / "store", kinds=["all"], facts={})
    writer.append(frames_of(structures))
    writer.finish()
    settings = make_settings(tmp_path)
    energy = replace(CONSERVATIVE, energy=Term(weight=60.0, delta=0.003), hessian=Term())
    settings = replace(
        settings,
        data=replace(settings.data, valid=()),
        model=replace(HYPERS, network=NETWORK),
        stages=(
            StageSettings(name="direct", steps=300, lr=2e-3, warmup=0.1, loss=DIRECT),
            StageSettings(name="conservative", steps=3000, lr=2e-3, warmup=0.05, loss=energy),
        ),
        batch=BatchSettings(structures=32, window=4),
        optimizer=replace(settings.optimizer, ema=0.99, weight_decay=0.0),
    )
    outcome = train(settings)
    assert outcome.finished
    potential = potential_of(load_checkpoint(outcome.model), LoadSettings(dtype="float32"))
    found, labels = potential(structures), frames_of(structures)
    n_atoms = structures.n_atoms.numpy()
    energy_error = np.abs(found.energy.numpy() - labels.energy) / n_atoms
    force_error = np.abs(found.forces.numpy() - labels.forces)
    errors = (1e3 * float(energy_error.mean()), 1e3 * float(force_error.mean()))
    assert errors[0] < 1.0, errors
    assert errors[1] < 10.0, errors
