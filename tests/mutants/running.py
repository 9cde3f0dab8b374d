"""Tests in a copy of the source, each run in a fork that has the heavy libraries already."""

from __future__ import annotations

import enum
import importlib
import os
import shutil
import sys
import time
from importlib.util import cache_from_source
from pathlib import Path

from tests.mutants.mutation import ROOT, Mutation

COPIED = ("cli.py", "pyproject.toml", "README.md", "shards", "rollout", "score", "train", "tests")
OURS = ("cli", "shards", "rollout", "score", "train", "tests")
HEAVY = ("torch", "diffusers", "transformers", "peft", "pandas", "pyarrow.parquet", "hypothesis", "pytest", "numpy")
PATIENCE = 300.0
"""Seconds after which the tests of a mutant count as hanging."""


class Outcome(enum.Enum):
    """What came of a mutant."""

    KILLED = "killed"
    SURVIVED = "SURVIVED"
    BROKEN = "BROKEN"
    """Its tests fail without it too, cannot be collected, or hang."""


class Copy:
    """A copy of the source in which one mutant at a time is put to its tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "source"
        self.folder.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, self.folder / name)
        self.whole: dict[tuple[str, ...], bool] = {}
        for name in HEAVY:
            importlib.import_module(name)
        importlib.import_module("torch").set_num_threads(1)

    def outcome(self, mutant: Mutation) -> Outcome:
        """Run the tests of a mutant, without it where that has not been done, and with it."""
        if mutant.tests not in self.whole:
            self.whole[mutant.tests] = self._run(mutant.tests) == 0
        if not self.whole[mutant.tests]:
            return Outcome.BROKEN
        path = self.folder / mutant.path
        before = path.read_text(encoding="utf-8")
        Path(cache_from_source(str(path))).unlink(missing_ok=True)  # its time may be that of the mutant
        try:
            path.write_text(mutant.applied(), encoding="utf-8")
            code = self._run(mutant.tests, "-x")
        finally:
            path.write_text(before, encoding="utf-8")
        return {0: Outcome.SURVIVED, 1: Outcome.KILLED}.get(code, Outcome.BROKEN)

    def _run(self, tests: tuple[str, ...], *options: str) -> int:
        """The exit code of pytest in a fork: 0 all passed, 1 some failed; -1 after `PATIENCE`."""
        process = os.fork()
        if process == 0:
            os._exit(_child(self.folder, [*tests, *options]))
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(process, 9)
        os.waitpid(process, 0)
        return -1


def _child(folder: Path, words: list[str]) -> int:
    """Run pytest on the copy, with no module of the original in memory."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if place not in ("", str(ROOT)))]
    for name in [*sys.modules]:
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    # what an editable installation of the project put in the way
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
    ]
    sys.dont_write_bytecode = "-x" in words
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return int(pytest.main([*words, "-p", "no:cacheprovider", "-p", "no:xdist"]))
