"""Models by name or by path, and the only network access of the package.

Names stand in `models.toml` with what is known about each model. Weights are never downloaded
unasked: `download` does it, `load_model` only reads what is there. A download must have a pinned
sha256, from the table or from the caller, because a file on a hub can be replaced in place.
"""

import difflib
import hashlib
import os
import shutil
import tomllib
import zipfile
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from coset.checkpoint import MANIFEST, WEIGHTS, Checkpoint, load_checkpoint
from coset.errors import CheckpointError, MissingExtraError
from coset.metatrain_import import import_metatrain
from coset.stored_zip import open_zip

DEFAULT_MODEL = "coset-xs-0"
OTHERS_MAY_WRITE = 0o022
INCOMPLETE = ".incomplete"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """What is known about a model before it is read."""

    name: str
    version: str
    family: str
    size: str
    elements: int
    level_of_theory: str
    training_data: str
    license: str
    citation: str
    file: str
    repository: str = ""
    revision: str = ""
    sha256: str = ""
    bytes: int = 0
    note: str = ""

    @property
    def key(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    @property
    def embedded(self) -> bool:
        """Whether the model is part of the package; otherwise it is downloaded on request."""
        return not self.repository


def list_models() -> tuple[ModelRow, ...]:
    """All models known by name."""
    table = tomllib.loads(resources.files("coset").joinpath("models.toml").read_text("utf-8"))
    return tuple(ModelRow(**row) for row in table["models"])


def find_model(name: str) -> ModelRow:
    """The row of `NAME@VERSION` (or `NAME-vVERSION`), or of `NAME` if it has only one version.

    Raises:
        CheckpointError: code `ModelNotFound`, with similar names or the versions to choose from.
    """
    rows = [row for row in list_models() if name in (row.key, row.name, Path(row.file).stem)]
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise CheckpointError(
            f"{name!r} has several versions",
            code="ModelNotFound",
            hint=f"say one of {', '.join(row.key for row in rows)}",
        )
    close = difflib.get_close_matches(name, [row.key for row in list_models()], n=3)
    raise CheckpointError(
        f"no model and no file is named {name!r}",
        code="ModelNotFound",
        hint=f"did you mean {' or '.join(close)}?" if close else "coset models lists the names",
    )


def model_card(checkpoint: Checkpoint) -> str:
    """The card of a model that comes with coset, Markdown; empty for others."""
    for row in list_models():
        card = Path(str(resources.files("coset"))) / f"{row.file}.md"
        if row.embedded and row.sha256 == checkpoint.sha256 and card.is_file():
            return card.read_text("utf-8")
    return ""


def default_cache() -> Path:
    """Where downloaded models are kept."""
    return Path.home() / ".cache" / "coset" / "models"


def model_path(name: str, *, cache: Path | None = None) -> Path:
    """Where the model of that name lies on this machine.

    Raises:
        CheckpointError: code `ModelNotFound`; says how to get the model.
    """
    row = find_model(name)
    path = _place(row, cache or default_cache())
    if not path.exists():
        raise CheckpointError(
            f"{row.key} is not on this machine ({path} does not exist)",
            code="ModelNotFound",
            hint=f"coset models get {row.key}",
        )
    if not row.embedded:
        _check_private(path.parent)
    return path


def load_model(
    name_or_path: str | Path = DEFAULT_MODEL, *, cache: Path | None = None
) -> Checkpoint:
    """The model in a directory or zip of ours or a metatrain `.ckpt`, or of a name in the table.

    Without either: the one that comes with coset.

    Raises:
        CheckpointError: not there, damaged, unsafe, or of another kind.
    """
    path = Path(name_or_path)
    if path.exists():
        checkpoint = _read(path)
        known = [row for row in list_models() if row.sha256 and row.sha256 == checkpoint.sha256]
        return _with_facts(checkpoint, known[0]) if known else checkpoint
    row = find_model(str(name_or_path))
    path = model_path(row.key, cache=cache)
    checkpoint = _read(path)
    if (pinned := _pinned(row, path)) and checkpoint.sha256 != pinned:
        raise CheckpointError(
            f"{path} has sha256 {checkpoint.sha256}, {row.key} is pinned to {pinned}",
            code="ModelCorrupt",
            hint=f"remove it and run coset models get {row.key}",
        )
    return _with_facts(checkpoint, row)


def download(name: str, *, sha256: str = "", cache: Path | None = None) -> Path:
    """Fetch a model from its repository, verify its sha256 and return its place in the cache.

    Raises:
        CheckpointError: code `ModelNotPinned`, `DownloadFailed` or `ModelCorrupt` (wrong content).
        MissingExtraError: huggingface-hub is not installed.
    """
    row = find_model(name)
    folder = cache or default_cache()
    target = _place(row, folder)
    if row.embedded or target.exists():
        return model_path(row.key, cache=cache)
    if not (pinned := row.sha256 or sha256) or (sha256 and sha256 != pinned):
        raise CheckpointError(
            f"{row.key} is pinned to {row.sha256}, not to {sha256}"
            if row.sha256
            else f"the sha256 of {row.key} is not recorded, so its content cannot be verified",
            code="ModelNotPinned",
            hint=f"read it on the page of {row.file} in {row.repository} and pass --sha256",
        )
    received = _fetch(row, folder)
    with received.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pinned:
        received.unlink()
        raise CheckpointError(
            f"{row.repository} sent a {row.file} with sha256 {found}, expected {pinned}",
            code="ModelCorrupt",
            hint="the file was replaced; nothing was kept",
        )
    received.chmod(0o600)
    _pin_file(target).write_text(pinned)
    received.replace(target)
    shutil.rmtree(folder / INCOMPLETE, ignore_errors=True)
    return target


def _fetch(row: ModelRow, folder: Path) -> Path:
    """Download below `folder`; a broken download goes on where it stopped."""
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  # an optional package
    except ImportError:
        raise MissingExtraError(
            "downloading models needs huggingface-hub", hint="pip install coset[hub]"
        ) from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    try:
        received: str = hf_hub_download(
            repo_id=row.repository,
            filename=row.file,
            revision=row.revision or None,
            local_dir=folder / INCOMPLETE,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"could not download {row.file} from {row.repository}: {error}",
            code="DownloadFailed",
            hint="without network access, copy the file here and pass its path as the model",
        ) from None
    return Path(received)


def _place(row: ModelRow, cache: Path) -> Path:
    if row.embedded:
        return Path(str(resources.files("coset"))) / row.file
    return cache / Path(row.file).name


def _pin_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _pinned(row: ModelRow, path: Path) -> str:
    """sha256 that the file must have: from the table, else what it had when it was downloaded."""
    if row.sha256 or row.embedded or not _pin_file(path).exists():
        return row.sha256
    return _pin_file(path).read_text().strip()


def _check_private(folder: Path) -> None:
    """Refuse a cache in which someone else could exchange files."""
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & OTHERS_MAY_WRITE:
        raise CheckpointError(
            f"the model cache {folder} belongs to or can be written by other users",
            code="CacheNotPrivate",
            hint=f"chmod 700 {folder}, or remove it",
        )


def _read(path: Path) -> Checkpoint:
    """Read a model of either kind; the content decides, not the name."""
    if path.is_dir():
        return load_checkpoint(path)
    if path.name in (MANIFEST, WEIGHTS):
        raise CheckpointError(
            f"{path} is half a model", code="ModelForeign", hint=f"pass the directory {path.parent}"
        )
    if zipfile.is_zipfile(path):
        with path.open("rb") as file, open_zip(file, str(path)) as archive:
            ours = MANIFEST in archive.namelist()
        if ours:
            return load_checkpoint(path)
    return import_metatrain(path)


def _with_facts(checkpoint: Checkpoint, row: ModelRow) -> Checkpoint:
    """The checkpoint with what the table knows and the file does not say."""
    said = checkpoint.provenance
    provenance = replace(
        said,
        name=row.name,
        version=row.version,
        level_of_theory=said.level_of_theory or row.level_of_theory,
        training_data=said.training_data or row.training_data,
        license=said.license or row.license,
        citation=tuple(dict.fromkeys((row.citation, *said.citation))),
    )
    return replace(checkpoint, provenance=provenance)
