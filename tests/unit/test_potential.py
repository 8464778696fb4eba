"""Binding a model: targets, refusals, memory, precisions, and only the heads asked for."""

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tolerances
import torch
from factories import (
    HYPERS,
    all_structures,
    crystal,
    molecule,
    structures,
    tiny_checkpoint,
    tiny_potential,
)
from scipy.spatial.transform import Rotation
from tolerances import close

from coset import potential as module
from coset.checkpoint import Checkpoint
from coset.edge_model import Outputs, Quadrature, edge_gradient
from coset.errors import ConfigError, StructureError
from coset.loading import LoadSettings, potential_of, with_converged_cutoff
from coset.neighbors import edge_vectors, neighbor_list
from coset.pet.hypers import Target
from coset.potential import pick_target, ranges, without_net_force
from coset.structures import concatenate, properties_of

POOL = structures()
CPU = LoadSettings(dtype="float64", device="cpu")


def two_energies(direct=()):
    """A checkpoint with two energy targets and direct heads of the given names."""
    quantities = {"forces": "direct_forces", "stress": "direct_stress"}
    targets = [Target(name=f"energy/{v}", quantity="energy") for v in ("pbe", "r2scan")]
    targets += [Target(name=name, quantity=quantities[name.partition("/")[0]]) for name in direct]
    return tiny_checkpoint("converged", targets=tuple(targets))


# Targets


def test_several_targets_and_no_choice_list_the_choices():
    with pytest.raises(ConfigError) as caught:
        potential_of(two_energies(), CPU)
    assert caught.value.code == "TargetNotChosen"
    assert "energy/pbe" in str(caught.value)
    assert "energy/r2scan" in str(caught.value)


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        potential_of(two_energies(), replace(CPU, target="energy/scan"))
    assert caught.value.code == "UnknownTarget"
    assert "'energy/scan'" in str(caught.value)
    assert "energy/pbe, energy/r2scan" in str(caught.value)


def test_a_single_target_needs_no_choice():
    assert pick_target(("energy",), None) == "energy"
    assert potential_of(tiny_checkpoint(), CPU).outputs.energy == ("energy",)


def test_a_model_without_energies_says_so():
    with pytest.raises(ConfigError, match="none"):
        pick_target((), None)


def test_each_target_has_its_own_head_and_baseline():
    checkpoint = two_energies()
    baselines = {name: dict(table) for name, table in checkpoint.baseline.items()}
    baselines["energy/r2scan"][29] -= 7.0
    own = replace(checkpoint, baseline=baselines)
    one = POOL["fcc rattled"]
    first, second = (
        potential_of(own, replace(CPU, target=f"energy/{v}"))(one) for v in ("pbe", "r2scan")
    )
    same_baseline = potential_of(checkpoint, replace(CPU, target="energy/r2scan"))(one)
    assert abs(float(second.energy - same_baseline.energy) + 4 * 7.0) <= tolerances.SAME_ALGEBRA
    assert float((first.forces - second.forces).abs().max()) > 0.1


def test_systems_of_a_batch_may_use_different_targets():
    """`target_index` chooses among the energy heads asked for."""
    potential = potential_of(two_energies(), replace(CPU, target="energy/pbe"))
    batch = concatenate([POOL["triclinic"], POOL["water"]])
    graph = neighbor_list(batch, potential.cutoff)
    r = edge_vectors(batch, graph)
    names = Outputs(energy=("energy/pbe", "energy/r2scan"))
    alone = {
        name: edge_gradient(potential.model, graph, r, outputs=Outputs(energy=(name,)))
        for name in names.energy
    }
    mixed = replace(graph, target_index=torch.tensor([1, 0]))
    readout, gradient = edge_gradient(potential.model, mixed, r, outputs=names)
    system = batch.system_index[graph.centers]
    for number, name in ((0, "energy/r2scan"), (1, "energy/pbe")):
        own_atoms = batch.system_index == number
        energies = alone[name][0].atomic_energies
        assert close(readout.atomic_energies[own_atoms], energies[own_atoms], 1e-13)
        assert close(gradient[system == number], alone[name][1][system == number], 1e-13)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (("forces/pbe", "forces/r2scan"), "forces/r2scan"),
        (("forces", "forces/pbe"), "forces"),
        (("forces",), "forces"),
    ],
)
def test_direct_forces_are_those_of_the_variant(heads, expected):
    settings = replace(CPU, target="energy/r2scan", forces="direct")
    assert potential_of(two_energies(heads), settings).outputs.direct_forces == expected


