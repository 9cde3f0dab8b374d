"""Questions to the table of samples: filter, group, sort and choose columns; and the answer to a terminal or a file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shards.errors import UserError, nearest
from shards.inspect.table import FORMATS, fitting, write
from shards.store.files import files_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas

QUOTED = r"`[^`]*`|'[^']*'|\"[^\"]*\""


def of_kind(frame: pandas.DataFrame, evaluation: bool) -> pandas.DataFrame:
    """Rollouts, or the evaluations; where there is one kind only and no evaluation is asked for, all of it.

    Keys of rollouts and of evaluations look alike, so a table that is read by key must not hold both.
    """
    if not evaluation and frame["kind"].nunique() == 1:
        return frame
    kind = "eval" if evaluation else "rollout"
    chosen = frame[frame["kind"] == kind]
    if chosen.empty:
        raise UserError("there are no evaluations here", "`rushes eval RUN` makes them")
    return chosen.reset_index(drop=True)


def select(
    frame: pandas.DataFrame, where: str = "", sort: str = "", columns: str = "", group_by: str = ""
) -> pandas.DataFrame:
    """The rows for which `where` holds, grouped, sorted and cut down to some columns, in this order.

    `where` is an expression over the columns (pandas' query language; `ocr.exact` may stand there as it is). `group_by`
    gives one row per value with samples, missing, used, reward_mean, reward_std, reward_min and reward_max; any other
    number named in `columns` or `sort` is averaged. `sort`, `columns` and `group_by` take several names, separated by
    commas; a name in `sort` that begins with - sorts downwards. Raises UserError, with the nearest right name, for an
    unknown column, and for an expression that is wrong or no condition.
    """
    if where:
        frame = _where(frame, where)
    order = [(name.lstrip("-"), not name.startswith("-")) for name in _names(sort)]
    chosen = _names(columns)
    if group_by:
        frame = _grouped(frame, _names(group_by), [*chosen, *(name for name, _ in order)])
    _check(frame, [*(name for name, _ in order), *chosen])
    if order:
        try:
            frame = frame.sort_values([name for name, _ in order], ascending=[up for _, up in order], kind="stable")
        except TypeError as error:
            raise UserError(f"cannot sort by {sort}: {error}", "sort by a column of numbers or of text") from error
    return (frame[chosen] if chosen else frame).reset_index(drop=True)


def emit(frame: pandas.DataFrame, format: str, out: Path | None, stdout: TextIO, *, fit: bool = True) -> None:
    """Write the table to the file `out`, whole or not at all, or else to `stdout`.

    With `fit`, a terminal gets the columns that it can show side by side. Raises UserError for an unknown format.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format", _meant(format, FORMATS))
    if format == "parquet" and out is None:
        raise UserError("--format parquet needs a file", "add --out samples.parquet")
    if fit and format == "table" and out is None and stdout.isatty() and not frame.empty:
        frame, hidden = fitting(frame, shutil.get_terminal_size().columns)
        if hidden:
            print(f"not shown (--columns chooses, --format csv has all): {', '.join(hidden)}", file=sys.stderr)
    empty = frame.empty and format == "table"
    data = ("  ".join(frame.columns) + "\n").encode() if empty else write(frame, format)
    if out is not None:
        write_out(out, data)
        return
    try:
        stdout.write(data.decode())
        stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def write_out(out: Path, data: bytes) -> None:
    """Replace the file that --out or --video names as a whole.

    A device, a pipe or a link (/dev/stdout) is written to, and stays what it is.
    """
    files, out = files_at(out)
    if os.path.lexists(out) and not stat.S_ISREG(os.lstat(out).st_mode):
        with open(out, "wb") as file:
            file.write(data)
    else:
        files.publish_replace(out, data)


def _where(frame: pandas.DataFrame, where: str) -> pandas.DataFrame:
    dotted = sorted((name for name in _columns(frame) if not name.isidentifier()), key=len, reverse=True)
    expression = where
    if dotted:
        names = "|".join(map(re.escape, dotted))
        expression = re.sub(rf"{QUOTED}|(?<![\w.])({names})(?![\w.])", _backquoted, where)
    try:
        found: Any = frame.eval(expression, engine="python", local_dict={}, global_dict={})
    except NameError as error:
        missing = re.search(r"name '([^']+)'", str(error))
        name = missing[1].removeprefix("BACKTICK_QUOTED_STRING_") if missing else str(error)
        raise UserError(f"--where: there is no column {name}", _meant(name, _columns(frame))) from error
    except (SyntaxError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"--where {where!r}: {text}", "write a condition, like 'reward < 0.5 and sample == 0'"
        ) from error
    if str(getattr(found, "dtype", "")) != "bool":
        raise UserError(f"--where {where!r} is not a condition", "compare something, like 'reward < 0.5'")
    return frame[found.to_numpy()]


def _backquoted(match: re.Match[str]) -> str:
    return f"`{match[1]}`" if match[1] else match[0]


def _grouped(frame: pandas.DataFrame, by: list[str], wanted: Sequence[str]) -> pandas.DataFrame:
    _check(frame, by)
    try:
        groups = frame.groupby(by, sort=False, dropna=False)
        result = groups["reward"].agg(["mean", "std", "min", "max"]).add_prefix("reward_")
    except TypeError as error:
        raise UserError(f"cannot group by {', '.join(by)}: {error}", "group by text or numbers, not lists") from error
    counts = groups.agg(
        samples=("key", "size"),
        missing=("reward", lambda column: int(column.isna().sum())),
        used=("weight", lambda column: int((column > 0).sum())),
    )
    result = counts.join(result)
    numbers = set(frame.select_dtypes("number").columns)
    extra = [name for name in dict.fromkeys(wanted) if name not in (*result.columns, *by)]
    _check(frame.assign(**dict.fromkeys(result.columns, 0)), extra)
    texts = [name for name in extra if name not in numbers]
    if texts:
        problem = f"{texts[0]} is not a number, so a group has no mean of it"
        raise UserError(problem, f"group by it: --group-by {shlex.quote(texts[0])}")
    return result.join(groups[extra].mean()).reset_index() if extra else result.reset_index()


def _check(frame: pandas.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame:
            raise UserError(f"there is no column {name!r}", _meant(name, _columns(frame)))


def _meant(name: str, names: Sequence[str]) -> str:
    near = nearest(name, names, 0.5)
    known = f"there are: {', '.join(names)}"
    return f"did you mean {near}? {known}" if near else known


def _columns(frame: pandas.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns]


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]
