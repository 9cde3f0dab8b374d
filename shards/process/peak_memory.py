"""How much memory this process has used at most, for the cost ledger, and how much there is for another one."""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def peak_memory_bytes() -> int:
    """The most memory so far: of all CUDA devices together when torch uses them, else what was resident.

    Peaks never fall: what a process did earlier counts too.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes() -> int | None:
    """Host memory that a new process may take: what the kernel has left, or the job that we are in (cgroup v2) when
    that is less. None where the system does not tell."""
    found = []
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(number) for number in re.findall(r"(?m)^MemAvailable: +(\d+) kB$", text)]
    with suppress(OSError):
        own = re.search(r"(?m)^0::/(.*)$", Path("/proc/self/cgroup").read_text())
        place = CGROUPS / own[1] if own else CGROUPS
        for folder in (place, *(one for one in place.parents if one.is_relative_to(CGROUPS))):
            with suppress(OSError, ValueError):  # no limit here: no file, or `max`
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                cached = re.search(r"(?m)^inactive_file (\d+)$", (folder / "memory.stat").read_text())
                found.append(limit - used + (int(cached[1]) if cached else 0))
    return min(found, default=None)
