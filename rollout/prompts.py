"""Prompts: read from text, JSON lines, CSV or Parquet, checked line by line, and dealt out to the iterations."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.words.paths import words_folder
from shards.absolute_paths import nearest_file
from shards.errors import UserError
from shards.process.progress import counted
from shards.quotes import quoted
from shards.store.mirror import fetch_file
from shards.store.urls import is_url, url_of, working_copy

LARGEST = 100_000  # bytes of a prompt
FIELDS = ("target", "image", "negative", "tags")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is its line in a text or JSON-lines file, its row in a table, counted from 0."""

    id: int
    text: str
    target: str | None = None
    """What must be readable in the video."""
    image: str | None = None
    """First frame: an absolute path, or a URL in a store."""
    negative: str | None = None
    """Negative prompt of this prompt alone; None takes the run's."""
    tags: tuple[str, ...] = ()


def load_prompts(path: str | Path, need_target: bool) -> list[Prompt]:
    """All prompts of a file, in its order; `words` names the training prompts of the embedded model.

    A file at a URL (s3://bucket/prompts.txt) is fetched whenever it has changed, and images count from it all the same.
    The suffix tells the format: .txt (a prompt a line, blank lines skipped), .jsonl or .ndjson (prompt, and if wanted
    target, image, negative, tags; GenEval's metadata.jsonl is read too), .csv with these columns, .parquet. Without a
    `target` field the target is what stands in quotation marks. Raises UserError, naming the line, for a file that is
    missing, empty or not UTF-8, for a prompt with NUL bytes or above 100 kB, and, when a target is needed, for one
    without.
    """
    file = words_folder() / "prompts" / "train.txt" if str(path) == "words" else Path(path).expanduser()
    if is_url(path):
        file = fetch_file(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: prompts of an unknown format", f"the suffix is one of {', '.join(_READERS)}")
    if not file.is_file():
        raise UserError(f"{file}: no such file", nearest_file(file))
    prompts = [_prompt(file, *row, need_target) for row in reader(file)]
    if not prompts:
        raise UserError(f"{file}: holds no prompt", "write one prompt a line")
    return prompts


def prompts_of_iteration(prompts: Sequence[Prompt], count: int, seed: int, iteration: int) -> list[Prompt]:
    """The `count` prompts of an iteration, all different: passes over all prompts, each in another seeded order.

    Every prompt is used once before any is used again. Where a pass ends inside an iteration, the next one begins with
    prompts that the iteration does not hold yet. Raises UserError when there are fewer prompts than `count`.
    """
    if count > len(prompts):
        raise UserError(
            f"rollout.prompts_per_iteration = {count}, more than the {counted(len(prompts), 'prompt')} to take",
            f"set it to {len(prompts)} or less",
        )
    queue: list[Prompt] = []
    taken: list[Prompt] = []
    passes = 0
    for _ in range(iteration + 1):
        taken, queue = queue[:count], queue[count:]
        if len(taken) < count:
            fresh = _shuffled(prompts, seed, passes)
            passes += 1
            ids = {prompt.id for prompt in taken}
            new = [prompt for prompt in fresh if prompt.id not in ids][: count - len(taken)]
            used = {prompt.id for prompt in new}
            taken, queue = taken + new, [prompt for prompt in fresh if prompt.id not in used]
    return taken


def split(prompts: Sequence[Prompt], holdout: float) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and about `holdout` (0 to 1) of them to evaluate on, each in their order.

    The hash of its text decides for each prompt: equal texts come to one side, and prompts that are added later move
    none of the others.
    """

    def held(prompt: Prompt) -> bool:
        number = hashlib.sha256(f"rushes holdout {prompt.text}".encode()).digest()[:8]
        return int.from_bytes(number) < holdout * 2**64

    return [prompt for prompt in prompts if not held(prompt)], [prompt for prompt in prompts if held(prompt)]


def _shuffled(prompts: Sequence[Prompt], seed: int, number: int) -> list[Prompt]:
    """The order of one pass: by hashes, which no change of a random generator can alter."""
    return sorted(prompts, key=lambda p: hashlib.sha256(f"rushes prompts {seed} {number} {p.id}".encode()).digest())


def _prompt(file: Path, number: int, line: int, row: Mapping[str, Any], need_target: bool) -> Prompt:
    """One checked prompt; `line` is what errors name."""
    where = f"{file}, line {line}" if file.suffix.lower() != ".parquet" else f"{file}, row {number}"
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: no prompt", "every record needs a text under the name `prompt`")
    values = {name: _text(row.get(name), name, where) for name in ("target", "image", "negative")}
    for value in (text, *values.values()):
        _check_text(value or "", where)
    target = values["target"] or _target(text, where, need_target)
    image = values["image"]
    return Prompt(
        id=number,
        text=text.strip(),
        target=target,
        image=_image(file, image, where) if image else None,
        negative=values["negative"],
        tags=_tags(row.get("tags", row.get("tag"))),
    )


def _image(file: Path, image: str, where: str) -> str:
    """Where an image lies that a prompts file names: at a URL, or in a file; relative names count from the prompts."""
    folder = url_of(file.parent)
    if is_url(image):
        try:
            return url_of(working_copy(image)) or image
        except UserError as error:
            raise UserError(f"{where}: {error.problem}", error.hint) from None
    if folder is None or image.startswith("/"):
        return str((file.parent / image).resolve())
    scheme, _, rest = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, image))}"


def _text(value: Any, name: str, where: str) -> str | None:
    """A text field; an empty one counts as absent, except that a negative prompt may be empty on purpose."""
    if value is None or (value == "" and name != "negative"):
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {value!r}, not text", f"write the {name} as text")
    return value


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise UserError(f"{where}: contains a NUL byte", "remove it; is this a text file?")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{where}: contains half a surrogate pair", "it cannot be UTF-8; correct it") from None
    if size > LARGEST:
        raise UserError(f"{where}: {size} bytes, above the limit of {LARGEST}", "a model reads about 512 tokens")


def _target(text: str, where: str, needed: bool) -> str | None:
    try:
        target = " ".join(span for span in quoted(text) if span)
    except ValueError as error:
        if not needed:
            return None
        raise UserError(f"{where}: {error}", "close it, or give the text to be read in a `target` field") from None
    if needed and not target:
        raise UserError(f"{where}: no quoted text to be read", 'write it in quotation marks: a sign that says "OPEN"')
    return target or None


def _tags(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    values = value.split(",") if isinstance(value, str) else value
    return tuple(str(tag).strip() for tag in values)


def _decode(file: Path) -> str:
    """The text of a file. UserError names line and byte where it is not UTF-8."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 0; only line feeds end a line."""
    for number, line in enumerate(_decode(file).split("\n")):
        if line.strip():
            yield number, line.rstrip("\r")


Row = tuple[int, int, Mapping[str, Any]]  # id, line from 1, fields


def _read_text(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        yield number, number + 1, {"prompt": line}


def _read_json(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number + 1}: not JSON: {error}", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number + 1}: not a JSON object", 'for example {"prompt": "a sign"}')
        yield number, number + 1, row


def _read_csv(file: Path) -> Iterator[Row]:
    text = _decode(file)
    nul = text.find("\0")  # the csv module stops at it without saying where
    if nul >= 0:
        raise UserError(f"{file}, line {text.count(chr(10), 0, nul) + 1}: contains a NUL byte", "is this a text file?")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    _check_columns(file, reader.fieldnames or ())
    number = -1
    try:
        for number, row in enumerate(reader):
            yield number, reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}", "correct that line") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not readable as Parquet: {error}", "write it again") from None
    _check_columns(file, table.column_names)
    columns = [name for name in ("prompt", "tag", *FIELDS) if name in table.column_names]
    for number, row in enumerate(table.select(columns).to_pylist()):
        yield number, number + 1, row


def _check_columns(file: Path, names: Sequence[str]) -> None:
    if "prompt" not in names:
        raise UserError(f"{file}: has no column `prompt`", f"its columns are: {', '.join(names) or 'none'}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
