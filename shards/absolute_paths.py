"""Relative paths in the settings of a new run: written in full, so that they hold wherever a later command is given."""

from __future__ import annotations

import copy
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError, nearest
from shards.store.urls import full_path, named_here

PROMPTS = (("rollout", "prompts"), ("eval", "prompts"))
LORAS = (("model", "lora"), ("model", "lora_2"), ("model", "base_lora"), ("model", "base_lora_2"))
PATHS = (("model", "path"), *LORAS, *PROMPTS)
IN_FULL = "written in full, so that it holds wherever a command is given"
EMBEDDED = "words"  # names the embedded model and its prompts, even where a folder has that name
NONE = "none"  # says of an expert that it has no LoRA, likewise


def in_full(values: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """The tree of a run.toml with its relative paths made absolute, and a sentence for the user about each of them.

    These are `model.path`, the LoRAs of [model], `rollout.prompts` and `eval.prompts`, where something of that name is
    in the current directory (else it may be a hub id), and options of rewards that hold a slash, likewise.
    Rewards of one's own, `module:Class`, get the path of their file. URLs and `~` mean the same from everywhere.
    Raises UserError for a prompts file, or the file of a reward, that is not there.
    """
    changed, said = copy.deepcopy(values), []
    for name, table, key in _texts(changed):
        full = full_path(str(table[key]))
        if full != table[key]:
            table[key] = full
            said.append(f"{name}: {table[key]}, {IN_FULL}")
    for section, key in PROMPTS:
        section_values = changed.get(section)
        _check_prompts(f"{section}.{key}", section_values.get(key) if isinstance(section_values, dict) else None)
    return changed, said + _rewards_in_full(changed)


def reward_in_full(name: str) -> str:
    """A reward with the path of its file in full, `/home/me/colour.py:Colourful`, perhaps with `.component` behind.

    `colour:Colourful` and `colour.py:Colourful` count from the current directory. What is registered under a name, and
    a module that is installed, keep theirs. Raises UserError for a file that is not there.
    """
    module, colon, rest = name.partition(":")
    if not colon or not module:
        return name
    if module.endswith(".py") or "/" in module:
        given = Path(module).expanduser()
        if not given.is_file():
            raise UserError(f"reward {name!r}: {given}: no such file", nearest_file(given))
        return f"{os.path.abspath(given)}:{rest}"
    head = module.partition(".")[0]
    elsewhere = [place for place in sys.path if place and os.path.realpath(place) != os.path.realpath(".")]
    if head in sys.builtin_module_names or importlib.machinery.PathFinder.find_spec(head, elsewhere):
        return name  # it is installed, and found from everywhere
    base = Path.cwd().joinpath(*module.split("."))
    path = next((one for one in (base.with_name(f"{base.name}.py"), base / "__init__.py") if one.is_file()), None)
    return f"{path}:{rest}" if path else name


def class_file(name: str) -> Path | None:
    """The file of a class of one's own, `module:Class` or `/path/file.py:Class`; None for what is installed.

    The file need not be there.
    """
    try:
        module, colon, _ = reward_in_full(name).partition(":")
    except UserError:
        module, colon, _ = name.partition(":")
    own = colon and (module.endswith(".py") or "/" in module)
    return Path(os.path.abspath(Path(module).expanduser())) if own else None


def nearest_file(path: Path) -> str:
    """For hints: the file beside a missing one that is called most like it, or where a relative path counts from."""
    names = [one.name for one in path.parent.iterdir() if one.is_file()] if path.parent.is_dir() else []
    if near := nearest(path.name, names):
        return f"did you mean {path.with_name(near)}?"
    if path.is_absolute():
        return "give the path of a file that is there"
    return f"a relative path counts from where the command is given, here from {Path.cwd()}"


def _check_prompts(name: str, text: object) -> None:
    if isinstance(text, str) and text != EMBEDDED:
        path = named_here(text)
        if path and not path.is_file():
            raise UserError(f"{name}: {text}: no such file", nearest_file(path))


def _rewards_in_full(values: dict[str, object]) -> list[str]:
    """Change the names of rewards in a tree; a sentence for the user about each."""
    found = values.get("score")
    score = found if isinstance(found, dict) else {}
    said: list[str] = []
    for key in ("rewards", "options"):
        table = score.get(key)
        if isinstance(table, dict):
            names = {name: reward_in_full(name) for name in table}
            score[key] = {names[name]: value for name, value in table.items()}
            said += [f"score.{key}: {full}, {IN_FULL}" for name, full in names.items() if full != name]
    return said


def _texts(values: dict[str, object]) -> Iterator[tuple[str, dict[str, object], str]]:
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


def _is_relative(value: object) -> bool:
    return isinstance(value, str) and value not in ("", EMBEDDED, NONE) and value[0] not in "/~"
