"""sha256 of large files, taken once a machine: never of a file that has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shards.store import hashes
from shards.store.hashes import sha256_once


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their sha256, with an empty cache and files of any size."""
    found: list[Path] = []
    sha256_file = hashes.sha256_file
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 1)
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    monkeypatch.setattr(hashes, "sha256_file", lambda path: found.append(path) or sha256_file(path))
    return found


def test_a_file_is_read_once_until_it_changes(taken: list[Path], tmp_path: Path) -> None:
    path, other = tmp_path / "weights.safetensors", tmp_path / "other"
    path.write_bytes(b"one")
    assert sha256_once(path) == sha256_once(path) == hashlib.sha256(b"one").hexdigest()
    assert taken == [path]
    before = path.stat()
    path.write_bytes(b"two")  # as large, and made to look as old
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_once(path) == hashlib.sha256(b"two").hexdigest()
    other.write_bytes(b"six")
    os.replace(other, path)
    assert sha256_once(path) == hashlib.sha256(b"six").hexdigest()
    assert taken == [path] * 3


def test_a_cache_that_is_damaged_or_read_only_costs_time_alone(taken: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    sha256_once(path)
    [note] = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text('{"path"')
    assert sha256_once(path) == hashlib.sha256(b"one").hexdigest()
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file in the way")
    assert sha256_once(path) == hashlib.sha256(b"one").hexdigest()
    assert taken == [path] * 3


def test_a_file_that_has_just_changed_is_not_kept(
    taken: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 1e9)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    sha256_once(path)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(hashes, "LARGE", 4)
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    sha256_once(path)
    assert not (tmp_path / "cache").exists()
