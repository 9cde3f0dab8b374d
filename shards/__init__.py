"""Files of a run: shards, their index and manifest, the tables beside them, and all that reads or writes them.

In a notebook, `shards.open("runs/first")` gives its tables and its videos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from shards.notebook.view import RunView

__all__ = ["open"]


def open(path: str | Path) -> RunView:
    """Open a run for reading: its tables as pandas frames, its videos as bytes, frames or HTML.

    `path` is a run directory or the URL of one. Raises UserError when it is not a run. Nothing loads torch.
    """
    from shards.notebook.view import RunView

    return RunView(path)
