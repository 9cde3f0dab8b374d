"""Relative paths in the settings of a new run: written in full, so that they hold wherever a later command is given."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.store.urls import is_url

PROMPTS = (("rollout", "prompts"), ("eval", "prompts"))
PATHS = (("model", "path"), ("model", "lora"), *PROMPTS)
EMBEDDED = "words"  # names the embedded model and its prompts, even where a folder has that name


def in_full(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tree of a run.toml with its relative paths made absolute, and a sentence for the user about each of them.

    These are `model.path`, `model.lora`, `rollout.prompts` and `eval.prompts`, where something of that name is in the
    current directory (else it may be a hub id), and options of rewards that hold a slash, under the same condition. A
    prompts file that is not there keeps its name, and a sentence says so. URLs and `~` mean the same from everywhere.
    """
    changed, said = copy.deepcopy(values), []
    for name, table, key in _texts(changed):
        text, found = table[key], os.path.exists(table[key])
        if found:
            table[key] = os.path.abspath(text)
            said.append(f"{name}: {table[key]}, written in full, so that it holds wherever a command is given")
        elif tuple(name.split(".")) in PROMPTS:
            said.append(
                f"{name}: there is no {text} in {Path.cwd()}; a relative path counts from where a command is given"
            )
    return changed, said


def _texts(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, table and key of every text that may be a relative path."""
    for section, key in PATHS:
        table = values.get(section)
        if isinstance(table, dict) and _is_relative(table.get(key)):
            yield f"{section}.{key}", table, key
    score = values.get("score")
    rewards = score.get("options") if isinstance(score, dict) else None
    for reward, options in rewards.items() if isinstance(rewards, dict) else ():
        for key, value in options.items() if isinstance(options, dict) else ():
            if _is_relative(value) and "/" in value:
                yield f"score.options.{reward}.{key}", options, key


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", EMBEDDED) and not is_url(value) and value[0] not in "/~"
