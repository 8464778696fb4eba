"""What the entries of a metatrain checkpoint mean, version by version, in terms of our network.

Input are plain data that `metatrain_import` has read. Each table says at which model version
something changed; an older checkpoint gets the value that metatrain itself would fill in.
Reference: metatrain 2026.4 (model version 16), `metatrain/pet/checkpoints.py`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coset import units
from coset.errors import CheckpointError
from coset.pet.hypers import ConditioningHypers, CutoffHypers, NetworkHypers, Quantity
from coset.strict_json import check_keys, corrupt
from coset.tensor_map import Block, read_block

Hypers = dict[str, Any]
State = dict[str, Tensor]

NEWEST = 16
PREFIX = "backend."
PREFIX_SINCE = 16
NOT_NETWORK = ("additive_models.", "scaler.", "finetune_config", "species_to_species_index")
HEADS = {"node_heads", "edge_heads", "node_last_layers", "edge_last_layers"}

LARGE_SCALE_MARK = "node_embedding.weight"
LARGE_SCALE: dict[str, Callable[[Hypers], object]] = {
    "normalization": lambda h: "RMSNorm",
    "activation": lambda h: "SwiGLU",
    "d_node": lambda h: 4 * h["d_pet"],
    "transformer_type": lambda h: "PreLN",
    "featurizer_type": lambda h: "feedforward",
    "d_feedforward": lambda h: 2 * h["d_pet"],
}
ADDED: tuple[tuple[int, str, Callable[[Hypers], object]], ...] = (
    (8, "normalization", lambda h: "LayerNorm"),
    (8, "activation", lambda h: "SiLU"),
    (8, "d_node", lambda h: h["d_pet"]),
    (8, "transformer_type", lambda h: "PostLN"),
    (8, "featurizer_type", lambda h: "residual"),
    (10, "num_neighbors_adaptive", lambda h: None),
    (10, "cutoff_function", lambda h: "Cosine"),
    (11, "attention_temperature", lambda h: 1.0),
    (12, "adaptive_cutoff_method", lambda h: "grid"),
    (14, "cutoff_width_adaptive", lambda h: h["cutoff_width"]),
    (15, "system_conditioning", lambda h: False),
    (15, "max_charge", lambda h: 10),
    (15, "max_spin_multiplicity", lambda h: 10),
)
"""Version that introduced a hyperparameter, its name, and its value in older checkpoints."""

WHOLE = {
    "d_pet", "d_head", "d_node", "d_feedforward", "num_heads", "num_attention_layers",
    "num_gnn_layers", "max_charge", "max_spin_multiplicity",
}  # fmt: skip
HYPERS = WHOLE | {
    "cutoff", "num_neighbors_adaptive", "adaptive_cutoff_method", "cutoff_function",
    "cutoff_width", "cutoff_width_adaptive", "normalization", "activation",
    "attention_temperature", "transformer_type", "featurizer_type", "zbl", "long_range",
    "system_conditioning",
}  # fmt: skip
NAMES: dict[str, dict[str, Any]] = {
    "normalization": {"RMSNorm": "rms", "LayerNorm": "layer"},
    "activation": {"SwiGLU": "glu", "SiLU": "silu"},
    "transformer_type": {"PreLN": "pre", "PostLN": "post"},
    "featurizer_type": {"feedforward": "feedforward", "residual": "residual"},
    "cutoff_function": {"Bump": "bump", "Cosine": "cosine"},
    "adaptive_cutoff_method": {"grid": "grid", "solver": "solver10"},
}

RENAMED_STANDARD = (
    (r"\.mlp\.0\.", ".mlp.w_in."),
    (r"\.mlp\.3\.", ".mlp.w_out."),
    (r"^embedding\.", "edge_embedder."),
    (r"^gnn_layers\.(\d+)\.node_embedder\.", r"node_embedders.\1."),
)
RENAMED_LARGE_SCALE = (
    (r"^embedding\.", "edge_embedder."),
    (r"^node_embedding\.", "node_embedders.0."),
    (r"^combination_rmsnorms\.", "combination_norms."),
)
PADDED_EMBEDDING = re.compile(r"(^|\.)(node_)?embedding\.|\.(node|neighbor)_embedder\.")
"""Embeddings that had a last row for padding before version 8."""

LENGTHS = ("angstrom", "a", "å")
DIRECT_FORCES = {"non_conservative_force", "non_conservative_forces"}
DIRECT_STRESS = "non_conservative_stress"


class NetworkSettings(NamedTuple):
    """The parts of `PetHypers` that metatrain keeps in its hyperparameters."""

    network: NetworkHypers
    cutoff: CutoffHypers
    conditioning: ConditioningHypers | None
    zbl: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetMeaning:
    """What we make of a target: its quantity and the factor to our units, or why it is dropped.

    `has_zbl` says whether metatrain adds its short-range repulsion, if the model has one.
    """

    quantity: Quantity | None
    factor: float = 1.0
    note: str = ""
    has_zbl: bool = False


def network_settings(hypers: Hypers, version: int, *, large_scale: bool) -> NetworkSettings:
    """Our hyperparameters for those of a checkpoint of `version`.

    Raises:
        CheckpointError: long-range models, unknown or missing hyperparameters.
    """
    filled = dict(hypers)
    if large_scale:
        filled |= {name: value(filled) for name, value in LARGE_SCALE.items()}
    for since, name, value in ADDED:
        if version < since and name not in filled:
            filled[name] = value(filled)
    check_keys(filled, HYPERS, "model_hypers")
    if bad := [name for name in sorted(WHOLE) if type(filled[name]) is not int]:
        raise corrupt(f"{bad[0]} = {filled[bad[0]]!r}, expected a whole number")
    if filled["long_range"]["enable"]:
        raise CheckpointError(
            "the checkpoint has long-range (Ewald) features, which coset does not compute",
            code="LongRangeUnsupported",
            hint="use a model trained with long_range.enable = false",
        )
    named = {key: names[_checked_name(filled, key)] for key, names in NAMES.items()}
    fixed = filled["num_neighbors_adaptive"] is None
    return NetworkSettings(
        network=NetworkHypers(
            d_pet=filled["d_pet"],
            d_node=filled["d_node"],
            d_head=filled["d_head"],
            d_feedforward=filled["d_feedforward"],
            n_heads=filled["num_heads"],
            n_gnn_layers=filled["num_gnn_layers"],
            n_attention_layers=filled["num_attention_layers"],
            normalization=named["normalization"],
            activation=named["activation"],
            norm_placement=named["transformer_type"],
            featurizer=named["featurizer_type"],
            attention_temperature=float(filled["attention_temperature"]),
        ),
        cutoff=CutoffHypers(
            cutoff=float(filled["cutoff"]),
            width=float(filled["cutoff_width"]),
            function=named["cutoff_function"],
            adaptive="fixed" if fixed else named["adaptive_cutoff_method"],
            n_neighbors=None if fixed else float(filled["num_neighbors_adaptive"]),
            adaptive_width=float(filled["cutoff_width_adaptive"]),
        ),
        conditioning=ConditioningHypers(
            max_charge=filled["max_charge"],
            max_spin_multiplicity=filled["max_spin_multiplicity"],
        )
        if filled["system_conditioning"]
        else None,
        zbl=bool(filled["zbl"]),
    )


def network_state(state: State, version: int, *, large_scale: bool) -> State:
    """The weights of the network itself, named as in the newest version."""
    if version >= PREFIX_SINCE:
        return {
            name.removeprefix(PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(PREFIX) and not name.endswith("species_to_species_index")
        }
    own = {name: tensor for name, tensor in state.items() if not name.startswith(NOT_NETWORK)}
    if version >= 8:
        return own
    rules = RENAMED_LARGE_SCALE if large_scale else RENAMED_STANDARD
    return {
        _renamed(name, rules): tensor[:-1] if PADDED_EMBEDDING.search(name) else tensor
        for name, tensor in own.items()
    }


def merge_lora(state: State, alpha: float | None) -> State:
    """Low-rank updates added to the weights they modify: W + (alpha / rank) B A.

    Raises:
        CheckpointError: there are updates, but no alpha says how strong they are.
    """
    merged = {n.replace(".linear.", "."): t for n, t in state.items() if ".lora_" not in n}
    for name, a in state.items():
        if not name.endswith(".lora_A.weight"):
            continue
        if alpha is None:
            raise corrupt(f"{name} is a LoRA update, but the checkpoint does not state its alpha")
        stem = name.removesuffix(".lora_A.weight")
        base, b = state[f"{stem}.linear.weight"], state[f"{stem}.lora_B.weight"]
        update = (alpha / a.shape[0]) * (b.double() @ a.double())
        merged[f"{stem}.weight"] = (base.double() + update).to(base.dtype)
    return merged


def without_block_names(state: State, dropped: set[str]) -> State:
    """Last layers named as ours (`energy.0.weight`, not `energy.0.energy___0.weight`)."""
    kept = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in HEADS and parts[1] in dropped:
            continue
        if parts[0].endswith("last_layers") and len(parts) == 5:
            if parts[3] != f"{parts[1]}___0":
                raise corrupt(f"{name}: expected the block {parts[1]}___0")
            del parts[3]
        kept[".".join(parts)] = tensor
    return kept


def llpr_state(state: State, version: int) -> State:
    """Tensors of the last-layer uncertainty as in version 4: covariances with Cholesky factors."""
    renamed = {}
    for name, tensor in state.items():
        if version < 3 and name.endswith("_ensemble_weights"):
            target = name.removesuffix("_ensemble_weights").removeprefix("mtt::aux::")
            renamed[f"llpr_ensemble_layers.{target}.weight"] = tensor.T.contiguous()
        elif version < 4 and name.startswith("inv_covariance_"):
            kind = name.removeprefix("inv_covariance_")
            renamed[f"cholesky_{kind}"] = _cholesky(state[f"covariance_{kind}"])
        else:
            renamed[name] = tensor
    return renamed


def _cholesky(covariance: Tensor) -> Tensor:
    """Cholesky factor of a covariance plus the smallest of 1e-20, 1e-19, ... that allows one."""
    symmetric = (0.5 * (covariance + covariance.T)).double()
    unit = torch.eye(len(symmetric), dtype=torch.float64)
    for power in range(-20, 16):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(symmetric + 10.0**power * unit)
        if not failed:
            return factor.to(covariance.dtype)
    raise corrupt("a covariance of the uncertainty has no Cholesky factor")


def target_meaning(name: str, quantity: str, unit: str, layout: Block) -> TargetMeaning:
    """What a metatrain target is to us, from its name, physical quantity, unit and layout.

    Raises:
        CheckpointError: an energy in a unit that is not known.
    """
    base, per_atom = name.removeprefix("mtt::").split("/")[0], "atom" in layout.sample_names
    if layout.n_blocks != 1 or layout.n_properties != 1 or len(layout.sample_names) > 2:
        return TargetMeaning(quantity=None, note="more than one number per component")
    shape = (layout.components, per_atom)
    if shape == ((), False) and (quantity == "energy" or (not quantity and base[:6] == "energy")):
        if (factor := _energy_factor(unit)) is None:
            raise CheckpointError(
                f"target {name!r} has the unit {unit!r}, which coset does not know",
                code="UnitUnsupported",
                hint=f"known energies: {', '.join(units.EV_PER_UNIT)}",
            )
        meaning = _meaning("energy", factor, unit)
        return replace(meaning, has_zbl=(quantity, unit) == ("energy", "eV"))
    if shape == ((3,), True) and base in DIRECT_FORCES:
        return _meaning("direct_forces", _per_length(unit, ("",)), unit)
    if shape == ((3, 3), False) and name == DIRECT_STRESS:
        gpa = 1 / units.GPA_PER_EV_PER_A3 if unit.lower() == "gpa" else None
        return _meaning("direct_stress", gpa or _per_length(unit, ("^3", "3")), unit)
    if shape == ((3, 3), False) and base == DIRECT_STRESS:
        note = "metatrain divides by the volume only the stress without a variant"
        return TargetMeaning(quantity=None, note=note)
    return TargetMeaning(quantity=None, note=f"no use for {quantity or 'this quantity'}")


def length_note(unit: str) -> str:
    """A remark on the unit of length, if there is one to make; only networks in Å are read.

    Raises:
        CheckpointError: any other unit.
    """
    if not unit:
        return "lengths: no unit stated, taken as Å"
    if unit.lower() not in LENGTHS:
        raise CheckpointError(
            f"the checkpoint has lengths in {unit!r}, coset reads networks in Å only",
            code="UnitUnsupported",
        )
    return ""


def element_order(species_index: Tensor) -> tuple[int, ...]:
    """Atomic numbers in the order of the embeddings, from the map Z -> index (-1: not known)."""
    index = species_index.tolist()
    order = sorted((i, number) for number, i in enumerate(index) if i >= 0)
    if [i for i, _ in order] != list(range(len(order))) or not order:
        raise corrupt(f"species_to_species_index counts {[i for i, _ in order][:8]}, not 0, 1, 2")
    return tuple(number for _, number in order)


def baseline_of(
    state: State, target: str, types: tuple[int, ...], factor: float
) -> dict[int, float]:
    """Energy per atom of every element in eV: rows of the composition model, labeled by Z."""
    block = read_block(_buffer(state, f"additive_models.0.{target}_composition_buffer"))
    energies = dict(zip(block.samples[:, 0].tolist(), block.values[:, 0].tolist(), strict=True))
    if missing := set(types) - set(energies):
        raise corrupt(f"the composition model of {target} lacks the elements {sorted(missing)}")
    return {number: factor * energies[number] for number in types}


def scale_of(
    state: State, target: str, number_of_target: int, types: tuple[int, ...], factor: float
) -> float | tuple[float, ...]:
    """Scale of a target in our units; per-atom targets have one per element.

    Before version 7 all scales are one tensor. Later every target has rows that are labeled by
    the rank of an element in ascending order of Z, or one row for targets of the whole system.
    """
    if "scaler.scales" in state:
        return factor * float(state["scaler.scales"][number_of_target])
    block = read_block(_buffer(state, f"scaler.{target}_scaler_buffer"))
    values, rows = block.values[:, 0].tolist(), block.samples[:, 0].tolist()
    if rows == [-1]:
        return factor * float(values[0])
    if rows != list(range(len(types))):
        raise corrupt(f"the scales of {target} are labeled {rows[:8]}, expected 0, 1, 2, ...")
    by_element = dict(zip(sorted(types), values, strict=True))
    return tuple(factor * float(by_element[number]) for number in types)


def _buffer(state: State, name: str) -> bytes:
    if name not in state or state[name].dtype != torch.uint8:
        raise corrupt(f"the checkpoint has no buffer {name}")
    return state[name].numpy().tobytes()


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _checked_name(hypers: Hypers, key: str) -> str:
    if (value := hypers[key]) not in NAMES[key]:
        raise CheckpointError(
            f"{key} = {value!r}, expected one of {', '.join(NAMES[key])}",
            code="ArchitectureUnsupported",
            field=key,
        )
    return str(value)


def _meaning(quantity: Quantity, factor: float | None, unit: str) -> TargetMeaning:
    if factor is None:
        return TargetMeaning(quantity=None, note=f"unknown unit {unit!r}")
    if not unit:
        return TargetMeaning(quantity=quantity, note="no unit stated, taken as eV (and Å)")
    note = "" if factor == 1 else f"converted from {unit} by a factor {factor!r}"
    return TargetMeaning(quantity=quantity, factor=factor, note=note)


def _energy_factor(unit: str) -> float | None:
    if not unit:
        return 1.0
    return {name.lower(): factor for name, factor in units.EV_PER_UNIT.items()}.get(unit.lower())


def _per_length(unit: str, powers: tuple[str, ...]) -> float | None:
    """Factor of a unit `energy/Å^n` to eV/Å^n, None if it is not known."""
    if not unit:
        return 1.0
    energy, _, length = unit.lower().rpartition("/")
    known = {name + power for name in LENGTHS for power in powers}
    return _energy_factor(energy) if energy and length in known else None
