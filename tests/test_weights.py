"""Published files: found, downloaded once, checked, and named in one line when they are missing."""

import pytest
import torch

import weights
from distributed import UserError
from weights import PUBLISHED_FILES, find_weights


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once, and says what was asked for."""
    def refuse(address, *args, **kwargs):
        raise OSError(f"no route to {address}")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_a_missing_file_offline_names_file_address_and_folder(name, tmp_path, offline):
    with pytest.raises(UserError) as caught:
        find_weights(name, tmp_path / "weights")
    line = str(caught.value)
    assert line.startswith(f"{name} is not in {tmp_path / 'weights'}")
    assert f"get {PUBLISHED_FILES[name][0]}{name}" in line
    assert "\n" not in line


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file of our own in the table, at a file:// address: (name, folder to put it in, digest)."""
    source = tmp_path / "published"
    source.mkdir()
    (source / "small.pth").write_bytes(b"weights")
    digest = weights.hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(PUBLISHED_FILES, "small.pth", (source.as_uri() + "/", digest[:8]))
    return "small.pth", tmp_path / "cache" / "deep", digest


def test_a_missing_file_is_downloaded_once_where_it_belongs(published, capsys):
    name, folder, _ = published
    path = find_weights(name, folder)
    assert path == folder / name
    assert path.read_bytes() == b"weights"
    assert [p.name for p in folder.iterdir()] == [name]
    assert "downloading file://" in capsys.readouterr().out
    assert find_weights(name, folder) == path
    assert capsys.readouterr().out == ""


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(published, monkeypatch):
    name, folder, _ = published
    monkeypatch.setitem(PUBLISHED_FILES, name, (PUBLISHED_FILES[name][0], "00000000"))
    with pytest.raises(UserError, match="invalid hash value"):
        find_weights(name, folder)
    assert list(folder.iterdir()) == []


def test_the_users_own_file_with_another_hash_is_used_and_said_once(published, capsys):
    name, folder, digest = published
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"mine")
    assert find_weights(name, folder).read_bytes() == b"mine"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(folder / name) in said
    assert digest[:8] in said
    find_weights(name, folder)
    assert capsys.readouterr().out == ""


def test_only_local_rank_0_downloads_and_the_others_wait(published, monkeypatch, offline):
    name, folder, _ = published
    folder.mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(weights.time, "sleep", lambda _: (folder / name).write_bytes(b"weights"))
    assert find_weights(name, folder).read_bytes() == b"weights"


def test_who_waits_ten_minutes_in_vain_says_which_file_is_missing(published, monkeypatch):
    name, folder, _ = published
    now = [1000.0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(weights.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(weights.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    with pytest.raises(UserError, match=f"{name} did not come to {folder} within 10 minutes: get"):
        find_weights(name, folder)
    assert now[0] == pytest.approx(1600, abs=1)
