"""Helpers of the security tests: an audit hook, and reading files that must be refused."""

import contextlib
import sys

import pytest

from coset import catalog
from coset.errors import CheckpointError
from coset.metatrain_import import import_metatrain

RISKY = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.")
LAZY = ("encodings", "beartype", "jaxtyping")  # imported when first used, by no file
watching: list[list[str]] = []


def _audit(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event == "import" or event.startswith(RISKY):
        text = f"{event} {arguments!r}"
        if not any(name in text for name in LAZY):
            watching[-1].append(text)


sys.addaudithook(_audit)


@contextlib.contextmanager
def unwatched():
    """What the test itself does is of no interest."""
    watching.append([])
    yield
    watching.pop()


def refuse(read, *arguments):
    """The error with which `read` refuses its arguments."""
    with pytest.raises(CheckpointError) as error:
        read(*arguments)
    return error.value


def refuse_file(tmp_path, data, name="evil.ckpt"):
    """The error with which the importer and the catalog refuse a file."""
    path = tmp_path / name
    with unwatched():
        path.write_bytes(data)
    error = refuse(import_metatrain, path)
    assert refuse(catalog.load_model, path).code == error.code
    return error
