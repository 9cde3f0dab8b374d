"""What a step of `bench/first_gpu.py` finds, and a process of its own for the parts that need one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.gpu.models import Case, build
from rollout.policy import Policy
from shards.config import ModelConfig


class OutOfTime(BaseException):
    """The minutes are spent. Not an Exception: a step that records its errors must not record this one."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    step: int
    what: str
    found: str
    ok: bool | None = None
    """Whether it is as it should be; None for what is only measured."""


class Place:
    """Where the steps work: the device, a folder for everything, and models that several steps use."""

    def __init__(self, out: Path, device: torch.device, small: bool, minutes: float) -> None:
        self.out, self.device, self.small = out, device, small
        self.ends = time.monotonic() + 60 * minutes
        self.warm: set[Case] = set()
        """Cases of which a whole iteration has run in this process."""
        self._policies: dict[tuple[str, int], Policy] = {}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def folder(self, case: Case) -> Path:
        """The folder of a case's model, made when first asked for."""
        path = self.out / f"{case.model}-{case.layers}"
        return path if path.is_dir() else build(path, case, self.device)

    def policy(self, case: Case) -> Policy:
        """The model of a case, loaded once; others that are there leave the device."""
        key = (case.model, case.layers)
        for other in self._policies.values():
            other.release()
        if key not in self._policies:
            model = ModelConfig(
                path=str(self.folder(case)), dtype=case.dtype, device=str(self.device), text_length=case.text_length
            )
            self._policies[key] = Policy.of(model)
        return self._policies[key]

    def forget(self) -> None:
        """Let go of the models in memory."""
        for policy in self._policies.values():
            policy.release()
        self._policies.clear()

    def in_a_process(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns in a process of its own. RuntimeError with the error's text where it fails.

        A new program on a GPU, as CUDA does not survive a fork; a fork on a CPU, which imports nothing again. The
        process does not outlive the time that is left.
        """
        context: Any = multiprocessing.get_context("fork" if self.device.type == "cpu" else "spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, function, arguments))
        process.start()
        theirs.close()
        try:
            if not ours.poll(max(0.0, self.left)):
                raise OutOfTime
            ok, value = ours.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the process ended with code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
        if not ok:
            raise RuntimeError(value)
        return value


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
    pipe.close()


def difference(one: torch.Tensor, other: torch.Tensor) -> Any:
    """(text, whether they are equal bit for bit) of two tensors."""
    if torch.equal(one, other):
        return "equal", True
    return f"differ by {(one.float() - other.float()).abs().max().item():.3g} at most", False
