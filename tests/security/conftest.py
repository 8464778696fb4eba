import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_checkpoints import small_checkpoint, torch_zip, upstream_checkpoint
from refusal import watching

from coset.checkpoint import save_checkpoint
from coset.metatrain_import import import_metatrain


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Whatever Python and the shape checker load on first use is loaded before anyone watches."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "m.ckpt").write_bytes(torch_zip(upstream_checkpoint(small_checkpoint())))
    save_checkpoint(import_metatrain(folder / "m.ckpt"), folder / "m")


@pytest.fixture
def marker(tmp_path, warm):
    """A file that exists afterwards only if something was executed; nothing risky may happen."""
    path = tmp_path / "executed"
    events: list[str] = []
    watching.append(events)
    yield path
    watching.remove(events)
    assert not path.exists()
    assert events == []
