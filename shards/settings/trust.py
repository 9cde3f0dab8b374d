"""Whose code may run: a run directory can name a reward or a tracker, but only a person can name code of their own.

A `run.toml` that came from somebody else could otherwise import any file of this machine. Registered names, and classes
of installed packages, need no trust: whoever installed them gave it. A class in a file of its own runs when this call
names it (`--reward`, `--set`), or when the file as it is now was trusted before, by `rushes trust FILE` or by the
`rushes init` that named it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.absolute_paths import class_file
from shards.errors import UserError
from shards.files import publish_replace, sha256_file
from shards.run_toml import apply_sets

if TYPE_CHECKING:
    from shards.run import Run
    from shards.run_toml import Setting

TRUSTED = "RUSHES_TRUSTED"  # a folder with one file for each trusted content, named by its sha256


def trusted_folder() -> Path:
    """Where trust is written down: RUSHES_TRUSTED, or ~/.config/rushes/trusted."""
    return Path(os.environ.get(TRUSTED) or "~/.config/rushes/trusted").expanduser()


def trust(file: Path) -> str:
    """Trust the content that a Python file has now, and give its sha256. Raises UserError where there is no file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file", "give the Python file of a reward or a tracker")
    digest = sha256_file(file)
    known = trusted_folder() / digest
    paths = {*_lines(known), os.path.abspath(file)}
    publish_replace(known, "".join(f"{path}\n" for path in sorted(paths)).encode())
    return digest


def own_files(names: Iterable[str]) -> dict[Path, str]:
    """The files behind names `module:Class` that are neither registered nor installed, each with one of the names."""
    found = {}
    for name in names:
        file = class_file(name)
        if file is not None:
            found[file] = name
    return found


def named_by(sets: Sequence[Setting]) -> list[str]:
    """The rewards and trackers that the settings of a call name."""
    values = apply_sets({}, sets)
    score, track = values.get("score"), values.get("track")
    rewards = score.get("rewards") if isinstance(score, dict) else None
    trackers = track.get("to") if isinstance(track, dict) else None
    return [str(name) for group in (rewards, trackers) if isinstance(group, dict | list) for name in group]


def check_trust(run: Run, names: Iterable[str]) -> None:
    """UserError where one of `names` would run a file that is not trusted and that this call does not name either.

    A file that is missing is left to whoever imports it, who says so.
    """
    allowed = own_files(named_by(run.sets))
    for file, name in own_files(names).items():
        if file in allowed or not file.is_file() or (trusted_folder() / sha256_file(file)).is_file():
            continue
        problem = "has changed since it was trusted" if _was_trusted(file) else "is not trusted"
        raise UserError(
            f"{name}: {file} {problem}",
            f"run.toml may be another person's: read the file, then `rushes trust {file}`",
        )


def _was_trusted(file: Path) -> bool:
    folder = trusted_folder()
    return folder.is_dir() and any(str(file) in _lines(one) for one in folder.iterdir())


def _lines(file: Path) -> list[str]:
    """The paths that a file of the folder names; none where there is no such file."""
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
