import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_checkpoints import (
    CUTOFF,
    HYPERS,
    LONG_RANGE,
    NETWORK,
    SCRIPT_OBJECT,
    TARGETS,
    Instance,
    layout,
    small_checkpoint,
    target_info,
    tensor_map,
    torch_zip,
    upstream_checkpoint,
    upstream_hypers,
    upstream_state,
)

from coset.checkpoint import load_checkpoint, save_checkpoint
from coset.errors import CheckpointError
from coset.metatrain_import import import_metatrain
from coset.pet.model import Pet

ENERGY = {"energy": TARGETS["energy"]}
ENERGY_ONLY = replace(HYPERS, targets=HYPERS.targets[:1])
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.ckpt"))


def imported(path, checkpoint):
    """Write a checkpoint dict as a file and read it."""
    (path / "fake.ckpt").write_bytes(torch_zip(checkpoint))
    return import_metatrain(path / "fake.ckpt")


def assert_same_numbers(read, written, *, hypers=None):
    """Network, weights, baseline and scales agree; weights bit by bit."""
    assert read.hypers == (hypers or written.hypers)
    assert set(read.weights) == set(written.weights)
    assert all(torch.equal(read.weights[n], t) for n, t in written.weights.items())
    assert read.baseline == written.baseline
    assert read.scales == written.scales


@pytest.mark.parametrize("version", [8, 9, 10, 11, 12, 13, 14, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modern_versions_give_the_same_model(tmp_path, version, dtype):
    # Before version 10 there was no adaptive cutoff, only the fixed one with a cosine.
    cutoff = replace(CUTOFF, function="cosine", adaptive="fixed", n_neighbors=None)
    written = small_checkpoint(replace(HYPERS, cutoff=cutoff) if version < 10 else HYPERS, dtype)
    read = imported(tmp_path, upstream_checkpoint(written, version))
    assert_same_numbers(read, written)
    assert read.provenance.name == "Fake"
    assert read.provenance.source_format == f"metatrain pet v{version}"
    assert read.provenance.source_sha256 == read.sha256
    assert read.provenance.conversions == ()
    again = load_checkpoint(save_checkpoint(read, tmp_path / "ours"))
    assert_same_numbers(again, written)
    Pet(read.hypers).to(dtype).load_state_dict(dict(read.weights), strict=True)


FORMER_NAMES = {
    r"mlp\.w_in": "mlp.0",
    r"mlp\.w_out": "mlp.3",
    r"^edge_embedder": "embedding",
    r"^node_embedders\.(\d+)": r"gnn_layers.\1.node_embedder",
}


def former(name):
    """The name of a weight before version 8."""
    for pattern, replacement in FORMER_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def padded(name, tensor):
    """Tables of elements had one more row before version 8, for padding."""
    if not re.search(r"^edge_embedder|^node_embedders|neighbor_embedder", name):
        return tensor
    return torch.cat([tensor, torch.full((1, tensor.shape[1]), 7.0)])


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7])
def test_versions_before_8_of_the_first_architecture(tmp_path, version):
    network = replace(
        NETWORK,
        d_node=4,
        normalization="layer",
        activation="silu",
        norm_placement="post",
        featurizer="residual",
    )
    cutoff = replace(CUTOFF, function="cosine", adaptive="fixed", n_neighbors=None)
    written = small_checkpoint(replace(HYPERS, network=network, cutoff=cutoff))
    if version < 7:  # one float32 number per target
        scales = dict.fromkeys(written.scales, float(torch.tensor(0.7)))
        written = replace(written, scales=scales)
    old = {former(n): padded(n, t) for n, t in upstream_state(written, version).items()}
    read = imported(tmp_path, upstream_checkpoint(written, version, state=old))
    assert_same_numbers(read, written)


