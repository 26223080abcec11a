"""The list of a folder's pictures, and when a remembered one may be trusted."""

import os
from pathlib import Path

import pytest
from test_data import _cache_in_a_folder_of_the_test, fill, settle  # noqa: F401  (a fixture)

import listing
from listing import list_images


def test_links_in_a_circle_end(tmp_path):
    fill(tmp_path, ["a/x.png"])
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list_images(tmp_path) == ["a/x.png"]


def test_the_list_of_files_is_kept_until_a_directory_changes(tmp_path, monkeypatch):
    fill(tmp_path, ["a/x.png", "b/y.png"])
    settle(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    walk, walks = listing._walk, []
    monkeypatch.setattr(listing, "_walk", lambda folder: walks.append(1) or walk(folder))
    assert list_images(tmp_path) == list_images(tmp_path) == ["a/x.png", "b/y.png"]
    assert len(walks) == 1
    assert sorted(tmp_path.rglob("*")) == before
    fill(tmp_path, ["b/new/z.png"])
    assert list_images(tmp_path) == ["a/x.png", "b/y.png", "b/new/z.png"]
    (tmp_path / "a" / "x.png").unlink()
    assert list_images(tmp_path) == ["b/y.png", "b/new/z.png"]


def test_a_directory_that_was_just_written_is_not_trusted(tmp_path):
    fill(tmp_path, ["x.png"])
    assert list_images(tmp_path) == ["x.png"]
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"directories": 3, "names": []}'])
def test_a_damaged_cache_is_ignored(tmp_path, content):
    fill(tmp_path, ["x.png"])
    settle(tmp_path)
    list_images(tmp_path)
    (cache,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")
    cache.write_text(content)
    assert list_images(tmp_path) == ["x.png"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    fill(tmp_path / "photos", ["x.png"])
    settle(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert list_images(tmp_path / "photos") == ["x.png"]
