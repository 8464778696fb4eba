"""Which frames of a source can be used, and which of their labels."""

from collections import Counter
from dataclasses import replace

import numpy as np

from coset.data.geometry import structures_of
from coset.data.store import Frames
from coset.errors import StructureError
from coset.structures import fault, validate

SMALL_INTEGER = np.iinfo(np.int16)


def clean(frames: Frames) -> tuple[Frames, np.ndarray, Counter[str]]:
    """The frames with sound labels only, why each is unusable, and what was taken away.

    A label with a value that is not finite goes as a whole; a stress goes where the structure is
    not periodic in three directions. The reason [S] is empty for a usable frame.
    """
    energy = np.isfinite(frames.energy)
    forces = ~_any(frames, ~np.isfinite(frames.forces).all(axis=1))
    atomic = ~_any(frames, ~np.isfinite(frames.atomic_energies))
    stress = np.isfinite(frames.stress).all(axis=(1, 2))
    periodic = frames.pbc.all(axis=1)
    broken = {
        "energy": ~np.isnan(frames.energy) & ~energy,
        "forces": _any(frames, ~np.isnan(frames.forces).all(axis=1)) & ~forces,
        "stress": ~np.isnan(frames.stress).all(axis=(1, 2)) & ~stress,
        "atomic energies": _any(frames, ~np.isnan(frames.atomic_energies)) & ~atomic,
    }
    dropped = Counter({f"{label} not finite": int(bad.sum()) for label, bad in broken.items()})
    dropped["stress, not periodic in 3D"] = int((stress & ~periodic).sum())
    stress &= periodic
    reasons = _reasons(frames)
    reasons[(reasons == "") & ~(energy | forces | stress)] = "no usable label"
    cleaned = replace(
        frames,
        energy=np.where(energy, frames.energy, np.nan),
        forces=np.where(np.repeat(forces, frames.n_atoms)[:, None], frames.forces, np.nan),
        stress=np.where(stress[:, None, None], frames.stress, np.nan),
        atomic_energies=np.where(np.repeat(atomic, frames.n_atoms), frames.atomic_energies, np.nan),
    )
    return cleaned, reasons, +dropped


def keep(frames: Frames, mask: np.ndarray) -> Frames:
    """The frames where `mask` holds; what is left of a broken unit stands alone."""
    unit_of = np.cumsum(frames.unit > 0) - 1
    whole = np.bincount(unit_of[~mask], minlength=int(unit_of[-1]) + 1 if len(mask) else 0) == 0
    units = np.where(whole[unit_of], frames.unit, 1).astype(np.uint8)
    return replace(frames, unit=units).take(np.flatnonzero(mask))


def _reasons(frames: Frames) -> np.ndarray:
    """Why a structure cannot be used: the code of its error, empty for a sound one."""
    reasons = np.full(len(frames), "", dtype=object)
    try:
        validate(structures_of(frames))
    except StructureError:
        for k in range(len(frames)):
            error = fault(structures_of(frames.take(np.array([k]))))
            reasons[k] = error.code if error else ""
    for value in (frames.charge, frames.spin_multiplicity):
        outside = (value < SMALL_INTEGER.min) | (value > SMALL_INTEGER.max)
        reasons[outside & (reasons == "")] = "BadCharge"
    return reasons


def _any(frames: Frames, atoms: np.ndarray) -> np.ndarray:
    """Whether some atom of each frame is marked."""
    frame_of = np.repeat(np.arange(len(frames)), frames.n_atoms)
    marked: np.ndarray = np.bincount(frame_of[atoms], minlength=len(frames)) > 0
    return marked
