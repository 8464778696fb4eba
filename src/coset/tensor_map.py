"""Reading the small labeled arrays (metatensor TensorMaps) that metatrain keeps in its buffers.

A serialized TensorMap is a zip file of .npy arrays; arrays with Python objects are refused.
"""

import ast
import io
import math
from dataclasses import dataclass

import numpy as np

from coset.stored_zip import open_zip, read_member, stored_members
from coset.strict_json import corrupt

MAGIC = b"\x93NUMPY\x01\x00"
PREFIX_BYTES = len(MAGIC) + 2
MAX_HEADER_BYTES = 10_000
NUMBERS, LABEL = ("<f8", "<f4"), "<i4"


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
    """An array in .npy format 1.0, of numbers or of named integers, that fills its file exactly."""
    start = PREFIX_BYTES + int.from_bytes(data[PREFIX_BYTES - 2 : PREFIX_BYTES], "little")
    if not data.startswith(MAGIC) or start > min(len(data), MAX_HEADER_BYTES):
        raise corrupt(f"array {name} is not in .npy format 1.0")
    try:
        header = ast.literal_eval(data[PREFIX_BYTES:start].decode("ascii"))
        kind = header["descr"]
        if kind not in NUMBERS and {number for _, number in kind} != {LABEL}:
            raise ValueError("neither numbers nor labels")
        array = np.ndarray(header["shape"], np.dtype(kind), buffer=data, offset=start)
        if header["fortran_order"] or array.nbytes != len(data) - start:
            raise ValueError("its shape does not fit its bytes")
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise corrupt(f"array {name} is damaged: {error!s:.100}") from None
    return array
