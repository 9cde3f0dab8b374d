"""Prompts: every record of a file checked, its text cleaned once, and dealt out to the iterations."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from rollout.prompts.fields import image_of, optional_text, prompt_text, quoted_target, tags_of
from rollout.prompts.files import Column, Row, has_columns, read_rows
from rollout.words.paths import words_folder
from shards.errors import UserError
from shards.process.progress import counted
from shards.store.fetch import fetched_file


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is its line in a text or JSON-lines file, its row in a table, counted from 0."""

    id: int
    text: str
    """As the text encoder gets it (shards.text.cleaning.clean)."""
    target: str | None = None
    """What must be readable in the video, cleaned likewise."""
    image: str | None = None
    """First frame: an absolute path, or a URL in a store."""
    negative: str | None = None
    """Negative prompt of this prompt alone; None takes the run's."""
    tags: tuple[str, ...] = ()
    where: str = field(default="", compare=False)
    """File and line, or row, for errors."""


def load_prompts(path: str | Path, need_target: bool, column: Column | None = None) -> list[Prompt]:
    """All prompts of a file, in its order; `words` names the training prompts of the embedded model.

    A file at a URL (s3://bucket/prompts.txt) is fetched whenever it has changed, and images count from it all the same.
    The suffix tells the format: .txt (a prompt a line, blank lines skipped), .jsonl or .ndjson (prompt, and if wanted
    target, image, negative, tags; GenEval's metadata.jsonl is read too), .csv with these columns, .parquet. `column`
    gives the field of the prompts another name. A prompt may be a chat of one user message. Without a `target` field
    the target is what stands in quotation marks. Raises UserError, naming the line, for a file or a record that
    `read_rows` and `rollout.prompts.fields` refuse, for one without a prompt, and, when a target is needed, for one
    without.
    """
    file = words_folder() / "prompts" / "train.txt" if str(path) == "words" else fetched_file(Path(path).expanduser())
    column = column or Column()
    if column.name != Column().name and not has_columns(file):
        raise UserError(f"{column.setting} = {column.name}, but {file} is text, a prompt a line", "remove that setting")
    return list(_load(file, _stamp(file), need_target, column))


def _stamp(file: Path) -> tuple[object, ...]:
    """What changes whenever a file does, and its full name; one that is not there has a stamp too."""
    try:
        found = os.stat(file)
    except OSError:
        return (os.path.abspath(file),)
    return os.path.abspath(file), found.st_ino, found.st_ctime_ns, found.st_size


@lru_cache(maxsize=8)
def _load(file: Path, stamp: tuple[object, ...], need_target: bool, column: Column) -> tuple[Prompt, ...]:
    """The prompts of a file, read once for each state of it, which `stamp` tells apart."""
    prompts = tuple(_prompt(file, row, need_target, column) for row in read_rows(file, column))
    if not prompts:
        raise UserError(f"{file}: holds no prompt", "write one prompt a line")
    return prompts


def _prompt(file: Path, row: Row, need_target: bool, column: Column) -> Prompt:
    """One checked prompt."""
    fields, where = row.fields, row.where
    text = prompt_text(fields.get(column.name), where)
    if not text:
        missing = column.name not in fields
        hint = column.hint(sorted(map(str, fields)), "fields") if missing else "every record needs a text as its prompt"
        raise UserError(f"{where}: no prompt", hint)
    target = optional_text(fields.get("target"), "target", where)
    return Prompt(
        id=row.number,
        text=text,
        target=target or quoted_target(text, where, need_target),
        image=image_of(file, fields.get("image"), where),
        negative=optional_text(fields.get("negative"), "negative", where),
        tags=tags_of(fields, where),
        where=where,
    )


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
