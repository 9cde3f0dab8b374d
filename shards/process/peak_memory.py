"""How much memory this process has used at most, for the cost ledger."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """The most memory so far: of all CUDA devices together when torch uses them, else what was resident.

    Peaks never fall: what a process did earlier counts too.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
