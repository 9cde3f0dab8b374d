"""The images that prompts begin with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.pointers import refuse_pointer
from shards.store.fetch import fetched_file

if TYPE_CHECKING:
    from PIL import Image


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """A PIL image in RGB; paths and URLs are opened. UserError when the file is missing or not an image."""
    from PIL import Image

    if not isinstance(image, str | Path):
        return image.convert("RGB")
    image = fetched_file(image)
    if not Path(image).is_file():
        raise UserError(f"{image}: no such image", "correct the path in the prompts file; it counts from that file")
    refuse_pointer(Path(image))
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = f"{image}: cannot be read as an image: {error}"
        raise UserError(problem, "correct the path in the prompts file, or convert the file to PNG") from None
