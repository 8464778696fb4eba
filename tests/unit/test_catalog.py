import hashlib
import re
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_checkpoints import small_checkpoint, torch_zip, upstream_checkpoint

from coset import catalog
from coset.catalog import download, find_model, list_models, load_model, model_path
from coset.checkpoint import save_checkpoint
from coset.errors import CheckpointError, MissingExtraError

PINNED = "pet-oam-xl@1.0.0"
UNPINNED = "pet-omat-xs@1.0.0"
CONTENT = torch_zip(upstream_checkpoint(small_checkpoint()))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def refuse(function, *arguments, **keywords):
    """The error that a call raises."""
    with pytest.raises(CheckpointError) as error:
        function(*arguments, **keywords)
    return error.value


def test_rows_are_complete_and_names_are_unique():
    rows = list_models()
    assert len({row.key for row in rows}) == len({row.file for row in rows}) == len(rows) >= 24
    for row in rows:
        assert row.level_of_theory, row.key
        assert row.license, row.key
        assert row.training_data, row.key
        assert row.size in ("XXS", "XS", "S", "M", "L", "XL")
        assert 1 <= row.elements <= 118
        assert re.fullmatch(r"\d+\.\d+\.\d+", row.version)
        assert re.fullmatch(r"([0-9a-f]{64})?", row.sha256)
        assert re.fullmatch(r"([0-9a-f]{40})?", row.revision), "a branch is no revision"
        if not row.embedded:
            assert row.file == f"models/{row.name}-v{row.version}.ckpt"


def test_embedded_models_lie_in_the_package_and_nothing_else_does():
    folder = Path(catalog.__file__).parent
    rows = {folder / row.file for row in list_models() if row.embedded}
    assert all(path.is_dir() for path in rows)
    assert rows == {path.parent for path in (folder / "models").glob("*/manifest.json")}


def test_names_with_and_without_a_version():
    assert find_model(PINNED) == find_model("pet-oam-xl") == find_model("pet-oam-xl-v1.0.0")
    assert "pet-mad-s@1.0.2" in refuse(find_model, "pet-mad-s").hint
    assert "pet-omat-s@1.0.0" in refuse(find_model, "pet-omat-s@1.0.9").hint
    assert refuse(find_model, "nothing-like-it").code == "ModelNotFound"


def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path):
    for function in (model_path, load_model):
        error = refuse(function, PINNED, cache=tmp_path / "none")
        assert error.code == "ModelNotFound"
        assert error.hint == f"coset models get {PINNED}"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["model", "model.zip", "model.ckpt", "model.pt"])
def test_paths_are_read_by_content(tmp_path, name):
    path = tmp_path / name
    if name in ("model", "model.zip"):
        save_checkpoint(small_checkpoint(), path)
    else:
        path.write_bytes(CONTENT)
    assert load_model(path).hypers == load_model(str(path)).hypers == small_checkpoint().hypers


def test_a_zip_of_ours_may_have_any_name(tmp_path):
    save_checkpoint(small_checkpoint(), tmp_path / "m.zip").rename(tmp_path / "m.ckpt")
    assert load_model(tmp_path / "m.ckpt").provenance.name == "small"


@pytest.fixture
def cache(tmp_path):
    """An empty cache that only its owner may write."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    return folder


def test_a_name_adds_what_the_table_knows(cache):
    (cache / "pet-omat-xs-v1.0.0.ckpt").write_bytes(CONTENT)
    said = load_model(UNPINNED, cache=cache).provenance
    assert (said.name, said.version) == ("pet-omat-xs", "1.0.0")
    assert (said.level_of_theory, said.training_data) == ("PBE", "OMat24")
    assert said.license == "BSD-3-Clause"
    assert said.source_sha256 == SHA256


def test_a_known_file_is_recognized_by_its_content_under_any_name(tmp_path, monkeypatch):
    row = find_model(UNPINNED)
    known = type(row)(**{n: getattr(row, n) for n in row.__slots__} | {"sha256": SHA256})
    monkeypatch.setattr(catalog, "list_models", lambda: (known,))
    (tmp_path / "x.ckpt").write_bytes(CONTENT)
    assert load_model(tmp_path / "x.ckpt").provenance.name == "pet-omat-xs"


def test_another_content_than_the_pinned_one_is_refused(cache):
    (cache / "pet-oam-xl-v1.0.0.ckpt").write_bytes(CONTENT)
    assert "pinned" in str(refuse(load_model, PINNED, cache=cache))


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_cache_that_others_can_write_is_refused(cache, mode):
    (cache / "pet-omat-xs-v1.0.0.ckpt").write_bytes(CONTENT)
    cache.chmod(mode)
    assert refuse(load_model, UNPINNED, cache=cache).code == "CacheNotPrivate"
    assert refuse(download, UNPINNED, sha256=SHA256, cache=cache).code == "CacheNotPrivate"


def hub(monkeypatch, content=CONTENT, error=None):
    """A stand-in for the hub client; records what was asked."""
    asked = []

    def hf_hub_download(*, repo_id, filename, revision, local_dir):
        asked.append((repo_id, filename, revision))
        if error:
            raise error
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return str(path)

    module = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_a_download_is_verified_kept_privately_and_not_repeated(tmp_path, monkeypatch):
    asked, cache = hub(monkeypatch), tmp_path / "new" / "cache"
    path = download(UNPINNED, sha256=SHA256, cache=cache)
    assert asked == [("lab-cosmo/upet", "models/pet-omat-xs-v1.0.0.ckpt", None)]
    assert path == model_path(UNPINNED, cache=cache)
    assert path.read_bytes() == CONTENT
    assert (cache.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert {p.name for p in cache.iterdir()} == {path.name, f"{path.name}.sha256"}
    assert download(UNPINNED, cache=cache) == path
    assert len(asked) == 1
    assert load_model(UNPINNED, cache=cache).provenance.name == "pet-omat-xs"
    path.write_bytes(torch_zip(upstream_checkpoint(small_checkpoint(), metadata="{}")))
    assert "pinned" in str(refuse(load_model, UNPINNED, cache=cache))


def test_a_pinned_revision_is_asked_for(cache, monkeypatch):
    asked = hub(monkeypatch)
    refuse(download, "pet-omad-s", cache=cache)
    assert asked[0][2] == find_model("pet-omad-s").revision != ""


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", CONTENT[:-1], CONTENT + b"x"])
def test_other_bytes_are_refused_and_not_kept(cache, monkeypatch, content):
    hub(monkeypatch, content)
    error = refuse(download, UNPINNED, sha256=SHA256, cache=cache)
    assert error.code == "ModelCorrupt"
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_nothing_is_downloaded_without_a_pin_or_with_two(cache, monkeypatch):
    asked = hub(monkeypatch)
    assert "--sha256" in refuse(download, UNPINNED, cache=cache).hint
    assert refuse(download, PINNED, sha256="0" * 64, cache=cache).code == "ModelNotPinned"
    assert asked == []


def test_without_network_the_error_says_what_to_do(cache, monkeypatch):
    hub(monkeypatch, error=ConnectionError("no route to host"))
    error = refuse(download, PINNED, cache=cache)
    assert error.code == "DownloadFailed"
    assert "no route to host" in str(error)


def test_without_the_hub_client_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"coset\[hub\]"):
        download(PINNED, cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()
