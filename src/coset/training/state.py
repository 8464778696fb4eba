"""What a run is after a step, written so that it can go on as if it had never stopped.

A checkpoint is a directory `step-000000123` of

    model.zip             the averaged weights as a complete model, for validation and use
    weights.safetensors   the raw weights, from which training goes on
    optimizer.safetensors moments of the optimizer
    state.json            step, digests of settings and data, best error, sha256 of the files

The schedule, the order of the data and all random numbers are functions of the step, so nothing
else is needed. The file `latest` names the newest checkpoint; it is replaced after the directory
stands, so a kill at any time leaves a run that can go on.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from coset.atomic_files import write_directory, write_file
from coset.checkpoint import Checkpoint, checkpoint_files, load_checkpoint
from coset.errors import CheckpointError, ConfigError
from coset.stored_zip import zip_bytes
from coset.strict_json import parse_json
from coset.training.optim import Optimizer

LATEST, LOCK, STATE, MODEL = "latest", "lock", "state.json", "model.zip"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """step: finished steps of the run; run, data: digests of settings and stores."""

    step: int
    run: str
    data: str
    best: float = float("inf")
    skipped: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def save_state(
    directory: Path,
    facts: Facts,
    network: nn.Module,
    optimizer: Optimizer,
    averaged: Checkpoint,
    keep: int,
) -> Path:
    """Write a checkpoint, point `latest` at it and remove the older ones but `keep`."""
    files = {
        MODEL: zip_bytes(checkpoint_files(averaged)),
        WEIGHTS: tensors_to_bytes(_plain(dict(network.state_dict()))),
        OPTIMIZER: tensors_to_bytes(_plain(optimizer.moments())),
    }
    state: dict[str, Any] = {
        "format": 1,
        "step": facts.step,
        "run": facts.run,
        "data": facts.data,
        "best": None if facts.best == float("inf") else facts.best,
        "skipped": list(facts.skipped),
        "metrics": dict(facts.metrics),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files[STATE] = json.dumps(state, indent=1).encode()
    name = f"step-{facts.step:09d}"
    path = directory / "checkpoints" / name
    write_directory(path, files)
    write_file(directory / LATEST, name.encode())
    for old in sorted(path.parent.glob("step-*"))[:-keep]:
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    return path


def lock_run(directory: Path) -> IO[bytes]:
    """Keep other processes away from a run until the file returned is closed, or we die.

    Raises:
        ConfigError: code `RunBusy`, another process trains there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"another process trains in {directory}",
            code="RunBusy",
            hint="wait for it or stop it; fuser on its file 'lock' tells which",
        ) from None
    return file


def latest_state(directory: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    pointer = directory / LATEST
    if not pointer.is_file():
        return None
    return directory / "checkpoints" / pointer.read_text("utf-8").strip()


def load_state(
    path: Path, network: nn.Module, optimizer: Optimizer
) -> tuple[Facts, dict[str, Tensor]]:
    """Put raw weights and moments in place; the facts and the averaged weights.

    Tensors are copied to memory of their own: where they begin decides which elements vector
    instructions take, and with it the last bit.

    Raises:
        CheckpointError: code `RunCorrupt`, a file does not have the sha256 stated in `state.json`.
    """
    state = parse_json((path / STATE).read_bytes(), str(path / STATE))
    data = {}
    for name, digest in state["sha256"].items():
        data[name] = (path / name).read_bytes()
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise CheckpointError(
                f"{path / name} does not have the sha256 of {STATE}",
                code="RunCorrupt",
                hint=f"write the name of an older checkpoint into {path.parent.parent / LATEST}",
            )
    network.load_state_dict(tensors_from_bytes(data[WEIGHTS]))
    optimizer.remember(tensors_from_bytes(data[OPTIMIZER]))
    best = state["best"]
    facts = Facts(
        step=state["step"],
        run=state["run"],
        data=state["data"],
        best=float("inf") if best is None else best,
        skipped=tuple(state["skipped"]),
        metrics=state["metrics"],
    )
    averaged = load_checkpoint(path / MODEL).weights
    return facts, {name: tensor.clone() for name, tensor in averaged.items()}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