def test_large_models_before_version_8_use_their_last_weights(tmp_path):
    network = replace(NETWORK, d_node=16)
    written = small_checkpoint(replace(HYPERS, network=network))
    names = {
        "edge_embedder.weight": "embedding.weight",
        "node_embedders.0.weight": "node_embedding.weight",
    }
    old = {
        names.get(n, n).replace("combination_norms", "combination_rmsnorms"): padded(n, t)
        for n, t in upstream_state(written, 7).items()
    }
    hypers = upstream_hypers(written.hypers, 7) | {"d_feedforward": 999}
    hypers |= {"num_neighbors_adaptive": CUTOFF.n_neighbors, "cutoff_function": "Bump"}
    checkpoint = upstream_checkpoint(written, 7, state=old, hypers=hypers)
    checkpoint["best_model_state_dict"] = {name: 0 * tensor for name, tensor in old.items()}
    assert_same_numbers(imported(tmp_path, checkpoint), written)


def test_the_best_weights_are_preferred_and_may_be_missing(tmp_path):
    written = small_checkpoint()
    checkpoint = upstream_checkpoint(written)
    checkpoint["model_state_dict"] = {}
    assert_same_numbers(imported(tmp_path, checkpoint), written)
    assert_same_numbers(imported(tmp_path, upstream_checkpoint(written, best=False)), written)


def test_the_order_of_embeddings_is_that_of_the_buffer_not_of_any_list(tmp_path):
    written = small_checkpoint(replace(HYPERS, atomic_types=(29, 1, 8)))
    forces = written.scales["non_conservative_forces"]
    # Upstream rows are in ascending order of Z: H, O, Cu; ours in the order Cu, H, O.
    upstream = {**written.scales, "non_conservative_forces": (forces[1], forces[2], forces[0])}
    state = upstream_state(replace(written, scales=upstream))
    assert_same_numbers(imported(tmp_path, upstream_checkpoint(written, state=state)), written)


@pytest.mark.parametrize("index", [[-1, 0, 2], [-1, 1, 1], [-1, -1, -1]])
def test_a_wrong_map_of_elements_is_refused(tmp_path, index):
    state = upstream_state(small_checkpoint())
    state["backend.species_to_species_index"] = torch.tensor(index)
    with pytest.raises(CheckpointError, match="species_to_species_index"):
        imported(tmp_path, upstream_checkpoint(small_checkpoint(), state=state))


EV_PER_KCAL_PER_MOL = 0.0433641042


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("kcal/mol", EV_PER_KCAL_PER_MOL), ("Hartree", 27.2113862), ("meV", 1e-3), ("EV", 1.0)],
)
def test_energies_in_other_units_are_converted(tmp_path, unit, factor):
    written = small_checkpoint()
    targets = {
        "energy": target_info(layout(), "energy", unit),
        "non_conservative_forces": target_info(layout(3, per_atom=True), "force", f"{unit}/A"),
        "non_conservative_stress": target_info(layout(3, 3), "pressure", f"{unit}/Angstrom^3"),
    }
    read = imported(tmp_path, upstream_checkpoint(written, targets=targets))
    assert read.scales["energy"] == pytest.approx(0.7 * factor, rel=1e-8)
    assert read.scales["non_conservative_stress"] == pytest.approx(0.7 * factor, rel=1e-8)
    forces = written.scales["non_conservative_forces"]
    expected = [f * factor for f in forces]
    assert list(read.scales["non_conservative_forces"]) == pytest.approx(expected, rel=1e-8)
    for number, energy in written.baseline["energy"].items():
        assert read.baseline["energy"][number] == pytest.approx(energy * factor, rel=1e-8)
    noted = [note for note in read.provenance.conversions if unit in note]
    assert len(noted) == (0 if factor == 1 else 3)


def test_stress_in_gpa_is_converted(tmp_path):
    targets = TARGETS | {"non_conservative_stress": target_info(layout(3, 3), "pressure", "GPa")}
    read = imported(tmp_path, upstream_checkpoint(small_checkpoint(), targets=targets))
    assert read.scales["non_conservative_stress"] == pytest.approx(0.7 / 160.2176634, rel=1e-8)


