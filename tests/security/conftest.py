import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from refusal import watching


@pytest.fixture
def marker(tmp_path):
    """A file that exists afterwards only if something was executed; nothing risky may happen."""
    path = tmp_path / "executed"
    events: list[str] = []
    watching.append(events)
    yield path
    watching.remove(events)
    assert not path.exists()
    assert events == []
