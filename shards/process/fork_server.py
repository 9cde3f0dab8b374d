"""Imports while a command still imports: in one process, of which the helpers of a pool are then forks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}
"""One thread for each library, which must stand there before it is imported. Several threads in each of several
processes spin while they wait and slow each other down; and a process that has threads is not safely forked."""
NAMES = "RUSHES_IMPORT"
"""Variable with the number of this process and the names of modules, for `shards.process.preload`."""
GPUS = tuple(map(Path, ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")))
"""Files of machines with GPUs: NVIDIA's, its boards', AMD's, and those that Windows lends to Linux."""

_begun: list[bool] = []  # by the first call of `import_ahead`


def import_ahead(modules: Iterable[str]) -> None:
    """Start a process that imports these modules, while this one does what it must.

    The imports of torch, diffusers and EasyOCR take as long as an iteration of a small model. Helpers that are forks
    have them at once, and share their memory. Only the first call has an effect, and none on a machine with GPUs: some
    libraries ask for a device when they are imported, and CUDA cannot be used in a fork of a process that has asked.
    """
    if _begun or has_gpus():
        return
    _begun.append(True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["shards.process.preload"])
    before = dict(os.environ)
    os.environ.update(ONE_THREAD, **{NAMES: ",".join([str(os.getpid()), *modules])})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def has_gpus() -> bool:
    """Whether this machine may have GPUs; torch, which knows better, is not imported for that."""
    return any(path.exists() for path in GPUS)


def context_of_helpers() -> BaseContext:
    """How a helper starts: as a fork of the process with the imports, or fresh where there is none."""
    return multiprocessing.get_context("forkserver" if _begun else "spawn")