def test_unknown_units_are_refused_or_dropped(tmp_path):
    written = small_checkpoint()
    targets = {"energy": target_info(layout(), "energy", "furlong")}
    with pytest.raises(CheckpointError, match="furlong") as error:
        imported(tmp_path, upstream_checkpoint(written, targets=targets))
    assert error.value.code == "UnitUnsupported"
    with pytest.raises(CheckpointError, match="bohr") as error:
        imported(tmp_path, upstream_checkpoint(written, length_unit="bohr"))
    assert error.value.code == "UnitUnsupported"
    odd = target_info(layout(3, per_atom=True), "force", "Hartree/Bohr")
    read = imported(
        tmp_path, upstream_checkpoint(written, targets=TARGETS | {"non_conservative_forces": odd})
    )
    assert "non_conservative_forces" not in read.scales
    assert any("Hartree/Bohr" in text for text in read.provenance.dropped_targets)


def test_missing_units_are_taken_as_ours_and_recorded(tmp_path):
    written = small_checkpoint(ENERGY_ONLY)
    targets = {"energy": target_info(layout(), "", "")}
    read = imported(tmp_path, upstream_checkpoint(written, targets=targets, length_unit=""))
    assert_same_numbers(read, written)
    assert len(read.provenance.conversions) == 2


def test_variants_and_renamed_targets_keep_their_names(tmp_path):
    names = ("energy/pbe", "mtt::energy", "non_conservative_force/pbe")
    quantities = ("energy", "energy", "direct_forces")
    targets = tuple(
        replace(HYPERS.targets[0], name=n, quantity=q)
        for n, q in zip(names, quantities, strict=True)
    )
    written = small_checkpoint(replace(HYPERS, targets=targets))
    infos = {
        names[0]: target_info(layout(), "energy", "eV"),
        names[1]: target_info(layout(), "", "eV"),
        names[2]: target_info(layout(3, per_atom=True), "force", "eV/A"),
    }
    assert_same_numbers(imported(tmp_path, upstream_checkpoint(written, targets=infos)), written)


@pytest.mark.parametrize(
    ("name", "shape", "quantity"),
    [
        ("mtt::dos", layout(properties=7), ""),
        ("mtt::dipole", layout(3), "dipole"),
        ("mtt::charges", layout(per_atom=True), "charge"),
        ("energy_per_atom", layout(per_atom=True), "energy"),
        ("non_conservative_stress/pbe", layout(3, 3), "pressure"),
        ("non_conservative_forces", layout(3), "force"),
        ("gap", layout(), ""),
    ],
)
def test_other_targets_are_dropped_and_listed(tmp_path, name, shape, quantity):
    written = small_checkpoint(ENERGY_ONLY)
    state = upstream_state(written)
    for kind in ("node_heads", "edge_last_layers"):
        state[f"backend.{kind}.{name}.0.weight"] = torch.ones(2)
    targets = {name: target_info(shape, quantity, "eV"), **ENERGY}
    read = imported(tmp_path, upstream_checkpoint(written, state=state, targets=targets))
    assert_same_numbers(read, written)
    assert [text.split(": ")[0] for text in read.provenance.dropped_targets] == [name]


def test_a_model_without_any_known_target_is_refused(tmp_path):
    targets = {"gap": target_info(layout(), "", "eV")}
    with pytest.raises(CheckpointError, match="gap"):
        imported(tmp_path, upstream_checkpoint(small_checkpoint(), targets=targets))


def test_lora_updates_are_merged(tmp_path):
    written = small_checkpoint(ENERGY_ONLY)
    state = upstream_state(written)
    stem = "backend.gnn_layers.0.trans.layers.0.attention.input_linear"
    weight = state.pop(f"{stem}.weight")
    state[f"{stem}.linear.weight"] = weight
    state[f"{stem}.linear.bias"] = state.pop(f"{stem}.bias")
    state[f"{stem}.lora_A.weight"] = torch.randn(2, 4)
    state[f"{stem}.lora_B.weight"] = torch.randn(12, 2)
    finetune = {"method": "lora", "config": {"rank": 2, "alpha": 6.0}}
    parts = {"state": state, "targets": ENERGY}
    read = imported(tmp_path, upstream_checkpoint(written, finetune=finetune, **parts))
    x = torch.randn(5, 4)
    adapted = x @ state[f"{stem}.lora_A.weight"].T @ state[f"{stem}.lora_B.weight"].T
    expected = x @ weight.T + 6.0 / 2 * adapted
    merged = read.weights[stem.removeprefix("backend.") + ".weight"]
    assert torch.allclose(x @ merged.T, expected, atol=1e-5, rtol=0)
    assert any("LoRA" in note for note in read.provenance.conversions)
    with pytest.raises(CheckpointError, match="alpha"):
        imported(tmp_path, upstream_checkpoint(written, **parts))


