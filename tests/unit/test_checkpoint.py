import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_checkpoints import HYPERS, small_checkpoint

from coset import checkpoint as module
from coset.checkpoint import MANIFEST, WEIGHTS, load_checkpoint, manifest_digest, save_checkpoint
from coset.errors import CheckpointError
from coset.pet.hypers import ConditioningHypers, NetworkHypers, PetHypers, Target
from coset.pet.model import Pet


def assert_same(read, written):
    """Two checkpoints agree in everything that was written."""
    assert read.hypers == written.hypers
    assert set(read.weights) == set(written.weights)
    for name, tensor in written.weights.items():
        assert read.weights[name].dtype == tensor.dtype
        assert torch.equal(read.weights[name], tensor)
    assert read.baseline == written.baseline
    assert read.scales == written.scales
    assert read.card == written.card
    assert read.levels_of_theory == written.levels_of_theory
    said = replace(read.provenance, created="", coset_version="")
    assert said == written.provenance
    assert read.provenance.created.endswith("+00:00")


@pytest.mark.parametrize("name", ["model", "model.zip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_reads_back_as_it_was_written(tmp_path, name, dtype):
    written = replace(
        small_checkpoint(
            dtype=dtype,
            level_of_theory="PBE",
            citation=("a", "b"),
            training_run={"steps": "10"},
        ),
        levels_of_theory={"energy": "r2SCAN"},
        card={"mae": [0.1, None], "text": "µ"},
        llpr={"covariance_energy_uncertainty": torch.eye(3)},
    )
    path = save_checkpoint(written, tmp_path / name)
    read = load_checkpoint(path)
    assert_same(read, written)
    assert torch.equal(read.llpr["covariance_energy_uncertainty"], torch.eye(3))
    assert read.level_of_theory("energy") == "r2SCAN"
    assert read.level_of_theory("non_conservative_forces") == "PBE"
    assert len(read.sha256) == 64
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_every_kind_of_network_reads_back_and_loads_into_the_model(tmp_path):
    hypers = PetHypers(
        atomic_types=(8, 1),
        targets=(
            Target(name="energy/pbe", quantity="energy"),
            Target(name="energy/r2scan", quantity="energy"),
        ),
        network=NetworkHypers(d_pet=4, d_node=8, d_head=4, d_feedforward=4, n_heads=1),
        conditioning=ConditioningHypers(max_charge=2, max_spin_multiplicity=3),
        zbl=1.0,
    )
    read = load_checkpoint(save_checkpoint(small_checkpoint(hypers), tmp_path / "m"))
    assert read.hypers == hypers
    Pet(read.hypers).load_state_dict(dict(read.weights), strict=True)


def test_half_precision_weights_become_float32(tmp_path):
    written = small_checkpoint(dtype=torch.float16)
    read = load_checkpoint(save_checkpoint(written, tmp_path / "m"))
    assert {t.dtype for t in read.weights.values()} == {torch.float32}
    assert all(torch.equal(read.weights[n], t.float()) for n, t in written.weights.items())


def test_nothing_is_overwritten_unasked(tmp_path):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m")
    other = small_checkpoint(dtype=torch.float64)
    with pytest.raises(CheckpointError, match="exists") as error:
        save_checkpoint(other, path)
    assert error.value.code == "ModelExists"
    assert_same(load_checkpoint(path), small_checkpoint())
    save_checkpoint(other, path, overwrite=True)
    assert_same(load_checkpoint(path), other)


def test_a_directory_with_anything_else_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        save_checkpoint(small_checkpoint(), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "failing_sync"), [("model", 1), ("model", 2), ("model", 3), ("model.zip", 1)]
)
def test_a_failed_write_leaves_the_old_model_and_nothing_else(
    tmp_path, monkeypatch, name, failing_sync
):
    old = small_checkpoint()
    path = save_checkpoint(old, tmp_path / name)
    count = 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count == failing_sync:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(small_checkpoint(dtype=torch.float64), path, overwrite=True)
    assert_same(load_checkpoint(path), old)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_failed_first_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(small_checkpoint(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def rewrite(path, change):
    """Edit a manifest and sign it again, as a malicious or careless writer could."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if isinstance(manifest.get("sha256"), dict):
        manifest["sha256"][MANIFEST] = manifest_digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_older_formats_migrate_step_by_step(tmp_path, monkeypatch):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m")
    rewrite(path, lambda m: m.update(format=1, name=m["provenance"].pop("name")))

    def from_1(manifest):
        provenance = {**manifest["provenance"], "name": f"{manifest['name']} (2)"}
        kept = {key: value for key, value in manifest.items() if key != "name"}
        return {**kept, "provenance": provenance}

    def from_2(manifest):
        name = manifest["provenance"]["name"].replace("2", "3")
        return {**manifest, "provenance": {**manifest["provenance"], "name": name}}

    monkeypatch.setattr(module, "FORMAT", 3)
    monkeypatch.setattr(module, "MIGRATIONS", {1: from_1, 2: from_2})
    assert load_checkpoint(path).provenance.name == "small (3)"


def test_format_1_said_only_whether_there_is_a_repulsion(tmp_path):
    checkpoint = small_checkpoint()
    path = save_checkpoint(checkpoint, tmp_path / "m")

    def as_format_1(manifest):
        manifest["format"] = 1
        manifest["config"]["zbl"] = True

    rewrite(path, as_format_1)
    assert load_checkpoint(path).hypers == replace(checkpoint.hypers, zbl=1.0)


def test_every_older_format_has_a_migration():
    assert set(module.MIGRATIONS) == set(range(1, module.FORMAT))


@pytest.mark.parametrize("step", [1, 100])
def test_newer_formats_are_refused_naming_both_versions(tmp_path, step):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m")
    rewrite(path, lambda m: m.update(format=module.FORMAT + step))
    with pytest.raises(CheckpointError, match=f"{module.FORMAT + step}.*{module.FORMAT}") as error:
        load_checkpoint(path)
    assert error.value.code == "ModelTooNew"


def test_missing_models_say_what_is_missing(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match=WEIGHTS) as error:
            load_checkpoint(path)
        assert error.value.code == "ModelNotFound"


def test_weights_that_are_not_finite_are_named(tmp_path):
    checkpoint = small_checkpoint()
    checkpoint.weights["edge_embedder.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"edge_embedder\.weight") as error:
        save_checkpoint(checkpoint, tmp_path / "m")
    assert error.value.code == "NonFiniteWeights"
    assert list(tmp_path.iterdir()) == []


def changed(table, key, value):
    """A copy of a dict with one entry set, or removed if the value is None."""
    copy = {**table, key: value}
    return copy if value is not None else {k: v for k, v in table.items() if k != key}


FORCES = "non_conservative_forces"


@pytest.mark.parametrize(
    ("field", "key", "value", "message"),
    [
        ("weights", "edge_embedder.weight", None, "missing edge_embedder"),
        ("weights", "edge_embeder.weight", torch.ones(1), "did you mean 'edge_embedder.weight'"),
        ("weights", "edge_embedder.weight", torch.ones(3, 5), r"shape \(3, 5\), not \(3, 4\)"),
        ("weights", "edge_embedder.weight", torch.ones(3, 4).double(), "dtypes"),
        ("scales", "energy", None, "missing energy"),
        ("scales", "energy", float("nan"), "finite"),
        ("scales", "energy", -1.0, "positive"),
        ("scales", "energy", (1.0, 2.0, 3.0), "positive"),
        ("scales", FORCES, (1.0, 2.0), "positive"),
        ("scales", FORCES, (), "positive"),
        ("baseline", "energy", {1: 0.0, 8: 0.0}, "missing 29"),
        ("baseline", "energy", {1: 0.0, 8: float("inf"), 29: 0.0}, "finite"),
        ("baseline", FORCES, {1: 0.0, 8: 0.0, 29: 0.0}, f"unknown {FORCES}"),
        ("levels_of_theory", "dipole", "PBE", "no targets"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(field, key, value, message):
    checkpoint = small_checkpoint()
    table = changed(getattr(checkpoint, field), key, value)
    with pytest.raises(CheckpointError, match=message):
        replace(checkpoint, **{field: table})


def test_a_card_must_be_json(tmp_path):
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(replace(small_checkpoint(), card={"x": {1, 2}}), tmp_path / "m")
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(replace(small_checkpoint(), card={"x": float("nan")}), tmp_path / "m")


def test_white_space_and_order_of_keys_do_not_matter(tmp_path):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m")
    manifest = json.loads((path / MANIFEST).read_text())
    reordered = dict(reversed(manifest.items()))
    (path / MANIFEST).write_text(json.dumps(reordered, indent=4))
    assert load_checkpoint(path).hypers == HYPERS