def test_direct_forces_that_do_not_exist_are_refused():
    settings = replace(CPU, target="energy/r2scan", forces="direct")
    for heads in ((), ("forces/pbe",)):
        with pytest.raises(ConfigError) as caught:
            potential_of(two_energies(heads), settings)
        assert caught.value.code == "NoDirectForces"


# What a model cannot take


def test_an_unknown_element_is_named_with_its_system():
    batch = concatenate([POOL["water"], molecule([(0, 0, 0)], [92]), POOL["fcc"]])
    with pytest.raises(StructureError) as caught:
        tiny_potential()(batch)
    error = caught.value
    assert (error.code, error.structure_id, error.field) == (
        "UnknownElement",
        "1",
        "atomic_numbers",
    )
    assert "Z = 92" in str(error)
    assert "1, 6, 8, 14, 29" in str(error)


def test_ranges_of_elements():
    assert ranges(frozenset({1, 2, 3, 5, 7, 8})) == "1-3, 5, 7-8"


def test_a_charge_is_never_ignored_silently():
    ion = molecule([(0, 0, 0)], [8], charge=-2)
    batch = concatenate([POOL["water"], ion])
    potential = tiny_potential("converged")
    with pytest.raises(StructureError) as caught:
        potential(batch)
    error = caught.value
    assert (error.code, error.structure_id, error.field) == ("BadCharge", "1", "charge")
    assert "--ignore-charge" in str(error)
    ignoring = potential_of(tiny_checkpoint(), replace(CPU, ignore_charge=True))
    neutral = concatenate([POOL["water"], molecule([(0, 0, 0)], [8])])
    assert torch.equal(ignoring(batch).energy, potential(neutral).energy)


@pytest.mark.parametrize(("charge", "spin"), [(3, 1), (-3, 1), (0, 4), (0, 0), (1, -1)])
def test_charges_out_of_range_are_refused(charge, spin):
    """Embedding tables end at charge ±2 and multiplicity 3; negative indices would wrap around."""
    bad = molecule([(0, 0, 0)], [8], charge=charge, spin_multiplicity=spin)
    with pytest.raises(StructureError) as caught:
        tiny_potential("conditioned")(concatenate([POOL["water"], bad]))
    assert caught.value.code == "BadCharge"
    assert caught.value.structure_id == "1"
    assert "|charge| <= 2" in str(caught.value)


@pytest.mark.parametrize(("charge", "spin"), [(2, 3), (-2, 1), (1, 2), (0, 3)])
def test_charges_in_range_change_the_energy(charge, spin):
    potential = tiny_potential("conditioned")
    neutral = molecule([(0, 0, 0)], [8])
    ion = molecule([(0, 0, 0)], [8], charge=charge, spin_multiplicity=spin)
    opposite = molecule([(0, 0, 0)], [8], charge=-charge, spin_multiplicity=4 - spin)
    for other in (neutral, opposite):
        assert abs(float(potential(ion).energy - potential(other).energy)) > 1e-4


def test_overlapping_atoms_are_refused_with_their_system():
    overlapping = crystal(3 * np.eye(3), [(0.01, 0.5, 0.5), (0.99, 0.5, 0.5)], [29, 29])
    with pytest.raises(StructureError) as caught:
        tiny_potential()(concatenate([POOL["fcc"], POOL["water"], overlapping]))
    error = caught.value
    assert (error.code, error.structure_id) == ("AtomsOverlap", "2")
    assert "0.06 Å apart" in str(error)


def test_overlap_names_the_system_also_in_a_later_batch():
    overlapping = crystal(3 * np.eye(3), [(0.01, 0.5, 0.5), (0.99, 0.5, 0.5)], [29, 29])
    potential = replace(tiny_potential(), memory=0.0)
    with pytest.raises(StructureError) as caught:
        potential(concatenate([POOL["fcc"], POOL["water"], overlapping]))
    assert caught.value.structure_id == "2"


def test_bad_structures_are_refused_before_anything_else():
    bad = molecule([(0, 0, 0), (float("nan"), 0, 0)], [8, 8])
    with pytest.raises(StructureError) as caught:
        tiny_potential()(concatenate([POOL["water"], bad]))
    assert (caught.value.code, caught.value.structure_id) == ("NonFiniteInput", "1")


# Memory


