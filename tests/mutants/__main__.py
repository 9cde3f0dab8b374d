"""Every mutation of the catalogue against its tests: each has to be noticed.

    python -m tests.mutants                 # all of them: a few seconds each
    python -m tests.mutants --only losses   # those whose line has this text
    python -m tests.mutants --list

The source is copied to a temporary folder and changed there. Exit code 1 when a mutant survives, when its tests fail
without it too, or when its text does not stand in the source any more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.mutants.catalogue import MUTATIONS
from tests.mutants.mutation import Mutation
from tests.mutants.running import Copy, Outcome


def survivors(mutants: list[Mutation], copy: Copy) -> list[str]:
    """A line for each mutant that is not killed; all are printed as they come."""
    found = []
    for number, mutant in enumerate(mutants, 1):
        outcome = copy.outcome(mutant)
        line = f"{outcome.value:<8} {mutant}"
        print(f"{number:>4}/{len(mutants)} {line}", flush=True)
        if outcome is not Outcome.KILLED:
            found.append(line)
    return found


def main() -> int:
    """Print the list and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", help="text that the line of a mutant has; may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTATIONS if any(text in str(mutant) for text in arguments.only or [""])]
    for mutant in mutants:
        mutant.applied()
    if arguments.list:
        print(*mutants, sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = survivors(mutants, Copy(Path(folder)))
    for path, count in sorted(Counter(mutant.path for mutant in mutants).items()):
        print(f"{count:>4} {path}")
    print(f"{len(mutants)} mutants, {len(mutants) - len(found)} killed", *found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
