"""What rewards there are, with components, options and defaults: read from their source, so that nothing is loaded."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from score.reward import known
from shards.absolute_paths import reward_in_full
from shards.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """One reward as its source describes it."""

    name: str
    target: str
    """`module:Class`, or the file in place of the module."""
    summary: str
    """First line of its docstring."""
    components: list[str]
    """The first is the reward; empty where the source does not spell them out."""
    options: dict[str, str]
    """Default by option, as Python writes it; "needed" where there is none."""
    text: str
    """All of its docstring, and that of its constructor, which explains the options."""


def every_reward() -> list[Entry]:
    """Every registered reward, sorted by name. Raises UserError for one whose source cannot be read."""
    return [describe_reward(name) for name in sorted(known())]


def describe_reward(name: str) -> Entry:
    """One reward by its registered name, `module:Class` or `file.py:Class`. Raises UserError for one that is not."""
    names = known()
    if ":" not in name and name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"no reward is called {name!r}", f"{hint}there are {', '.join(sorted(names))}")
    target = names.get(name) or reward_in_full(name)
    source, _, class_name = target.partition(":")
    classes = list(_classes(_file_of(source, name), class_name))
    if not classes:
        raise UserError(f"reward {name!r}: {source} has no class {class_name!r}", "write it as `module:Class`")
    documented = next((text for one in classes if (text := ast.get_docstring(one))), "")
    components = next((value for one in classes if (value := _attribute(one, "components")) is not None), "()")
    begin = next((function for one in classes if (function := _constructor(one))), None)
    explained = (ast.get_docstring(begin) or "") if begin else ""
    return Entry(
        name=name,
        target=target,
        summary=inspect.cleandoc(documented).partition("\n")[0],
        components=_names(components),
        options=_defaults(begin) if begin else {},
        text="\n\n".join(part for part in (documented, explained) if part),
    )


def render_listing(entries: list[Entry], whole: bool) -> str:
    """A line or two a reward, or with `whole` all that its source says about it."""
    lines = []
    for one in entries:
        summary = ", ".join(one.components) or one.summary
        lines.append(f"{one.name:<12}{summary if whole else textwrap.shorten(summary, 68, placeholder=' …')}")
        options = [
            f"{option} (needed)" if value == "needed" else f"{option}={value}" for option, value in one.options.items()
        ]
        if whole:
            lines += [f"  {option}" for option in options] or ["  no options"]
            lines += ["", *(f"  {line}".rstrip() for line in one.text.splitlines())]
        else:
            needed = [option for option, value in one.options.items() if value == "needed"]
            rest = len(options) - len(needed)
            words = [f"needs {', '.join(needed)}"] if needed else []
            words += [f"{rest} option{'s' * (rest != 1)} with defaults"] if rest else []
            lines.append(f"{'':<12}{'; '.join(words) or 'no options'}")
    if not whole:
        lines.append("`rushes rewards NAME` shows the options of one")
    return "\n".join(lines)


def _file_of(source: str, name: str) -> Path:
    """The source of a module; neither that nor the packages above it are imported."""
    if source.endswith(".py") or "/" in source:
        return Path(source)
    places: list[str] | None = [os.getcwd(), *sys.path]
    origin = None
    for number in range(len(parts := source.split("."))):
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), places)
        places = list(spec.submodule_search_locations or []) if spec else []
        origin = spec.origin if spec else None
    if not origin or not origin.endswith(".py"):
        raise UserError(f"reward {name!r}: there is no module {source} whose source can be read", "name its file")
    return Path(origin)


def _classes(file: Path, name: str) -> Iterator[ast.ClassDef]:
    """The class of that name in a file and the classes it inherits from, also where they come from other modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield node
            for base in node.bases:
                if isinstance(base, ast.Name):
                    yield from _classes(file, base.id)
            return
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module not in ("typing", "abc"):
                    yield from _classes(_file_of(node.module, name), alias.name)
                    return


def _attribute(node: ast.ClassDef, name: str) -> str | None:
    for one in node.body:
        if isinstance(one, ast.Assign):
            for target in one.targets:
                names = [target] if isinstance(target, ast.Name) else getattr(target, "elts", [])
                values = [one.value] if isinstance(target, ast.Name) else getattr(one.value, "elts", [])
                for found, value in zip(names, values, strict=False):
                    if isinstance(found, ast.Name) and found.id == name:
                        return ast.unparse(value)
    return None


def _names(text: str) -> list[str]:
    """A tuple of texts, where it is written out."""
    try:
        return [str(name) for name in ast.literal_eval(text)]
    except ValueError:
        return []


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)


def _defaults(function: ast.FunctionDef) -> dict[str, str]:
    arguments = [*function.args.posonlyargs, *function.args.args][1:]
    given = [ast.unparse(value) for value in function.args.defaults]
    values = ["needed"] * (len(arguments) - len(given)) + given
    found = {argument.arg: value for argument, value in zip(arguments, values, strict=True)}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        found[argument.arg] = "needed" if default is None else ast.unparse(default)
    return found
