"""The pictures of README.md: `python -m bench.pictures RUN` writes docs/pictures/ from a run that was evaluated.

`frames.png` has the same held-out prompts and the same noise before and after, with their rewards: prompts at equal
distances in the evaluation, not chosen ones. `report.png` is the top of the page of `rushes report`, in a headless
Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shards
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.notebook.view import RunView

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
PROMPTS = 6
SCALE = 3  # pixels of the picture for one of the video
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
    """Write both pictures."""
    from PIL import Image

    run = shards.open(sys.argv[1])
    FOLDER.mkdir(exist_ok=True)
    small(frames(run), FOLDER / "frames.png")
    shown = FOLDER / "report.png"
    report(run, shown)
    small(Image.open(shown), shown)


if __name__ == "__main__":
    main()
