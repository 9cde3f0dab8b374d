"""What a command costs: the heavy modules it loads and the seconds of processor it takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "pandas", "pyarrow", "easyocr", "matplotlib", "av")
YARDSTICK = "import asyncio, email.mime.text, http.server, unittest.mock, xml.dom.minidom"
YARD = 0.12  # seconds of processor that it takes where the limits of the tests were set


def loaded_by(*arguments: str, before: str = "") -> set[str]:
    """Heavy modules in memory after the command line has run with these arguments, in a process of its own."""
    code = (
        f"import sys, atexit\n{before}\n"
        f"sys.argv = ['rushes', *{list(arguments)!r}]\n"
        f"atexit.register(lambda: print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "import cli\ncli.main()\n"
    )
    result = in_python(code)
    line = next(line for line in result.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


def in_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which compiles at most once what it imports, whatever this shell has set."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "COVERAGE_PROCESS_CONFIG": ""}  # it costs what it costs
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def seconds_of_processor(work: Callable[[], object], enough: float) -> float:
    """What the processes that `work` starts take: the least of some tries, for a core that others use is slower.

    Where that is not `enough`, they are seconds of a machine as fast as the one that the limits come from.
    """
    found, yards = [], []
    for _ in range(4):
        found.append(spent(work))
        if found[-1] < enough:
            return found[-1]
        yards.append(spent(lambda: in_python(YARDSTICK)))
    return min(found) * YARD / max(YARD, min(yards))


def spent(work: Callable[[], object]) -> float:
    """Seconds of processor of the processes that end meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
