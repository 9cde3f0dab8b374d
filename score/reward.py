"""What a reward is, and how a name in the configuration becomes one."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from shards.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENTRY_POINTS = "rushes.rewards"
RESERVED = {"key", "prompt_id", "sample", "reward", "status", "text", "group"}
BUILT_IN = {
    "ocr": "score.ocr:OCR",
    "videoalign": "score.videoalign:VideoAlign",
    "guards": "score.guards:Guards",
    "brightness": "score.guards:Brightness",
    "contrast": "score.guards:Contrast",
}


@dataclass(frozen=True)
class Video:
    """One sample to score: its frames [T, H, W, 3] uint8 RGB, and what was asked for."""

    key: str
    frames: NDArray[np.uint8]
    prompt: str
    target: str | None = None
    fps: float = 16.0
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What a reward says of one video: its components, or the reason why there are none.

    `text` is kept with the score (one string per frame that was read). `state` is not stored: it goes to `after_group`.
    """

    components: Mapping[str, float] = field(default_factory=dict)
    text: Sequence[str] | None = None
    reason: str = ""
    state: Any = None


@runtime_checkable
class Reward(Protocol):
    """A judge of videos. It sees pixels and prompts, never latents or weights.

    `components` names the numbers it gives; the first is the reward, the others can be weighted as `name.component`.
    `version` goes up whenever the same video would get another number. Optional: `neutral`, a class attribute with the
    names of options that change speed and not numbers; `keeps_text = True` when it gives `Scored.text`; a static method
    `after_group(list[Scored]) -> list[Scored]`, called with all samples of one prompt. An exception means that this
    video has no score; it is never turned into 0. A UserError means that nothing can be scored at all.
    """

    name: str
    version: str
    components: tuple[str, ...]

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        """One Scored a video, in the same order. The batch must not change the numbers."""
        ...


@dataclass(frozen=True)
class Chosen:
    """A reward picked by name with its options resolved; picklable, and no model is loaded before `build`."""

    name: str
    target: str
    version: str
    components: tuple[str, ...]
    options: Mapping[str, Any]
    neutral: tuple[str, ...] = ()
    keeps_text: bool = False

    @property
    def directory(self) -> str:
        """`<name>-<8 hex digits>`: the digits stand for version and options, so a changed reward has another one."""
        options = {key: value for key, value in self.options.items() if key not in self.neutral}
        identity = json.dumps([self.name, self.target, self.version, self.components, options], sort_keys=True)
        return f"{re.sub(r'[^A-Za-z0-9_]+', '-', self.name)}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def build(self) -> Reward:
        """The reward itself."""
        return cast(Reward, _class_of(self.name, self.target)(**self.options))

    def after_group(self, scored: list[Scored]) -> list[Scored]:
        """What the reward makes of all samples of one prompt together; most leave them as they are."""
        function = getattr(_class_of(self.name, self.target), "after_group", None)
        return list(function(scored)) if function else scored


def split_name(name: str) -> tuple[str, str]:
    """`videoalign.motion` -> ("videoalign", "motion"); `module.path:Class.motion` likewise; no component: ""."""
    module, colon, tail = name.partition(":")
    head, _, component = (tail if colon else module).partition(".")
    return (f"{module}:{head}" if colon else head), component


def choose(name: str, options: Mapping[str, Any] | None = None) -> Chosen:
    """Find a reward by its name here, `module:Class`, or an installed package's entry point. Raises UserError."""
    target = name if ":" in name else _registered(name)
    found = _class_of(name, target)
    components = getattr(found, "components", ())
    if not isinstance(getattr(found, "version", None), str) or not components or not callable(found):
        raise UserError(
            f"reward {name!r}: {target} is not a reward", "its class needs `version`, `components` and `__call__`"
        )
    taken = RESERVED & set(components)
    if taken:
        raise UserError(
            f"reward {name!r}: a component cannot be called {min(taken)!r}", "the score table has that column"
        )
    resolved = _resolve_options(name, found, dict(options or {}))
    neutral, keeps_text = tuple(getattr(found, "neutral", ())), bool(getattr(found, "keeps_text", False))
    return Chosen(name, target, found.version, tuple(components), resolved, neutral, keeps_text)


def known() -> dict[str, str]:
    """Every registered name and its `module:Class`; those of this package win."""
    installed = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return installed | BUILT_IN


def _registered(name: str) -> str:
    names = known()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no reward is called {name!r}", f"{hint}there are {', '.join(sorted(names))}; your own is `module:Class`"
        )
    return names[name]


def _class_of(name: str, target: str) -> Any:
    """The class behind `module:Class`. The current folder counts, since that is where one's own reward lies."""
    module_name, _, class_name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"reward {name!r}: cannot import {module_name}: {error}", "is it installed here?") from error
    if not hasattr(module, class_name):
        raise UserError(f"reward {name!r}: module {module_name} has no {class_name!r}", "write it as `module:Class`")
    return getattr(module, class_name)


def _resolve_options(name: str, found: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the defaults of the class filled in, so that the fingerprint sees them all."""
    parameters = {
        key: value for key, value in inspect.signature(found).parameters.items() if value.kind != value.VAR_KEYWORD
    }
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters) or 'none'}"
            raise UserError(f"reward {name!r} has no option {option!r}", hint)
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if missing:
        raise UserError(
            f"reward {name!r} needs the option {missing[0]!r}", f"set it under [score.options] as {name}.{missing[0]}"
        )
    return {key: options.get(key, value.default) for key, value in parameters.items()}