@pytest.mark.parametrize("memory", [0.0, 1e6, 3e6])
def test_a_memory_budget_cuts_the_batch_and_changes_nothing(memory, monkeypatch):
    batch = all_structures()
    whole = replace(tiny_potential(), outputs=ALL_HEADS)
    cut = replace(whole, memory=memory)
    sizes = []
    original = module.batched_neighbor_lists

    def counted(*arguments):
        for systems, part, graph in original(*arguments):
            sizes.append(systems.tolist())
            yield systems, part, graph

    expected = whole(batch)
    monkeypatch.setattr(module, "batched_neighbor_lists", counted)
    found = cut(batch)
    assert len(sizes) > 1
    assert [k for systems in sizes for k in systems] == list(range(30))
    names = list(POOL)
    for systems in sizes:
        assert len(systems) == 1 or sum(cost_of(names[k], whole) for k in systems) <= memory
    for name in ("energy", "forces", "stress", "torque", "direct_forces", "direct_stress"):
        a, b = getattr(found, name).nan_to_num(), getattr(expected, name).nan_to_num()
        assert close(a, b, tolerances.SAME_PHYSICS), name


def cost_of(name, potential):
    n_edges = len(neighbor_list(POOL[name], potential.cutoff).centers)
    return potential.model.memory_per_batch(len(POOL[name].positions), n_edges)


def test_each_system_keeps_its_own_rotations_when_the_batch_is_cut():
    batch = concatenate([POOL["triclinic"], POOL["six"], POOL["water"]])
    turns = Rotation.random(6, rng=np.random.default_rng(0)).as_matrix()
    own = Quadrature(
        rotations=torch.tensor(turns).reshape(2, 3, 3, 3),
        weights=torch.full((2, 3), 0.5, dtype=torch.float64),
        degree=0,
    )
    potential = replace(tiny_potential(), quadrature=own)
    whole, cut = potential(batch), replace(potential, memory=0.0)(batch)
    assert close(whole.energy, cut.energy, tolerances.SAME_PHYSICS)
    assert close(whole.forces, cut.forces, tolerances.SAME_PHYSICS)


ALL_HEADS = Outputs(direct_forces="direct_forces", direct_stress="direct_stress")


# Precision


@cache
def in_precision(dtype):
    return replace(tiny_potential(dtype=dtype), outputs=ALL_HEADS)(all_structures())


@pytest.mark.parametrize("dtype", ["mixed", "float32"])
def test_single_precision_is_near_double(dtype):
    """float32 weights are the float64 ones, rounded."""
    batch, double, single = all_structures(), in_precision("float64"), in_precision(dtype)
    assert single.energy.dtype == torch.float64
    assert single.forces.dtype == torch.float64
    force_error = float((single.forces - double.forces).abs().max())
    energy_error = ((single.energy - double.energy).abs() / batch.n_atoms).max()
    assert 0 < force_error <= tolerances.SINGLE_FORCE
    assert float(energy_error) <= tolerances.SINGLE_ENERGY
    direct = (single.direct_forces - double.direct_forces).abs().max()
    assert float(direct) <= tolerances.SINGLE_FORCE


def test_precisions_are_what_they_say():
    for name, geometry, network in (
        ("float64", torch.float64, torch.float64),
        ("mixed", torch.float64, torch.float32),
        ("float32", torch.float32, torch.float32),
    ):
        potential = tiny_potential(dtype=name)
        assert (potential.dtype, potential.model.dtype) == (geometry, network)
    with pytest.raises(ConfigError, match=r"float64, mixed, float32"):
        tiny_potential(dtype="bfloat16")


@pytest.mark.parametrize("name", ["water", "slab", "triclinic"])
def test_single_precision_does_not_see_where_a_system_lies(name):
    """1,000 Å away float32 coordinates would be known to 6e-5 Å only."""
    one, potential = POOL[name], tiny_potential(dtype="float32")
    far = replace(one, positions=one.positions + 1000.0)
    assert float((potential(far).forces - potential(one).forces).abs().max()) <= 5e-6


def test_structures_in_single_precision_are_taken():
    result = tiny_potential()(all_structures().to(torch.float32))
    error = (result.forces - in_precision("float64").forces).abs().max()
    assert 0 < float(error) <= tolerances.SINGLE_FORCE
    assert result.energy.dtype == torch.float64


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
        potential_of(tiny_checkpoint(), replace(CPU, device="gpu"))
    with pytest.raises(ConfigError, match="not there"):
        potential_of(tiny_checkpoint(), replace(CPU, device="cuda:77"))


# Heads


def head_calls(potential, batch):
    """How often the head of every target runs."""
    calls, handles = Counter(), []
    for kind in ("node_heads", "edge_heads", "node_last_layers", "edge_last_layers"):
        for name, layers in getattr(potential.model, kind).items():
            for layer in layers:

                def count(*_, key=(kind, name)):
                    calls[key] += 1

                handles.append(layer.register_forward_hook(count))
    potential(batch)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (Outputs(), {"energy"}),
        (Outputs(direct_forces="direct_forces"), {"energy", "direct_forces"}),
        (ALL_HEADS, {"energy", "direct_forces", "direct_stress"}),
    ],
)
def test_only_the_heads_asked_for_run(outputs, names):
    potential = replace(tiny_potential(), outputs=outputs)
    calls = head_calls(potential, POOL["triclinic"])
    assert {name for _, name in calls} == names
    assert set(calls.values()) == {1}
    result = potential(POOL["triclinic"])
    assert (result.direct_forces is None) == (outputs.direct_forces is None)
    assert (result.direct_stress is None) == (outputs.direct_stress is None)


