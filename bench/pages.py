"""Parts of the documentation that are made from the code: `python -m bench.pages` writes them.

docs/python.md comes from docstrings, the table of README.md and docs/presets.md from shards/presets/evidence.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shards
from shards.notebook.view import RunView
from shards.presets.evidence import evidence_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
WITH_EVIDENCE = (ROOT / "README.md", ROOT / "docs" / "presets.md")
MARKS = ("<!-- begin evidence -->\n", "<!-- end evidence -->\n")
HEAD = """# Python

`import shards` reads a run in a notebook or a script: its tables as pandas frames, its videos as bytes, arrays or HTML.
It is typed, and it loads neither torch nor a model.

```python
import shards

run = shards.open("runs/demo")
table = run.table()  # samples, rewards, advantages
best = table.loc[table["reward"].idxmax(), "key"]
run.play(best)  # the last line of a cell: the notebook plays the video
```

`examples/notebook.ipynb` goes through all of it. [Querying a run](inspect.md) has three queries on the same table,
and [Format](format.md) the files below it, for those who read them without rushes.

<!-- made by `python -m bench.pages` from the docstrings; edit those -->
"""


def with_evidence(path: Path) -> str:
    """A page with the table of evidence between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + evidence_table() + MARKS[1] + after


def page() -> str:
    """The whole text of docs/python.md."""
    return "\n".join([HEAD, *_entry("shards.open", shards.open), *_class(RunView)])


def _class(view: type) -> Iterator[str]:
    yield from ("## The run", "", inspect.cleandoc(view.__doc__ or ""), "")
    for name, method in vars(view).items():
        if not name.startswith("_") and callable(method):
            yield from _entry(f".{name}", method)


def _entry(name: str, function: Any) -> Iterator[str]:
    """A heading with the signature, the types spelled as in the source, and the docstring."""
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.name != "self"]
    shown = signature.replace(parameters=parameters)
    yield from (f"## `{name}{str(shown).replace(chr(39), '')}`", "", inspect.cleandoc(function.__doc__ or ""), "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for one in WITH_EVIDENCE:
        one.write_text(with_evidence(one), encoding="utf-8")
