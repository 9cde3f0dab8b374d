"""Whose reward code may run: a run directory can name a class, but only a person can name code of their own.

A `run.toml` that came from somebody else could otherwise import any file of this machine. Registered rewards, and those
of installed packages, need no trust: whoever installed them gave it. A reward in a file of its own runs when this call
names it (`--reward`, `--set score.rewards`), or when the file as it is now was trusted before, by `rushes trust FILE`
or by the `rushes init` that named it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from score.reward import split_name
from shards.absolute_paths import reward_file
from shards.errors import UserError
from shards.files import publish_new, sha256_file

TRUSTED = "RUSHES_TRUSTED"  # a folder with one file for each trusted content, named by its sha256


def trusted_folder() -> Path:
    """Where trust is written down: RUSHES_TRUSTED, or ~/.config/rushes/trusted."""
    return Path(os.environ.get(TRUSTED) or "~/.config/rushes/trusted").expanduser()


def trust(file: Path) -> str:
    """Trust the content that a Python file has now, and give its sha256. Raises UserError where there is no file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file", "give the Python file of a reward")
    digest = sha256_file(file)
    publish_new(trusted_folder() / digest, f"{os.path.abspath(file)}\n".encode())
    return digest


def own_files(names: Iterable[str]) -> dict[Path, str]:
    """The files behind rewards that are neither registered nor installed, each with a reward that needs it."""
    found = {}
    for name in names:
        file = reward_file(split_name(name)[0])
        if file is not None:
            found[file] = name
    return found


def check_trust(rewards: Iterable[str], named: Iterable[str]) -> None:
    """UserError where one of `rewards` would run a file that is not trusted and none of `named`, those of this call.

    A file that is missing is left to whoever imports it, who says so.
    """
    allowed = own_files(named)
    for file, name in own_files(rewards).items():
        if file in allowed or not file.is_file() or (trusted_folder() / sha256_file(file)).is_file():
            continue
        problem = "has changed since it was trusted" if _was_trusted(file) else "is not trusted"
        raise UserError(
            f"reward {name!r}: {file} {problem}",
            f"run.toml may be another person's: read the file, then `rushes trust {file}`",
        )


def _was_trusted(file: Path) -> bool:
    folder = trusted_folder()
    return folder.is_dir() and any(one.read_text(encoding="utf-8").strip() == str(file) for one in folder.iterdir())
