"""run.toml: read with the settings of --set laid over it, checked, and written with its comments."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from shards.config import SCHEMA, RunConfig, Section
from shards.errors import UserError, nearest
from shards.records.opening import read_plain

PRESETS = Path(__file__).parent / "presets"
MOST_BYTES, LONGEST_LINE = 2**20, 20_000
"""Of a run.toml, in bytes and characters."""
Setting = str | tuple[str, object]
"""What a call sets otherwise than run.toml: `section.key=value` as --set has it, or the dotted key and its value."""


def load_config(path: Path, sets: Iterable[Setting] = ()) -> RunConfig:
    """Read a `run.toml`, and lay the settings of a call over it.

    Raises UserError for a file that is missing or no TOML, an unknown key (naming the nearest right one), a wrong type.
    """
    try:
        text = read_plain(path, MOST_BYTES, "it must be a file that you may read").decode("utf-8-sig")
        values = _parse(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "make a run first: rushes init RUN --preset words") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {error}", "correct that line") from None
    if "schema" not in values:  # the first line that `init` writes; an empty file would stand for all defaults
        hint = f"restore it from a copy; one written by hand begins with `schema = {SCHEMA}`"
        raise UserError(f"{path}: has no schema, so it is not a run.toml or has lost its beginning", hint)
    found = values["schema"]
    if found != SCHEMA:
        raise UserError(f"{path}: schema {found}, but this program writes schema {SCHEMA}", "make a new run directory")
    changed = apply_sets(values, sets)
    return parse_config(changed, f"{path} with --set" if changed != values else str(path))


def _parse(text: str) -> dict[str, object]:
    """The values of a TOML document. ValueError for one that is none, or that would keep the parser busy for long."""
    if any(len(line) > LONGEST_LINE for line in text.splitlines()):
        raise ValueError(f"a line of more than {LONGEST_LINE} characters")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def read_preset(name: str) -> dict[str, object]:
    """The values of a preset; raises UserError with the nearest right name for an unknown one."""
    names = presets()
    if name not in names:
        near = nearest(name, names, 0.0)
        hint = f"did you mean {near}? There are: {', '.join(names)}" if near else f"there are: {', '.join(names)}"
        raise UserError(f"unknown preset {name!r}", hint)
    return {"preset": name, **tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))}


def presets() -> list[str]:
    """Names of the presets, in order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def parse_config(values: dict[str, object], where: str) -> RunConfig:
    """Check a tree of plain values against the sections; `where` names their origin in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _user_error(error, where) from None


def apply_sets(values: dict[str, object], sets: Iterable[Setting]) -> dict[str, object]:
    """Lay settings over a tree of values; a value in a text is TOML, or else a plain string.

    Raises UserError for a setting without `=` or a key that leads through something that is not a table.
    """
    changed = copy.deepcopy(values)
    for setting in sets:
        name, value = setting if isinstance(setting, tuple) else _parsed(setting)
        *tables, key = _key_parts(name.strip())
        table: dict[str, Any] = changed
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {setting}: {part} is a value, not a section", "name one section and one key")
        table[key] = value
    return changed


def set_option(key: str, value: object) -> str:
    """For hints: the option that sets `key` to `value`, to be pasted into a shell."""
    plain = isinstance(value, str) and value == value.strip() and _toml_value(value) == value
    return "--set " + shlex.quote(f"{key}={value if plain else _toml(value)}")


def _parsed(setting: str) -> tuple[str, object]:
    """Key and value of a --set."""
    name, equals, text = setting.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {setting}: not of the form section.key=value", "for example --set rollout.steps=10")
    return name, _toml_value(text.strip())


def _key_parts(name: str) -> list[str]:
    """`score.options."a.b:C".size` in its parts; quotes, as TOML has them, keep the dots of one."""
    parts = re.findall(r'"(?:[^"\\]|\\.)*"|[^."]+', name)
    return [json.loads(part) if part[0] == '"' else part for part in parts] or [name]


def dump_config(config: RunConfig) -> str:
    """The text of `run.toml`: every key with its value, and above it what it means and where its default comes from."""
    lines = [f"schema = {config.schema_version}", f"preset = {_toml(config.preset)}"]
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if not isinstance(section, Section):
            continue
        lines += ["", f"[{name}]"]
        tables: list[str] = []
        for key, field in type(section).model_fields.items():
            lines += _dump_key(name, key, getattr(section, key), field.description or "", tables)
        lines += tables
    return "\n".join(lines) + "\n"


def _dump_key(section: str, key: str, value: object, description: str, tables: list[str]) -> list[str]:
    """Lines of one key; a dictionary of dictionaries becomes sub-tables, kept for the end of the section."""
    if value is None:
        return [f"# {key}: {description}", f"# {key} ="]
    if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        for name, inner in value.items():
            tables += ["", f"[{section}.{key}.{_toml_key(name)}]"]
            tables += [f"{_toml_key(option)} = {_toml(setting)}" for option, setting in inner.items()]
        return []
    return [f"# {key}: {description}", f"{key} = {_toml(value)}"]


def _toml(value: object) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_toml_key(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but TOML also wants DEL escaped and knows no surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(text: str) -> object:
    """The value of a --set: TOML where it parses, the text itself where it does not."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _user_error(error: ValidationError, where: str) -> UserError:
    """The first thing that is wrong, as one sentence with the nearest right key."""
    first = error.errors()[0]
    *sections, key = [str(part) for part in first["loc"]]
    place = f"[{'.'.join(sections)}] " if sections else ""
    if first["type"] == "extra_forbidden":
        names = _keys_of(sections)
        known = [] if sections else [f"{name}.{key}" for name in RunConfig.model_fields if key in _keys_of([name])]
        if known:
            return UserError(f"{where}: unknown key {key!r}", f"did you mean {' or '.join(known)}?")
        near = nearest(key, names, 0.0)
        return UserError(
            f"{where}: {place}unknown key {key!r}", f"the nearest key is {near!r}" if near else "remove it"
        )
    message = first["msg"][0].lower() + first["msg"][1:]
    hint = _description(sections, key) or "run.toml says what each key takes"
    return UserError(f"{where}: {place}{key}: {message}, but it is {first['input']!r}", hint)


def _description(sections: list[str], key: str) -> str:
    """What a key of a section means, as `run.toml` says it; empty where there is no such key."""
    if not sections or sections[0] not in RunConfig.model_fields:
        return ""
    section = RunConfig.model_fields[sections[0]].annotation
    name = sections[1] if len(sections) > 1 else key
    field = section.model_fields.get(name) if section and hasattr(section, "model_fields") else None
    return f"{name}: {field.description}" if field else ""


def _keys_of(sections: list[str]) -> list[str]:
    """Names allowed in a section of `run.toml`; no section stands for the top level."""
    model: type[BaseModel] = RunConfig
    for section in sections:
        inner = model.model_fields[section].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
