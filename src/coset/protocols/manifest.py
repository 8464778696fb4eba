"""What a result depends on, and its hash: settings, versions, potential, hardware, data."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import coset
from coset.protocols.records import Benchmark
from coset.protocols.references import existing, sha256_of

PACKAGES = ("torch", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that can change a number; versions: None for what is not installed."""

    protocol: str
    settings: Mapping[str, Any]
    potential: Mapping[str, Any]
    versions: Mapping[str, str | None]
    hardware: Mapping[str, str]
    data: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()

    @property
    def settings_sha256(self) -> str:
        """Of the protocol and its settings alone, the same on every machine."""
        found = json.dumps([self.protocol, self.document()["settings"]], sort_keys=True)
        return hashlib.sha256(found.encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def manifest_of(
    benchmark: Benchmark, data: Path, potential: Mapping[str, Any], device: torch.device
) -> Manifest:
    """The manifest of a run on this machine; potential: what identifies it and how it runs.

    Raises:
        ConfigError: "NoReference", a file of the reference is not there.
    """
    packages = (*PACKAGES, *benchmark.packages)
    return Manifest(
        protocol=benchmark.name,
        settings=asdict(benchmark),  # type: ignore[call-overload]  # every protocol is a dataclass
        potential=dict(potential),
        versions={"coset": coset.__version__} | {name: _version(name) for name in packages},
        hardware=_hardware(device),
        data={name: sha256_of(existing(data, name)) for name in benchmark.files},
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two documents, as `name: value there -> value here`."""
    found = []
    for name in sorted(set(one) | set(other)):
        before, now = one.get(name), other.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{where}{name}.")
        elif before != now:
            found.append(f"{where}{name}: {before} -> {now}")
    return found


def _hardware(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": name or device.type,
    }


def _processor() -> str:
    """The name of the processor, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
