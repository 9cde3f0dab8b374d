"""Attention backends of diffusers, tried before they are used: what is there, and has a gradient, on this device."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from rollout.policy.folder import quiet_libraries
from shards.errors import UserError

AUTO = "auto"
SPLIT = (AUTO, "native")  # backends with which ranks may share the tokens of a video
TOKENS = 128  # of a trial


def check_name(name: str) -> None:
    """UserError unless diffusers knows a backend of that name."""
    known = [AUTO, *(one.value for one in AttentionBackendName)]
    if name not in known:
        raise UserError(f"model.attention = {name!r} is not an attention backend", f"one of {', '.join(known)}")


def check_attention(name: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """UserError where `model.attention` cannot be used here: unknown, not installed, not for this device or dtype, or
    without a gradient. Some backends return a result without one and raise nothing.

    It is tried on two heads of `width` numbers. Kernels on the Hugging Face hub are fetched by diffusers for that.
    """
    if name == AUTO:
        return
    check_name(name)
    hint = f"set it to auto or native; torch {torch.__version__}, {dtype} on {device.type}"
    try:
        with quiet_libraries(), attention_backend(name):
            gradients = _gradients(device, dtype, width)
    except (RuntimeError, ValueError, ImportError, AttributeError, TypeError, OSError, AssertionError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"model.attention = {name!r} cannot be used here: {line[:200]}", hint) from error
    if not all(one is not None and bool(one.isfinite().all()) and bool(one.any()) for one in gradients):
        raise UserError(f"model.attention = {name!r} has no gradient, so nothing can be trained with it", hint)


def set_attention(module: nn.Module, name: str) -> None:
    """Have the attention of a transformer computed by a backend that `check_attention` accepts."""
    transformer: Any = module
    with quiet_libraries():
        if name == AUTO:
            transformer.reset_attention_backend()
            return
        with attention_backend(name):  # restores what diffusers sets for all models of the process
            transformer.set_attention_backend(name)


def _gradients(device: torch.device, dtype: torch.dtype, width: int) -> list[Tensor | None]:
    """Gradients of query, key and value, [1, TOKENS, 2, width] each, by the active backend."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, TOKENS, 2, width)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    with torch.enable_grad():
        out: Tensor = dispatch_attention_fn(*inputs)
        if out.requires_grad:
            out.float().square().sum().backward()
    return [one.grad for one in inputs]