def test_the_residual_network_has_a_head_per_layer():
    calls = head_calls(tiny_potential("residual"), POOL["triclinic"])
    assert set(calls.values()) == {2}


def test_only_one_of_several_energies_runs():
    potential = potential_of(two_energies(), replace(CPU, target="energy/r2scan"))
    assert {name for _, name in head_calls(potential, POOL["water"])} == {"energy/r2scan"}


def test_direct_forces_need_no_gradient():
    """The forces of `direct` are heads; no conservative force is computed or shown."""
    potential = potential_of(tiny_checkpoint(), replace(CPU, forces="direct"))
    result = potential(POOL["triclinic"])
    assert result.forces is None
    assert result.stress is None
    assert result.direct_forces is not None


def test_direct_forces_have_no_net_force_in_any_system():
    batch = all_structures()
    forces = in_precision("float64").direct_forces
    sums = torch.zeros(len(batch), 3).double().index_add(0, batch.system_index, forces)
    assert float(sums.abs().max()) <= tolerances.SAME_ALGEBRA
    kept = forces + batch.system_index[:, None].double()
    assert close(without_net_force(kept, batch), forces, tolerances.SAME_ALGEBRA)


def test_direct_stress_is_symmetric_and_per_volume():
    """A supercell has the same stress; systems without a volume have none."""
    batch, result = all_structures(), in_precision("float64")
    stress = result.direct_stress
    assert torch.equal(stress.isnan().all((1, 2)), ~batch.pbc.all(1))
    assert torch.equal(stress.nan_to_num(), stress.mT.nan_to_num())
    assert float(stress.nan_to_num().abs().max()) > 0.01


# Scales and conversion


def test_scales_and_baselines_enter_once():
    """E = scale * network + baseline: with twice the scale forces double, energies less the
    baseline too; per-element scales of direct forces act on their own element."""
    plain = tiny_checkpoint()
    double = {**plain.scales, "energy": 2 * plain.scales["energy"]}
    double["direct_forces"] = tuple(
        x * (3.0 if z == 8 else 1.0)
        for x, z in zip(plain.scales["direct_forces"], HYPERS.atomic_types, strict=True)
    )
    one = POOL["triclinic"]
    before, after = (
        replace(potential_of(c, CPU), outputs=ALL_HEADS)(one)
        for c in (plain, replace(plain, scales=double))
    )
    baseline = sum(-1.0 - 0.1 * z for z in one.atomic_numbers.tolist())
    assert float(after.energy - baseline) == pytest.approx(float(2 * (before.energy - baseline)))
    assert close(after.forces, 2 * before.forces, tolerances.SAME_ALGEBRA)
    assert close(after.stress, 2 * before.stress, tolerances.SAME_ALGEBRA)
    moved = after.direct_forces - before.direct_forces
    oxygen = one.atomic_numbers == 8
    # The net force is removed: the others move by the same vector.
    others = moved[~oxygen]
    assert close(others, others[:1].expand_as(others), tolerances.SAME_ALGEBRA)
    assert float((moved[oxygen] - others[0]).abs().max()) > 1e-3


def test_a_converted_solver_changes_energies_only_where_it_had_not_converged():
    checkpoint = tiny_checkpoint("solver10")
    converted = with_converged_cutoff(checkpoint)
    assert isinstance(converted, Checkpoint)
    assert converted.hypers.cutoff.adaptive == "converged"
    assert converted.provenance.conversions == ("solver10 -> converged",)
    before, after = (potential_of(c, CPU)(all_structures()) for c in (checkpoint, converted))
    assert close(before.energy, after.energy, 1e-6)
    with pytest.raises(ConfigError, match="only 'solver10' can"):
        with_converged_cutoff(tiny_checkpoint("grid"))


def test_properties_of_one_system_are_those_of_the_batch():
    batch, result = all_structures(), in_precision("float64")
    names = list(POOL)
    own = properties_of(result, batch, names.index("triclinic"))
    alone = replace(tiny_potential(), outputs=ALL_HEADS)(POOL["triclinic"])
    assert close(own.forces, alone.forces, tolerances.SAME_PHYSICS)
    assert close(own.energy, alone.energy, tolerances.SAME_PHYSICS)
