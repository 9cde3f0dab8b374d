"""What a policy is given from outside: the device it shall run on, and the images its prompts begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.mirror import fetch_file
from shards.pointers import refuse_pointer
from shards.urls import is_url
from shards.world import local_rank, world_size


def find_device(name: str, dtype: str = "float32") -> torch.device:
    """The device of `model.device`. UserError when it is not there, or cannot compute in `dtype`."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"model.device: {name!r} is no device", "auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: {name}, but this machine has no CUDA device", "set model.device = auto")
    if device.type == "cuda" and world_size() > 1 and device.index is None:
        device = torch.device("cuda", local_rank())  # each rank of a machine has a device of its own
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"model.device: {name}, but this machine has {torch.cuda.device_count()} CUDA devices"
        raise UserError(problem, "they are counted from 0: cuda:0, cuda:1")
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"model.dtype: bfloat16, which {name} cannot compute", "set model.dtype = float32")
    if dtype == "float16" and device.type == "cpu":
        problem = "model.dtype: float16, which a CPU computes badly or not at all"
        raise UserError(problem, "set model.dtype = float32, or bfloat16")
    return device


def open_image(image: Any) -> Any:
    """A PIL image in RGB; paths and URLs are opened. UserError when the file is missing or no image."""
    from PIL import Image

    if not isinstance(image, str | Path):
        return image.convert("RGB")
    image = fetch_file(image) if is_url(image) else image
    if not Path(image).is_file():
        raise UserError(f"{image}: no such image", "correct the path in the prompts file; it counts from that file")
    refuse_pointer(Path(image))
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = f"{image}: cannot be read as an image: {error}"
        raise UserError(problem, "correct the path in the prompts file, or convert the file to PNG") from None