def llpr(inner, state, version=4):
    """A checkpoint with last-layer uncertainties around another one."""
    key = "state_dict" if version < 3 else "model_state_dict"
    return {
        "architecture_name": "llpr",
        "model_ckpt_version": version,
        "model_data": {"hypers": {"num_ensemble_members": {"energy": 5}}},
        key: state,
        "wrapped_model_checkpoint": inner,
    }


def test_uncertainties_are_kept(tmp_path):
    written = small_checkpoint()
    state = {"covariance_energy_uncertainty": torch.eye(8), "multiplier_energy": torch.ones(1)}
    read = imported(tmp_path, llpr(upstream_checkpoint(written, 11), state))
    assert_same_numbers(read, written)
    assert all(torch.equal(read.llpr[name], tensor) for name, tensor in state.items())
    assert read.card["llpr"] == {"num_ensemble_members": {"energy": 5}}
    assert read.provenance.source_format == "metatrain pet v11 in llpr v4"


def test_old_uncertainties_get_cholesky_factors(tmp_path):
    root = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    covariance, ensemble = root.T @ root, torch.randn(8, 5)  # rank 4: needs the regularizer
    state = {
        "covariance_energy": covariance,
        "inv_covariance_energy": torch.eye(8),
        "energy_ensemble_weights": ensemble,
    }
    read = imported(tmp_path, llpr(upstream_checkpoint(small_checkpoint()), state, version=2))
    factor = read.llpr["cholesky_energy"]
    assert torch.allclose(factor @ factor.T, covariance, atol=1e-5, rtol=0)
    assert torch.equal(read.llpr["llpr_ensemble_layers.energy.weight"], ensemble.T)
    assert "inv_covariance_energy" not in read.llpr


def test_uncertainties_in_other_units_are_dropped_and_that_is_said(tmp_path):
    inner = upstream_checkpoint(
        small_checkpoint(ENERGY_ONLY), targets={"energy": target_info(layout(), "energy", "meV")}
    )
    read = imported(tmp_path, llpr(inner, {"covariance_energy": torch.eye(8)}))
    assert read.llpr == {}
    assert any("LLPR" in note for note in read.provenance.conversions)


def test_zbl_is_kept_if_it_applies_to_all_energies(tmp_path):
    written = small_checkpoint(replace(ENERGY_ONLY, zbl=1.0))
    state = upstream_state(written)
    state["additive_models.1.species_to_index"] = torch.zeros(30, dtype=torch.int32)
    parts = {"state": state, "targets": ENERGY}
    assert_same_numbers(imported(tmp_path, upstream_checkpoint(written, **parts)), written)
    parts["targets"] = {"energy": target_info(layout(), "", "eV")}
    with pytest.raises(CheckpointError, match="repulsion"):
        imported(tmp_path, upstream_checkpoint(written, **parts))


