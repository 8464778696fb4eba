"""Metrics of a run: `metrics.jsonl`, the source of truth, and TensorBoard's files for looking.

One JSON object per line. `kind` is `train` (means over the steps since the line before) or `valid`.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coset.atomic_files import write_file

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends lines; what an interrupted run wrote after its last checkpoint is cut off first."""

    def __init__(self, directory: Path, step: int) -> None:
        """Go on after `step`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS
        if self.path.exists():
            lines = self.path.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
            if len(kept) != len(lines):
                write_file(self.path, "".join(kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(directory, step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line, flushed."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


def _tensorboard(directory: Path, step: int) -> Any:  # noqa: ANN401
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
