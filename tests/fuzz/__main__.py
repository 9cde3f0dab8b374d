"""Coverage-guided fuzzing of every reader with atheris: each returns, or raises a UserError.

    make fuzz SECONDS=60
    python -m tests.fuzz --seconds 60                 # all kinds of readers, each its share of the time
    python -m tests.fuzz --seconds 600 --only tar     # one of them
    python -m tests.fuzz --jobs 2 --keep build/fuzz   # two at a time; what was found interesting is used again

Inputs that break a reader go to KEEP/KIND/found/. Put one into tests/fuzz/corpus/KIND/ as found-WHAT, where a plain
test replays it from then on. Needs `pip install 'rushes[fuzz]'`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

HEAVY = ("numpy", "pandas", "pyarrow.parquet", "pydantic", "av", "yaml", "ftfy")
MEMORY, SLOW = 2048, 20  # MB of one process, seconds of one input: beyond these an input counts as found


def fuzz(kind: str, seconds: int, keep: Path) -> None:
    """Fuzz one kind of reader; never returns."""
    import atheris

    from tests.fuzz.seeds import CORPUS
    from tests.fuzz.targets import TARGETS

    grown, found = keep / kind / "corpus", keep / kind / "found"
    for folder in (grown, found):
        folder.mkdir(parents=True, exist_ok=True)
    target = noting(TARGETS[kind], found)
    options = {"max_total_time": seconds, "rss_limit_mb": MEMORY, "timeout": SLOW, "artifact_prefix": f"{found}/"}
    options |= {"max_len": 2**17, "print_final_stats": 1, "verbosity": 1, "detect_leaks": 0}
    words = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(grown), str(CORPUS / kind)], target)
    atheris.Fuzz()


def noting(target: Callable[[bytes], object], found: Path) -> Callable[[bytes], None]:
    """The target; the first input for each place that raises is kept, with what was raised, and fuzzing continues."""

    def run(data: bytes) -> None:
        try:
            target(data)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
            if not (found / name).exists():
                (found / name).write_bytes(data)
                (found / f"{name}.txt").write_text(traceback.format_exc())

    return run


def start(kind: str, seconds: int, keep: Path) -> int:
    """The process that fuzzes one kind; what it says goes to a file."""
    (keep / kind).mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    shutil.rmtree(keep / kind / "found", ignore_errors=True)
    said = os.open(keep / kind / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    try:
        fuzz(kind, seconds, keep)
    finally:
        os._exit(1)


def result(kind: str, code: int, keep: Path) -> tuple[int, list[str]]:
    """How many inputs were tried, and a line for each fault: what was raised, or how the process ended."""
    runs = re.search(r"number_of_executed_units: (\d+)", (keep / kind / "log").read_text(errors="replace"))
    faults = [path.read_text().splitlines()[-1] for path in sorted((keep / kind / "found").glob("*.txt"))]
    return int(runs[1]) if runs else 0, faults + ([f"exit code {code}, see its log"] if code else [])


def all_kinds(kinds: list[str], seconds: int, jobs: int, keep: Path) -> dict[str, int]:
    """Exit codes by kind, after `jobs` kinds at a time have had `seconds` each."""
    running: dict[int, str] = {}
    codes: dict[str, int] = {}
    waiting = list(kinds)
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            running[start(kind, seconds, keep)] = kind
        process, status = os.wait()
        codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
    return codes


def prepare() -> list[str]:
    """Import libraries as they are and the readers instrumented; the kinds of readers."""
    import importlib

    import atheris

    for name in HEAVY:
        importlib.import_module(name)
    with atheris.instrument_imports(include=["shards", "rollout"], enable_loader_override=False):
        from tests.fuzz.targets import READERS, TARGETS
    from tests.fuzz.seeds import CORPUS

    for kind, target in TARGETS.items():  # what is imported within functions
        for path in sorted((CORPUS / kind).iterdir()):
            target(path.read_bytes())
    return list(READERS)


def main() -> int:
    """Fuzz, and print a line for each kind: inputs tried, and what broke it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of all kinds together")
    parser.add_argument("--jobs", type=int, default=1, help="kinds at a time")
    parser.add_argument("--only", default="", help="one kind of reader")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for logs and for what was found")
    arguments = parser.parse_args()
    kinds = [kind for kind in prepare() if arguments.only in ("", kind)]
    if not kinds:
        parser.error(f"no reader is called {arguments.only}")
    share = max(1, arguments.seconds * arguments.jobs // len(kinds))
    codes = all_kinds(kinds, share, arguments.jobs, arguments.keep)
    total, broken = 0, []
    for kind in kinds:
        tried, faults = result(kind, codes[kind], arguments.keep)
        total += tried
        broken += [kind] * bool(faults)
        print(f"{kind:<10} {tried:>9} inputs", *faults, sep="\n           ")
    print(f"{total} inputs in {share} s for each of {len(kinds)} readers; broken: {', '.join(broken) or 'none'}")
    shutil.rmtree(sys.modules["tests.fuzz.targets"].FOLDER, ignore_errors=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
