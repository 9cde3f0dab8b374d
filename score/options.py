"""Options of a reward as its own annotations want them, whether they came from run.toml or from a command line."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from shards.errors import UserError, nearest
from shards.process.machine import place

if TYPE_CHECKING:
    import torch

TEXTS = list[str]
WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    TEXTS: "a list of texts",
    str: "text",
}


def resolve(name: str, found: Any, options: Mapping[str, object]) -> dict[str, object]:
    """Options of the reward `found`, checked, with its defaults filled in, so that the fingerprint sees them all.

    Raises UserError for an option it does not have (with the nearest name), one that is needed, or a wrong type.
    """
    parameters = {
        key: value for key, value in inspect.signature(found).parameters.items() if value.kind != value.VAR_KEYWORD
    }
    for option in options:
        if option not in parameters:
            near = nearest(option, parameters)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(parameters) or 'none'}"
            raise UserError(f"reward {name!r} has no option {option!r}", hint)
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if missing:
        raise UserError(
            f"reward {name!r} needs the option {missing[0]!r}", f"set it under [score.options] as {name}.{missing[0]}"
        )
    hints = _annotations(found)
    return {
        key: _converted(name, key, options[key], hints.get(key, object)) if key in options else value.default
        for key, value in parameters.items()
    }


def device_named(name: str) -> torch.device:
    """The device that the option `device` of a reward names; `auto` is cuda when there is one. Raises UserError.

    Of several GPUs a process takes the one of its place on this machine, and makes it the current one; rewards are
    small, so that processes may share one.
    """
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and device.index is None and (found := place()):
            device = torch.device("cuda", found.index % max(1, torch.cuda.device_count()))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()  # the name alone asks no hardware
    except (RuntimeError, AssertionError, NotImplementedError):
        hint = "give the reward auto, cpu, cuda or cuda:N for `device`"
        raise UserError(f"there is no device {name!r} here", hint) from None
    return device


def _annotations(found: Any) -> dict[str, object]:
    """Types by option; empty where they cannot be known, as for names that exist only while type checking."""
    is_class = isinstance(found, type)
    try:
        return get_type_hints(found.__init__ if is_class else found)
    except (NameError, TypeError, AttributeError):
        return {}


def _converted(name: str, option: str, value: object, annotation: object) -> object:
    """`value` as one of the annotated types; what is annotated otherwise is passed on as it is."""
    plain = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if value is None and type(None) in plain:
        return None
    kinds = [kind for kind in plain if kind is not type(None)]
    if not all(kind in WANTED for kind in kinds):
        return value
    for kind in sorted(kinds, key=list(WANTED).index):  # text last: everything typed on a command line is text
        try:
            return _as(kind, value)
        except ValueError:
            continue
    wanted = " or ".join(WANTED[kind] for kind in kinds)
    raise UserError(
        f"reward {name!r}: option {option!r} is {value!r}, not {wanted}", f"write {option} = {_example(kinds[0])}"
    )


def _as(kind: type, value: object) -> object:
    """`value`, or the text of one, as a `kind`. Raises ValueError."""
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, str):
        return value
    if kind == TEXTS:  # on a command line separated by commas
        texts = [text.strip() for text in value.split(",")] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) and text for text in texts):
            return list(texts)
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and (kind is float or number == int(number)):
            return kind(value) if isinstance(value, str) and kind is float else kind(number)
    raise ValueError(value)


def _example(kind: type) -> str:
    return {bool: "true", int: "4", float: "0.5", TEXTS: '["a text", "another"]', str: '"a text"'}[kind]
