"""The pictures of the documentation, written to docs/pictures/.

    python -m bench.pictures RUN                 # frames.png and report.png, from a run that was evaluated
    python -m bench.pictures --objectives OUT    # objectives.png, from the chains of bench/objectives.py

`frames.png` has the same held-out prompts and the same noise before and after, with their rewards: prompts at equal
distances in the evaluation, not chosen ones. `report.png` is the top of the page of `rushes report`, in a headless
Chromium. `objectives.png` has the same for the last policy of every objective, a row each, below the base model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import shards
from bench.objectives import ordered
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.notebook.view import RunView

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
PROMPTS = 6
SCALE = 3  # pixels of the picture for one of the video
SMALL = 2  # the same, of the picture of all objectives
GAP, LINE = 8, 22  # pixels between videos, and for a line of text
WIDTH, HEIGHT = 1180, 930  # of what is shown of the report
COLOURS = 64


def frames(run: RunView) -> Any:
    """A picture: one column a prompt, the middle frame of its first video by the first and by the last policy."""
    from PIL import Image, ImageDraw

    table = run.table(evaluation=True)
    table = table[table["sample"] == 0]
    first, last = int(table["iteration"].min()), int(table["iteration"].max())
    if first == last:
        raise UserError(f"{run.run.path}: one policy was evaluated, two are needed", "`rushes eval` evaluates two")
    rows = {number: table[table["iteration"] == number].set_index("prompt_id") for number in (first, last)}
    both = sorted({*rows[first].index} & {*rows[last].index})
    prompts = both[:: max(1, len(both) // PROMPTS)][:PROMPTS]
    height, width = (SCALE * size for size in run.frames(rows[first]["key"][prompts[0]], True).shape[1:3])
    size = (GAP + len(prompts) * (width + GAP), 2 * (height + 2 * LINE) + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for line, (number, label) in enumerate({first: "before", last: f"after {last} iterations"}.items()):
        top = line * (height + 2 * LINE)
        draw.text((GAP, top + 4), label, fill="black", font_size=14)
        for column, prompt in enumerate(prompts):
            row = rows[number].loc[prompt]
            video = run.frames(row["key"], True)
            left = GAP + column * (width + GAP)
            tile = Image.fromarray(video[len(video) // 2]).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (left, top + LINE))
            said = f"{row['target']}: {row['reward']:.2f}"
            draw.text((left, top + LINE + height + 3), said, fill="black", font_size=14)
    return picture


def chains(out: Path) -> Any:
    """A picture: one row an objective that was trained on OCR alone, below the base model; one column a prompt."""
    from PIL import Image, ImageDraw

    found = [json.loads(path.read_text()) | {"run": path.parent} for path in out.glob("chain-*/result.json")]
    rows = ordered([row for row in found if row["rewards"] == "ocr" and not row["control"]])
    if not rows:
        raise UserError(f"{out} has no chain", "run `python bench/objectives.py --parts chain` first")
    labels = [("base model", rows[0]["before"], rows[0]["run"], min)]
    labels += [(row["objective"], row["after"], row["run"], max) for row in rows]
    strips = [(f"{name}: {reward:.2f}", strip(shards.open(path), which)) for name, reward, path, which in labels]
    width, height = strips[0][1].size
    picture = Image.new("RGB", (width + 2 * GAP, len(strips) * (height + LINE) + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for line, (label, tiles) in enumerate(strips):
        draw.text((GAP, line * (height + LINE) + 4), label, fill="black", font_size=14)
        picture.paste(tiles, (GAP, line * (height + LINE) + LINE))
    return picture


def strip(run: RunView, which: Callable[..., Any]) -> Any:
    """Middle frames of the first video of some prompts side by side, by the first (`min`) or last (`max`) policy."""
    from PIL import Image

    table = run.table(evaluation=True)
    table = table[(table["sample"] == 0) & (table["iteration"] == which(table["iteration"]))].sort_values("prompt_id")
    keys = list(table["key"])[:: max(1, len(table) // PROMPTS)][:PROMPTS]
    middle = [video[len(video) // 2] for video in (run.frames(key, True) for key in keys)]
    tiles = Image.fromarray(np.concatenate(middle, axis=1))
    return tiles.resize((SMALL * tiles.width, SMALL * tiles.height), Image.Resampling.NEAREST)


def report(run: RunView, path: Path) -> None:
    """The top of the page of the report, as a browser shows it."""
    from shards.report.page import write_report
    from tests.support import chromium

    if not chromium.BROWSER or not chromium.DRIVER:
        raise UserError(chromium.MISSING, "the other picture needs no browser")
    page = write_report(run.run)
    with chromium.browser() as tab:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        tab.command("Emulation.setDeviceMetricsOverride", **size)
        tab.open(page)
        tab.screenshot(path, whole=False)


def small(picture: Any, path: Path) -> None:
    """Save a picture with few colours."""
    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    """Write the pictures of a run, or of the objectives."""
    from PIL import Image

    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1] == "--objectives":
        return small(chains(Path(sys.argv[2])), FOLDER / "objectives.png")
    run = shards.open(sys.argv[1])
    small(frames(run), FOLDER / "frames.png")
    shown = FOLDER / "report.png"
    report(run, shown)
    small(Image.open(shown), shown)


if __name__ == "__main__":
    main()
