"""Step 1: what is installed, what the device is, and which attention kernels it has."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib import metadata

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.found import Finding, Place
from bench.gpu.iteration import sync

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pydantic", "pydantic_core", "av", "numpy")
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
TOKENS = 4096
TRIES = 5


def environment(place: Place) -> Iterator[Finding]:
    """Versions, the device, and every SDPA backend with and without a gradient."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield Finding(1, "versions", f"Python {platform.python_version()}, {versions}")
    yield Finding(1, "device", describe(place.device))
    shape = (1, 2, 64, 32) if place.small else (1, 12, TOKENS, 128)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    for gradient in (False, True):
        for name in BACKENDS:
            what = f"SDPA {name.lower()}, {shape[2]} tokens, {'forward and backward' if gradient else 'forward'}"
            yield Finding(1, what, _attention(place.device, shape, dtype, name, gradient))


def describe(device: torch.device) -> str:
    """The device in one line."""
    if device.type == "cpu":
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors, {libraries}, "
        f"NCCL {nccl}"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _attention(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, name: str, gradient: bool
) -> str:
    """Milliseconds of one kernel, or why it does not run."""
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_(gradient) for _ in range(3))

    def once() -> None:
        out = scaled_dot_product_attention(query, key, value)
        if gradient:
            out.sum().backward()

    try:
        with sdpa_kernel(getattr(SDPBackend, name)):
            once()
            sync(device)
            began = time.monotonic()
            for _ in range(TRIES):
                once()
            sync(device)
            return f"{(time.monotonic() - began) / TRIES * 1000:.3f} ms"
    except RuntimeError as error:
        return f"not here: {str(error).splitlines()[0][:80]}"
