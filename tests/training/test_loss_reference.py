"""The loss against its definition, written out structure by structure in numpy."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import ENERGY_SCALE, HYPERS, SCALES, TYPES, structures, tiny_checkpoint
from training_data import displaced_pair, frames_of

from coset.data import pairs
from coset.data.batching import MicroBatch
from coset.data.store import Frames, Store, StoreWriter, join_frames
from coset.loading import network_of
from coset.structures import concatenate
from coset.training.batches import Counts, Source, count_labels, make_batch
from coset.training.loss import Predictions, loss_terms, mean_huber, predict
from coset.training.settings import LossSettings, Term

RELATIVE = 1e-12
"""The same sums of order 1 in another order: 1e-15, with a margin."""
RELATIVE_GRADIENT = 1e-10
"""Likewise, after second derivatives of the network."""

NAMES = ("triclinic", "perovskite", "rocksalt", "bcc", "slab", "chain", "methane", "dimer", "atom")
NO_ENERGY, NO_FORCES, NO_STRESS = (1, 6), (2, 4), (3,)
PARTS = ((0, 3, 5, 9, 10), (1, 2, 4, 6), (7, 8, 11, 12))
"""Rows of three micro-batches; 9 and 10 are a displaced pair, 11 and 12 another."""

WEIGHTS = {
    "energy": 0.7,
    "forces": 1.3,
    "virial": 0.2,
    "hessian": 0.4,
    "direct_forces": 0.3,
    "direct_stress": 0.6,
}
DELTAS = {"vector": (1.5, 3.5, 4.0, 100.0, 9.0, 1.5), "component": (2.0, 1.5, 0.7, 40.0, 5.0, 0.4)}
"""In the order of the weights; errors lie on both sides."""
SETTINGS = {
    kind: LossSettings(
        **{n: Term(weight=w, delta=d) for (n, w), d in zip(WEIGHTS.items(), deltas, strict=True)},
        huber=kind,
    )
    for kind, deltas in DELTAS.items()
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A store with labels of every kind, some missing, and a network."""

    source: Source
    frames: Frames
    baseline: np.ndarray
    network: torch.nn.Module

    def batch(self, rows):
        return make_batch([self.source], micro_batch(rows), self.baseline, None)

    def counts(self, *parts):
        return count_labels([self.source], [micro_batch(rows) for rows in parts])

    def terms(self, rows, counts, settings=SETTINGS["vector"]):
        batch = self.batch(rows)
        predictions = predict(self.network, batch, settings)
        return loss_terms(self.network, predictions, batch, settings, counts)


def values(terms):
    return {name: float(term.detach()) for name, term in terms.items()}


def micro_batch(rows):
    rows = np.array(rows)
    return MicroBatch(store=np.zeros_like(rows), row=rows, slot=rows)


def labelled_frames():
    """Structures and two displaced pairs with random labels."""
    known, rng = structures(), np.random.default_rng(1)
    singles = frames_of(concatenate([known[name] for name in NAMES]))
    moved = [frames_of(displaced_pair(known[name]), [2, 0]) for name in ("triclinic", "water")]
    frames = join_frames([singles, *moved])
    stress = 0.05 * rng.normal(size=frames.stress.shape)
    stress += stress.transpose(0, 2, 1)
    stress[~frames.pbc.all(1) | np.isin(np.arange(len(frames)), NO_STRESS)] = np.nan
    energy = rng.normal(size=len(frames)) * frames.n_atoms
    energy[list(NO_ENERGY)] = np.nan
    forces = rng.normal(size=frames.forces.shape)
    forces[np.isin(np.repeat(np.arange(len(frames)), frames.n_atoms), NO_FORCES)] = np.nan
    return replace(frames, energy=energy, forces=forces, stress=stress)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    writer = StoreWriter(tmp_path_factory.mktemp("loss") / "store", kinds=["all"], facts={})
    writer.append(labelled_frames())
    store = Store(writer.finish())
    return Case(
        source=Source(store=store, pairs=pairs.build(store, HYPERS), index=store.index()),
        frames=store.read(np.arange(len(store))),
        baseline=np.random.default_rng(2).normal(size=119),
        network=network_of(tiny_checkpoint(), torch.float64).requires_grad_(True),
    )


def errors_of_one(frames, k, predicted, baseline):
    """Scaled errors of structure `k`, rows of each kind that it has labels for."""
    end = int(frames.n_atoms[: k + 1].sum())
    atoms, n = slice(end - int(frames.n_atoms[k]), end), int(frames.n_atoms[k])
    numbers = frames.numbers[atoms]
    errors = {}
    if np.isfinite(frames.energy[k]):
        label = frames.energy[k] - sum(baseline[z] for z in numbers)
        errors["energy"] = [[(predicted.energy[k] - label) / n / ENERGY_SCALE]]
    if np.isfinite(frames.forces[atoms]).all():
        label, scale = frames.forces[atoms].astype(float), SCALES["direct_forces"]
        errors["forces"] = (predicted.forces[atoms] - label) / ENERGY_SCALE
        errors["direct_forces"] = [
            (predicted.direct_forces[atoms][i] - label[i]) / scale[TYPES.index(numbers[i])]
            for i in range(n)
        ]
    if np.isfinite(frames.stress[k]).all():
        label = frames.stress[k].astype(float)
        volume = abs(np.linalg.det(frames.cell[k].astype(float)))
        virial = (predicted.virial[k] - volume * label) / n / ENERGY_SCALE
        direct = (predicted.direct_virial[k] / volume - label) / SCALES["direct_stress"]
        errors |= {"virial": [virial.ravel()], "direct_stress": [direct.ravel()]}
    return errors


