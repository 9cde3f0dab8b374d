"""The pages name files and functions that are there: stale names mislead more than none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def folders_of(cell: str) -> list[Path]:
    """`shards/inspect/`, `report/`: the later ones lie beside the first."""
    names = re.findall(r"`([\w/]+)/`", cell)
    first = Path(names[0]) if names else Path()
    return [Path(name) if (ROOT / name).is_dir() else first.parent / name for name in names]


def strange_files(text: str) -> list[str]:
    """Files that a row about folders names, and that are in none of them."""
    found = []
    for first, *others in rows(text):
        folders = folders_of(first)
        names = re.findall(r"`([\w/]+\.py)`", " ".join(others)) if folders else []
        found += [f"{first}: {name}" for name in names
                  if not any((ROOT / place / name).is_file() for place in (*folders, Path()))]  # fmt: skip
    return found


def defines(files: list[str], name: str) -> bool:
    """Whether one of the files defines a function, a class or a constant of that name, `D.e` by its last part."""
    last = re.escape(name.rpartition(".")[2])
    one = re.compile(rf"^\s*(?:async )?(?:def|class) {last}\b|^\s*{last}\b.* = ", re.MULTILINE)
    return any(one.search((ROOT / file).read_text(encoding="utf-8")) for file in files if (ROOT / file).is_file())


def strange_names(text: str) -> list[str]:
    """Names that the text puts into a file, as in `a/b.py`: `c`, `D.e`, where the file defines none.

    In the index the files have a cell of their own, and the names begin the next.
    """
    names = r"((?:`[\w.]+`(?:, )?)+)"
    places = [([file], found) for file, found in re.findall(rf"`([\w/]+\.py)`: {names}", text)]
    for cells in rows(text):
        begin = re.match(names, cells[2]) if len(cells) == 3 else None
        if begin and re.fullmatch(r"`[\w/.]+`(?:, `[\w/.]+`)*", cells[1]):
            places.append((re.findall(r"`([\w/]+\.py)`", cells[1]), begin[1]))
    return [
        f"{', '.join(files)}: {name}"
        for files, found in places
        for name in re.findall(r"`([\w.]+)`", found)
        if not defines(files, name)
    ]


def test_what_the_page_names_is_there() -> None:
    assert strange_files(PAGE.read_text(encoding="utf-8")) == []
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGE.parent.glob("*.md")}
    assert {name: strange for name, text in pages.items() if (strange := strange_names(text))} == {}


def test_a_stale_name_is_found() -> None:
    assert strange_files("| `rollout/` | the plan (`plan.py`, `grids.py`) |") == ["`rollout/`: grids.py"]
    assert strange_names("`rollout/plan.py`: `stage_plan`, `make_plan`") == ["rollout/plan.py: make_plan"]
    index = "| x? | `rollout/plan.py`, `rollout/step.py` | `take_step`, `make_plan`, called by `y` |"
    assert strange_names(index) == ["rollout/plan.py, rollout/step.py: make_plan"]
