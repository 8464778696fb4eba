"""Small models, and metatrain checkpoint files written byte by byte, for tests.

`pickle_bytes` writes the few pickle instructions that metatrain files contain; no pickle library is
involved in making, or in reading, any file here.
"""

import io
import struct
import zipfile
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from coset.checkpoint import Checkpoint, Provenance
from coset.pet.hypers import CutoffHypers, NetworkHypers, PetHypers, Target

TYPES = (1, 8, 29)
NETWORK = NetworkHypers(
    d_pet=4, d_node=8, d_head=4, d_feedforward=8, n_heads=2, n_gnn_layers=2, n_attention_layers=1
)
CUTOFF = CutoffHypers(
    cutoff=5.0, width=0.5, function="bump", adaptive="grid", n_neighbors=6.0, adaptive_width=0.5
)
HYPERS = PetHypers(
    atomic_types=TYPES,
    targets=(
        Target(name="energy", quantity="energy"),
        Target(name="non_conservative_forces", quantity="direct_forces"),
        Target(name="non_conservative_stress", quantity="direct_stress"),
    ),
    network=NETWORK,
    cutoff=CUTOFF,
    numerics="metatrain",
    norm_eps=None,
)


def small_checkpoint(hypers=HYPERS, dtype=torch.float32, **changes):
    """A complete model with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in hypers.parameter_shapes().items()
    }
    baseline = {z: -1.5 * i - 0.1 for i, z in enumerate(hypers.atomic_types)}
    per_atom = tuple(0.5 + 0.25 * i for i in range(len(hypers.atomic_types)))
    return Checkpoint(
        hypers=hypers,
        weights=weights,
        baseline=dict.fromkeys(hypers.targets_of("energy"), baseline),
        scales={t.name: per_atom if t.quantity == "direct_forces" else 0.7 for t in hypers.targets},
        provenance=replace(Provenance(name="small"), **changes),
    )


# A writer of pickles


@dataclass
class Name:
    """A global name."""

    module: str
    name: str


@dataclass
class Instance:
    """An object made without arguments, with its attributes set afterwards."""

    kind: Name
    state: object


@dataclass
class Call:
    """The result of calling a global name."""

    function: Name
    arguments: tuple


@dataclass
class Persistent:
    """A persistent id."""

    pid: tuple


@dataclass
class Storages:
    """The tensors met while pickling, in the order of their keys."""

    tensors: list = field(default_factory=list)


ORDERED_DICT = Call(Name("collections", "OrderedDict"), ())
SCRIPT_OBJECT = Name("torch", "ScriptObject")
DATASET_INFO = Name("metatrain.utils.data.dataset", "DatasetInfo")
TARGET_INFO = Name("metatrain.utils.data.target_info", "TargetInfo")
STORAGE_NAMES = {
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.uint8: "ByteStorage",
}


def encode(value, storages):
    """The pickle instructions that push `value`."""
    if isinstance(value, torch.Tensor):
        return encode(_tensor_call(value, storages), storages)
    kind = type(value)
    if kind in (type(None), bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if kind is int:
        return b"J" + struct.pack("<i", value)
    if kind is float:
        return b"G" + struct.pack(">d", value)
    if kind is str:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    parts = {
        dict: lambda: (b"}(", [x for pair in value.items() for x in pair], b"u"),
        list: lambda: (b"](", value, b"e"),
        tuple: lambda: (b"(", value, b"t"),
        Name: lambda: (f"c{value.module}\n{value.name}\n".encode(), (), b""),
        Call: lambda: (b"", (value.function, value.arguments), b"R"),
        Instance: lambda: (b"", (value.kind, (), _New(), value.state), b"b"),
        Persistent: lambda: (b"", (value.pid,), b"Q"),
        _New: lambda: (b"\x81", (), b""),
    }
    before, items, after = parts[kind]()
    return before + b"".join(encode(item, storages) for item in items) + after


class _New:
    """The instruction that makes an instance."""


def _tensor_call(tensor, storages):
    key = str(len(storages.tensors))
    storages.tensors.append(tensor.contiguous())
    name = Name("torch", STORAGE_NAMES[tensor.dtype])
    pid = Persistent(("storage", name, key, "cpu", tensor.numel()))
    layout = (0, tuple(tensor.shape), tuple(tensor.contiguous().stride()), False, ORDERED_DICT)
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (pid, *layout))


def pickle_bytes(value, storages=None):
    """A protocol-2 pickle of `value`."""
    return b"\x80\x02" + encode(value, storages or Storages()) + b"."


def torch_zip(value, *, compression=zipfile.ZIP_STORED):
    """The bytes of a file as torch.save would write it."""
    storages = Storages()
    data = pickle_bytes(value, storages)
    return zip_of(
        {
            "archive/data.pkl": data,
            "archive/byteorder": b"little",
            **{f"archive/data/{i}": t.numpy().tobytes() for i, t in enumerate(storages.tensors)},
            "archive/version": b"3\n",
        },
        compression=compression,
    )


def zip_of(members, *, compression=zipfile.ZIP_STORED):
    """A zip file of the given members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# A metatrain checkpoint


def tensor_map(labels, samples, values, properties="value"):
    """A serialized TensorMap with one block, as metatrain keeps it in a buffer."""
    rows = np.array([tuple(row) for row in samples], dtype=[(name, "<i4") for name in labels])
    arrays = {
        "keys": np.array([(0,)], dtype=[("_", "<i4")]),
        "blocks/0/values": values,
        "blocks/0/samples": rows,
        "blocks/0/properties": np.array(
            [(i,) for i in range(values.shape[-1])], dtype=[(properties, "<i4")]
        ),
    }
    members = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[f"{name}.npy"] = buffer.getvalue()
    return torch.frombuffer(bytearray(zip_of(members)), dtype=torch.uint8)


