"""What the process of `shards.process.fork_server` is made of: Python imports this in it, before it forks helpers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal

from shards.process.fork_server import NAMES

PR_SET_PDEATHSIG = 1

parent, *names = os.environ.pop(NAMES).split(",")
# A command that ends early must not leave this behind until all is imported: it would keep pipes open. Forks do not
# inherit the wish to be killed.
library = ctypes.CDLL(None)
if hasattr(library, "prctl"):
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(parent):  # it has ended before that was said
    os._exit(0)
# Signals may reach the whole group. What becomes of the helpers is for the command to say.
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
for name in names:
    with contextlib.suppress(Exception):  # a helper that needs it says what is wrong with it
        importlib.import_module(name)
gc.freeze()  # so that the collector of a fork leaves shared pages as they are
