"""Which process of how many this is, as torchrun tells it in the environment; one alone without torchrun."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from shards.errors import UserError


def rank() -> int:
    """Number of this process among all, from 0."""
    return launched_number("RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return launched_number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: which of the machine's devices is its own."""
    return launched_number("LOCAL_RANK", 0)


def local_size() -> int:
    """Number of processes of its machine."""
    return launched_number("LOCAL_WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


def run_to_end(work: Callable[[], object]) -> NoReturn:
    """Do the work of one of several ranks, then end its process, with the exit code that Python would give.

    What is registered for the end runs and what is written is flushed, but the interpreter is not taken apart. gloo's
    threads outlive `destroy_process_group` and may hold a tensor of the last collective; one that lets go of it while
    the interpreter goes waits for a lock it can never have, and aborts the process (SIGABRT) after all work is done
    (pytorch/pytorch issue 190489). Python's `multiprocessing` ends its children in the same way.
    """
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = _code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(code)


def _code(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


def launched_number(name: str, default: int) -> int:
    """A number in the environment that a launcher set; `default` where there is none. UserError for other text."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(
            f"{name} = {text!r} in the environment is not a number",
            "its launcher sets it; unset it, or start the program with torchrun",
        )
    return int(text)
