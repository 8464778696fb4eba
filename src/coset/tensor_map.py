"""Reading the small labeled arrays (metatensor TensorMaps) that metatrain keeps in its buffers.

A serialized TensorMap is a zip file of .npy arrays; arrays with Python objects are refused.
"""

import io
import math
from dataclasses import dataclass

import numpy as np

from coset.stored_zip import open_zip, read_member, stored_members
from coset.strict_json import corrupt


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The only block of a metatensor TensorMap: labeled rows of values."""

    n_blocks: int
    sample_names: tuple[str, ...]
    samples: np.ndarray
    components: tuple[int, ...]
    n_properties: int
    values: np.ndarray


def read_block(data: bytes) -> Block:
    """The first block of a serialized TensorMap."""
    with open_zip(io.BytesIO(data), "a TensorMap") as archive:
        members = stored_members(archive, len(data))
        arrays = {
            name: _array(read_member(archive, member), name)
            for name, member in members.items()
            if name.startswith("blocks/0/") and "/gradients/" not in name
        }
    try:
        samples, values = arrays["blocks/0/samples.npy"], arrays["blocks/0/values.npy"]
        names = samples.dtype.names or ()
        return Block(
            n_blocks=sum(name.count("/") == 2 and name.endswith("/values.npy") for name in members),
            sample_names=names,
            samples=np.stack([samples[name] for name in names], axis=-1),
            components=values.shape[1:-1],
            n_properties=values.shape[-1],
            values=values.reshape(len(values), math.prod(values.shape[1:])),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise corrupt(f"a TensorMap is not complete: {error!r}") from None


def _array(data: bytes, name: str) -> np.ndarray:
    """An array without objects whose header agrees with the number of bytes behind it."""
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("unknown version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or fortran or size != len(data) - file.tell():
            raise ValueError(f"shape {shape} of {dtype} does not fit {len(data)} bytes")
        return np.ndarray(shape, dtype, buffer=data, offset=file.tell())
    except (ValueError, TypeError) as error:
        raise corrupt(f"array {name} is damaged: {error}") from None