def test_long_range_models_are_refused_by_name(tmp_path):
    hypers = upstream_hypers(HYPERS) | {"long_range": {**LONG_RANGE, "enable": True}}
    with pytest.raises(CheckpointError, match="long-range") as error:
        imported(tmp_path, upstream_checkpoint(small_checkpoint(), hypers=hypers))
    assert error.value.code == "LongRangeUnsupported"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"architecture": "soap_bpnn"}, "ArchitectureUnsupported"),
        ({"version": 17}, "ModelTooNew"),
        ({"version": 0}, "ModelCorrupt"),
        ({"hypers": {"cutoff": -1.0}}, "ModelCorrupt"),
        ({"hypers": {"d_pet": 4.0}}, "ModelCorrupt"),
        ({"hypers": {"d_pet": 10**9}}, "ModelCorrupt"),
        ({"hypers": {"num_gnn_layers": 10**9}}, "ModelCorrupt"),
        ({"hypers": {"normalization": "BatchNorm"}}, "ArchitectureUnsupported"),
        ({"hypers": {"novelty": 1}}, "ModelCorrupt"),
        ({"hypers": {"cutoff": "wide"}}, "ModelCorrupt"),
        ({"hypers": {"long_range": None}}, "ModelCorrupt"),
        ({"targets": {"energy": None}}, "ModelCorrupt"),
        ({"targets": {"energy\x1b[2J": TARGETS["energy"]}}, "ModelCorrupt"),
        ({"metadata": "{"}, "ModelCorrupt"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, change, code):
    change = dict(change)
    if "hypers" in change:
        change["hypers"] = upstream_hypers(HYPERS) | change["hypers"]
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path, upstream_checkpoint(small_checkpoint(), **change))
    assert error.value.code == code


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("backend.edge_embedder.weight", torch.ones(4, 4)),
        ("backend.extra", torch.ones(1)),
        ("backend.node_last_layers.energy.0.energy_o3_lambda_0.weight", torch.ones(1)),
        ("scaler.energy_scaler_buffer", torch.ones(3)),
        ("scaler.energy_scaler_buffer", torch.ones(3, dtype=torch.uint8)),
        ("scaler.energy_scaler_buffer", tensor_map(("t",), [(1,), (0,)], torch.ones(2, 1).numpy())),
        (
            "additive_models.0.energy_composition_buffer",
            tensor_map(("center_type",), [(1,)], torch.ones(1, 1).numpy()),
        ),
    ],
)
def test_states_that_do_not_fit_the_network_are_refused(tmp_path, name, tensor):
    state = {**upstream_state(small_checkpoint()), name: tensor}
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path, upstream_checkpoint(small_checkpoint(), state=state))
    assert error.value.code == "ModelCorrupt"


def test_a_missing_baseline_or_scale_is_never_replaced_by_a_default(tmp_path):
    for name in ("additive_models.0.energy_composition_buffer", "scaler.energy_scaler_buffer"):
        state = upstream_state(small_checkpoint())
        state.pop(name)
        with pytest.raises(CheckpointError, match="no buffer"):
            imported(tmp_path, upstream_checkpoint(small_checkpoint(), state=state))


def test_metadata_is_kept_without_control_characters(tmp_path):
    text = (
        '{"name": "A\\u001b[31mB", "description": "d", "authors": ["X", "Y"], "references": '
        '{"architecture": ["arch"], "model": ["paper"]}}'
    )
    read = imported(tmp_path, upstream_checkpoint(small_checkpoint(), metadata=text))
    said = read.provenance
    assert (said.name, said.description, said.authors) == ("A[31mB", "d", ("X", "Y"))
    assert said.citation == ("paper", "arch")
    unnamed = upstream_checkpoint(small_checkpoint(), metadata="{}")
    assert imported(tmp_path, unnamed).provenance.name == "fake"
    unnamed["metadata"] = Instance(SCRIPT_OBJECT, 3)
    with pytest.raises(CheckpointError, match="lacks parts"):
        imported(tmp_path, unnamed)


@pytest.mark.skipif(not GOLDEN, reason="no original checkpoint in tests/golden")
def test_an_original_file_of_metatrain():
    read = import_metatrain(GOLDEN[0])
    assert read.hypers.numerics == "metatrain"
    assert set(read.scales) == {t.name for t in read.hypers.targets}
    assert len(read.hypers.atomic_types) == len(read.baseline["energy"])
    Pet(read.hypers).to(read.weights["edge_embedder.weight"].dtype).load_state_dict(
        dict(read.weights), strict=True
    )
