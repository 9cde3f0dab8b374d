"""Every stage on a file system that is really full: one sentence, nothing half-written, and it continues with room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from rollout.policy import Policy
from shards import files
from shards.verify.shards import verify
from tests.support.tiny_models import TEXT_LENGTH
from tests.support.workers import small_run

PLENTY = 10**6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, kilobytes: int) -> None:
    """Fill the disk until so much is free."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    found = os.statvfs(disk)
    size = found.f_bavail * found.f_bsize - 1024 * kilobytes
    if size > 0:
        ballast.write_bytes(bytes(size))


def test_every_stage_ends_in_a_sentence_and_goes_on_when_there_is_room(
    disk: Path, tiny_t2v2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(disk / "run", tiny_t2v2, "score.workers=1", "rollout.prompts_per_iteration=2")
    policy = Policy.load(tiny_t2v2, device="cpu", text_length=TEXT_LENGTH)
    monkeypatch.setattr(Policy, "of", lambda _: policy)
    path = str(run.path)
    stages = {
        ("rollout", path, "--iteration", "0"): (0, 4, 12, 24, PLENTY),
        ("score", path, "--iteration", "0"): (0, 4, PLENTY),
        ("train", path, "--iteration", "0"): (0, 4, 12, 20, 40, 120, PLENTY),
        ("export", path, "--out", str(disk / "export")): (0, 4, PLENTY),
    }
    said = []
    for words, sizes in stages.items():
        for size in sizes:
            leave(disk, size)
            monkeypatch.setattr(sys, "argv", ["rushes", *words])
            with pytest.raises(SystemExit) as end:
                cli.main()
            talk = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rushes: ")]
            leave(disk, PLENTY)
            assert (end.value.code or 0, len(talk)) == ((0, 0) if size == PLENTY else (1, 1)), (words, size, talk)
            assert [name for name in disk.rglob("*") if name.name.startswith(".tmp-") or ".claim-" in name.name] == []
            assert [one for one in verify(run.path) if one.kind == "damaged"] == []
            said += talk
    assert all("disk full" in line or "disk is full" in line or "No space left" in line for line in said)
    assert len(said) == 14


def test_a_quota_counts_as_a_full_disk() -> None:
    """Errors of libraries: Python's own, and those in Rust, which have nothing but text."""
    quota = files.out_of_room(OSError(122, "Disk quota exceeded", "a/b"))
    assert quota
    assert quota.problem == "a/b: disk full"
    assert files.out_of_room(RuntimeError("Error while serializing: I/O error: No space left (os error 28)"))
    assert files.out_of_room(RuntimeError("no such file (os error 2)")) is None
    assert files.out_of_room(PermissionError(13, "Permission denied", "a")) is None
