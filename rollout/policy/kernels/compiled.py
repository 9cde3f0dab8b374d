"""Blocks of a transformer compiled by torch.compile, so that the same input has the same bits in every process."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import nn

from shards.errors import UserError

OPTIONS: dict[str, Any] = {"dynamic": False, "fullgraph": True}
"""A kernel for each shape: one for many would come into use with the second shape that a process meets, which is not
the same one in rollout and training. A part that cannot be compiled is an error, not slow."""
GRAPHS = 256  # one for each shape, with and without gradient, with the adapter on and off


def check_compile(device: torch.device) -> None:
    """UserError where torch.compile has no compiler: Triton for a GPU, one for C++ for the CPU."""
    compilers = ("g++", "clang++", "c++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        missing, hint = "a C++ compiler", "install g++"
    elif device.type == "cuda" and not _has_triton():
        missing, hint = "Triton for this GPU", "install triton"
    else:
        return
    raise UserError(f"model.compile = blocks needs {missing}", f"{hint}, or set model.compile = false")


def set_compiled(module: nn.Module, wanted: bool) -> None:
    """Compile the blocks of a transformer at their next forward, or leave them as they are written."""
    transformer: Any = module
    if all((block._compiled_call_impl is not None) == wanted for block in transformer.blocks):
        return
    if not wanted:
        for block in transformer.blocks:
            block._compiled_call_impl = None  # torch has no call that takes `compile` back
        return
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    # no measuring on the device which of several kernels is faster, as they add up in different orders
    torch._inductor.config.deterministic = True
    transformer.compile_repeated_blocks(**OPTIONS)


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