def curvature_errors(frames, k, predicted):
    """Errors of the force difference of the pair k, k + 1 over their distance."""
    first = int(frames.n_atoms[:k].sum())
    n = int(frames.n_atoms[k])
    plus, minus = slice(first, first + n), slice(first + n, first + 2 * n)
    x, label = frames.positions.astype(float), frames.forces.astype(float)
    found = predicted.forces[plus] - predicted.forces[minus]
    return (found - (label[plus] - label[minus])) / np.linalg.norm(x[plus] - x[minus])


def expected_mean(errors, delta, kind):
    """Mean over the components, or over the lengths of the rows."""
    size = np.abs(errors) if kind == "component" else np.sqrt((errors**2).sum(1))
    assert 0.0 < (size < delta).mean() < 1.0, "both branches are to be seen"
    return np.where(size < delta, size**2 / 2.0, delta * (size - delta / 2.0)).mean()


def expected_terms(case, predicted, settings):
    rows = {name: [] for name in WEIGHTS}
    for k in range(len(case.frames)):
        for name, errors in errors_of_one(case.frames, k, predicted, case.baseline).items():
            rows[name].extend(errors)
        if case.frames.unit[k] == 2:
            rows["hessian"].extend(curvature_errors(case.frames, k, predicted) / ENERGY_SCALE)
    return {
        name: term.weight * expected_mean(np.array(rows[name]), term.delta, settings.huber)
        for name in rows
        for term in [getattr(settings, name)]
    }


def as_arrays(predictions):
    names = ("energy", "forces", "virial", "direct_forces", "direct_virial")
    return SimpleNamespace(**{n: getattr(predictions, n).detach().numpy() for n in names})


@pytest.mark.parametrize("kind", SETTINGS)
def test_terms_are_those_of_the_definition(case, kind):
    rows, settings = np.arange(len(case.frames)), SETTINGS[kind]
    batch = case.batch(rows)
    predictions = predict(case.network, batch, settings)
    found = values(loss_terms(case.network, predictions, batch, settings, case.counts(rows)))
    expected = expected_terms(case, as_arrays(predictions), settings)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= RELATIVE * value, name


def test_labels_are_counted(case):
    frames = case.frames
    assert case.counts(*PARTS) == Counts(
        energies=len(frames) - len(NO_ENERGY),
        atoms=int(frames.n_atoms.sum() - frames.n_atoms[list(NO_FORCES)].sum()),
        stresses=int(frames.pbc.all(1).sum()) - len(NO_STRESS),
        pair_atoms=int(frames.n_atoms[frames.unit == 2].sum()),
    )


@pytest.mark.parametrize("kind", SETTINGS)
def test_micro_batches_add_up(case, kind):
    rows, settings = np.arange(len(case.frames)), SETTINGS[kind]
    counts = case.counts(*PARTS)
    parameters = list(case.network.parameters())
    whole = case.terms(rows, counts, settings)
    gradient = torch.autograd.grad(sum(whole.values()), parameters)
    parts = [case.terms(part, counts, settings) for part in PARTS]
    sums = [torch.autograd.grad(sum(p.values()), parameters, allow_unused=True) for p in parts]
    for name, value in values(whole).items():
        total = sum(values(part).get(name, 0.0) for part in parts)
        assert abs(total - value) <= RELATIVE * value, name
    for together, apart in zip(gradient, zip(*sums, strict=True), strict=True):
        total = sum(one for one in apart if one is not None)
        assert (total - together).abs().max() <= RELATIVE_GRADIENT * together.abs().max()


def test_nothing_is_learned_where_labels_are_missing(case):
    rows, settings = np.arange(len(case.frames)), replace(SETTINGS["vector"], hessian=Term())
    batch = case.batch(rows)
    predictions = predict(case.network, batch, settings)
    terms = loss_terms(case.network, predictions, batch, settings, case.counts(rows))
    labels = batch.labels
    labels_of = {
        "energy": labels.energy,
        "forces": labels.forces,
        "virial": labels.stress,
        "direct_forces": labels.forces,
        "direct_virial": labels.stress,
    }
    outputs = [getattr(predictions, name) for name in labels_of]
    gradients = torch.autograd.grad(sum(terms.values()), outputs)
    for (name, label), gradient in zip(labels_of.items(), gradients, strict=True):
        assert torch.equal(gradient != 0.0, torch.isfinite(label)), name
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_row_with_a_missing_component_is_left_out(kind):
    errors = torch.tensor([(3.0, 4.0), (torch.nan, 1.0), (0.3, 0.4)], dtype=torch.float64)
    expected = {"vector": (5.0 - 0.5) + 0.125, "component": (2.5 + 3.5 + 0.045 + 0.08) / 2.0}
    assert abs(float(mean_huber(errors, 1.0, 2, kind)) - expected[kind] / 2.0) <= RELATIVE


def test_a_kind_without_labels_has_no_term(case):
    row = [NO_STRESS[0]]
    assert case.terms(row, case.counts(row)).keys() == {"energy", "forces", "direct_forces"}


def test_a_term_without_weight_is_not_predicted(case):
    batch = case.batch([0])
    settings = LossSettings(energy=Term(weight=1.0), direct_forces=Term(weight=1.0))
    predictions = predict(case.network, batch, settings)
    assert predictions == Predictions(
        energy=predictions.energy, direct_forces=predictions.direct_forces
    )