def layout(*components, per_atom=False, properties=1):
    """The empty TensorMap that tells the shape of a target."""
    labels = ("system", "atom") if per_atom else ("system",)
    return tensor_map(labels, [], np.zeros((0, *components, properties)))


def target_info(shape, quantity, unit):
    """A pickled TargetInfo."""
    state = {"layout": Instance(SCRIPT_OBJECT, (shape, "TensorMap")), "is_scalar": True}
    return Instance(TARGET_INFO, {**state, "quantity": quantity, "unit": unit})


TARGETS = {
    "energy": target_info(layout(), "energy", "eV"),
    "non_conservative_forces": target_info(layout(3, per_atom=True), "force", "eV/A"),
    "non_conservative_stress": target_info(layout(3, 3), "pressure", "eV/A^3"),
}
LONG_RANGE = {"enable": False, "use_ewald": False, "smearing": 1.4}
SINCE = {
    "normalization": 8, "activation": 8, "d_node": 8, "transformer_type": 8, "featurizer_type": 8,
    "num_neighbors_adaptive": 10, "cutoff_function": 10, "attention_temperature": 11,
    "adaptive_cutoff_method": 12, "cutoff_width_adaptive": 14, "system_conditioning": 15,
    "max_charge": 15, "max_spin_multiplicity": 15,
}  # fmt: skip


def upstream_hypers(hypers, version=16):
    """The hyperparameters under the names of metatrain, without those of later versions."""
    net, cut = hypers.network, hypers.cutoff
    names = {"rms": "RMSNorm", "layer": "LayerNorm", "glu": "SwiGLU", "silu": "SiLU"}
    methods = {"grid": "grid", "solver10": "solver", "fixed": "solver"}
    table = {
        "cutoff": cut.cutoff, "cutoff_width": cut.width, "d_pet": net.d_pet, "d_head": net.d_head,
        "d_feedforward": net.d_feedforward, "num_heads": net.n_heads, "zbl": hypers.zbl,
        "num_attention_layers": net.n_attention_layers, "num_gnn_layers": net.n_gnn_layers,
        "long_range": LONG_RANGE, "d_node": net.d_node, "featurizer_type": net.featurizer,
        "normalization": names[net.normalization], "activation": names[net.activation],
        "transformer_type": {"pre": "PreLN", "post": "PostLN"}[net.norm_placement],
        "num_neighbors_adaptive": cut.n_neighbors, "cutoff_function": cut.function.title(),
        "attention_temperature": net.attention_temperature,
        "adaptive_cutoff_method": methods[cut.adaptive],
        "cutoff_width_adaptive": cut.adaptive_width, "system_conditioning": False,
        "max_charge": 10, "max_spin_multiplicity": 10,
    }  # fmt: skip
    return {name: value for name, value in table.items() if SINCE.get(name, 1) <= version}


def upstream_state(checkpoint, version=16):
    """A state dict under the names of metatrain, with its buffers of baseline and scales."""
    state = {"species_to_species_index": torch.full((max(TYPES) + 1,), -1)}
    for i, z in enumerate(checkpoint.hypers.atomic_types):
        state["species_to_species_index"][z] = i
    for name, tensor in checkpoint.weights.items():
        parts = name.split(".")
        if parts[0].endswith("last_layers"):
            parts.insert(3, f"{parts[1]}___0")
        state[".".join(parts)] = tensor
    if version >= 16:
        state = {f"backend.{name}": tensor for name, tensor in state.items()}
    for target, table in checkpoint.baseline.items():
        values = np.array(list(table.values()))[:, None]
        buffer = tensor_map(("center_type",), [(z,) for z in table], values)
        state[f"additive_models.0.{target}_composition_buffer"] = buffer
    if version < 7:
        state["scaler.scales"] = torch.tensor([0.7] * len(checkpoint.scales))
        return state
    for target, scale in checkpoint.scales.items():
        values = np.atleast_1d(scale)[:, None]
        rows = [(i,) for i in range(len(values))] if isinstance(scale, tuple) else [(-1,)]
        state[f"scaler.{target}_scaler_buffer"] = tensor_map(("atomic_type",), rows, values)
    return state


def upstream_checkpoint(checkpoint, version=16, **parts):
    """The dict that metatrain would save; `parts` replace entries of the model."""
    state = parts.get("state") or upstream_state(checkpoint, version)
    info = {
        "length_unit": parts.get("length_unit", "angstrom"),
        "_atomic_types": list(TYPES),
        "targets": parts.get("targets", TARGETS),
    }
    return {
        "architecture_name": parts.get("architecture", "pet"),
        "model_ckpt_version": version,
        "metadata": Instance(SCRIPT_OBJECT, (parts.get("metadata", '{"name": "Fake"}'), "x")),
        "model_data": {
            "model_hypers": parts.get("hypers") or upstream_hypers(checkpoint.hypers, version),
            "dataset_info": Instance(DATASET_INFO, info),
        },
        "epoch": 3,
        "model_state_dict": {**state, "finetune_config": parts.get("finetune", {})},
        "best_model_state_dict": state if parts.get("best", True) else None,
        "train_hypers": {},
    }
