"""What a reward is, and how a name in the configuration becomes one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from score.options import resolve
from shards.absolute_paths import class_file
from shards.errors import UserError, nearest
from shards.files import sha256_file
from shards.settings.own_class import in_package, is_file, load_class
from shards.store.fetch import local_name

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
    "clip": "score.clip:CLIP",
    "pickscore": "score.pickscore:PickScore",
    "aesthetic": "score.aesthetic:Aesthetic",
    "motion": "score.motion:Motion",
    "remote": "score.remote:Remote",
}
LIBRARIES = {"ocr": ("score.ocr.reading", "easyocr")}
"""Modules that a reward imports when it is built; of the others the module of its class does."""


def modules_of(rewards: Iterable[str]) -> list[str]:
    """What processes that score by these rewards import, as far as the rewards are built in."""
    names = [reward.partition(".")[0] for reward in rewards]
    found = [LIBRARIES.get(name, (BUILT_IN[name].partition(":")[0],)) for name in names if name in BUILT_IN]
    return list(dict.fromkeys(module for modules in found for module in modules))


@dataclass(frozen=True)
class Video:
    """One sample to score: its frames [T, H, W, 3] uint8 RGB, and what was asked for."""

    key: str
    frames: NDArray[np.uint8]
    prompt: str
    target: str | None = None
    fps: float = 16.0
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What a reward says of one video: its components, or the reason why there are none.

    `frames` are the numbers of the frames looked at (None: all). `text` is kept with the score, one string per frame
    looked at, and so is `confidence`, in [0, 1], when it is given. `state` is not stored: it goes to `after_group`.
    """

    components: Mapping[str, float] = field(default_factory=dict)
    text: Sequence[str] | None = None
    reason: str = ""
    state: Any = None
    confidence: Sequence[float] | None = None
    frames: Sequence[int] | None = None

    def readings(self) -> list[Any] | None:
        """The text, one item per frame looked at: `{"frame", "text", "confidence"}`, or the bare string."""
        if self.text is None or self.confidence is None:
            return None if self.text is None else list(self.text)
        numbers = range(len(self.text)) if self.frames is None else self.frames
        return [
            {"frame": int(number), "text": text, "confidence": round(float(confidence), 4)}  # JSON takes no numpy
            for number, text, confidence in zip(numbers, self.text, self.confidence, strict=True)
        ]


@runtime_checkable
class Reward(Protocol):
    """A judge of videos. It sees pixels and prompts, never latents or weights.

    `components` names the numbers it gives; the first is the reward, the others can be weighted as `name.component`.
    `version` goes up whenever the same video would get another number. Optional: `neutral`, a class attribute with the
    names of options that change speed and not numbers; `keeps_text = True` when it gives `Scored.text`; a static method
    `after_group(list[Scored]) -> list[Scored]`, called with all samples of one prompt; a static method
    `identity(options) -> {option: digest}`, the content of files that options name, which then counts instead of their
    paths; a static method `components_for(options)` for names that depend on options; static methods
    `check_options(options)`, which raises UserError for values that cannot be, before anything is sampled, and
    `check_files(options)`, which raises it for files that are not there; a static method
    `unscorable(options, prompt, target)`, a UserError that says why no video of a prompt can have a score, None where
    one can. An exception means that this video has no score; it is never turned into 0. A UserError means that nothing
    can be scored at all.
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
    options: Mapping[str, object]
    neutral: tuple[str, ...] = ()
    keeps_text: bool = False
    content: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files that options name, by option."""
    source: str = ""
    """sha256 of the file of a reward of one's own; "" for one that is installed, whose version counts."""

    @property
    def stem(self) -> str:
        """The name as the first part of a directory."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", module_name(self.name))

    @property
    def directory(self) -> str:
        """`<stem>-<8 hex digits>`: the digits stand for source, version and options, so that scores of a reward that
        was changed lie elsewhere."""
        options = {key: self.content.get(key, value) for key, value in self.options.items() if key not in self.neutral}
        name, target = module_name(self.name), module_name(self.target)  # wherever the file lies
        parts = [name, target, self.version, self.components, options, *([self.source] if self.source else [])]
        identity = json.dumps(parts, sort_keys=True)
        return f"{self.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def build(self) -> Reward:
        """The reward itself."""
        return cast(Reward, load_class(f"reward {self.name!r}", self.target)(**_here(self.options)))

    def check_files(self) -> None:
        """UserError when a file is not there that the reward needs; it is not loaded."""
        function = getattr(load_class(f"reward {self.name!r}", self.target), "check_files", None)
        if function:
            function(_here(self.options))

    def unscorable(self, prompt: str, target: str | None) -> UserError | None:
        """Why no video of a prompt can have a score; None where one can, as far as the prompt tells."""
        function = getattr(load_class(f"reward {self.name!r}", self.target), "unscorable", None)
        return cast(UserError | None, function(_here(self.options), prompt, target)) if function else None

    def after_group(self, scored: list[Scored]) -> list[Scored]:
        """What the reward makes of all samples of one prompt together; most leave them as they are."""
        function = getattr(load_class(f"reward {self.name!r}", self.target), "after_group", None)
        return list(function(scored)) if function else scored


def module_name(name: str) -> str:
    """`/home/me/colour.py:Colourful` -> `colour:Colourful`, which names the same reward; other names as they are."""
    path, colon, rest = name.partition(":")
    return f"{in_package(Path(path))[1]}:{rest}" if colon and is_file(path) else name


def split_name(name: str) -> tuple[str, str]:
    """`videoalign.motion` -> ("videoalign", "motion"); `module.path:Class.motion` likewise; no component: ""."""
    module, colon, tail = name.partition(":")
    head, _, component = (tail if colon else module).partition(".")
    return (f"{module}:{head}" if colon else head), component


def choose(name: str, options: Mapping[str, object] | None = None, content: bool = True) -> Chosen:
    """Find a reward by its name here, `module:Class`, `/path/file.py:Class`, or an installed package's entry point.

    Without `content` the files that options name are not looked at, for a check where they need not be; the fingerprint
    of the result is not that of its scores then. Raises UserError.
    """
    target = name if ":" in name else _registered(name)
    found = load_class(f"reward {name!r}", target)
    components = tuple(getattr(found, "components", ()))
    if not isinstance(getattr(found, "version", None), str) or not components or not callable(found):
        raise UserError(
            f"reward {name!r}: {target} is not a reward", "its class needs `version`, `components` and `__call__`"
        )
    resolved = resolve(name, found, options or {})
    if hasattr(found, "components_for"):
        components = tuple(found.components_for(resolved))
    taken = RESERVED & set(components)
    if taken:
        raise UserError(
            f"reward {name!r}: a component cannot be called {min(taken)!r}", "the score table has that column"
        )
    if hasattr(found, "check_options"):
        found.check_options(resolved)
    neutral, keeps_text = tuple(getattr(found, "neutral", ())), bool(getattr(found, "keeps_text", False))
    digests = dict(found.identity(_here(resolved))) if content and hasattr(found, "identity") else {}
    file = class_file(name)  # None for a registered name, even where its package lies in the current directory
    source = sha256_file(file) if file else ""
    return Chosen(name, target, found.version, components, resolved, neutral, keeps_text, digests, source)


def known() -> dict[str, str]:
    """Every registered name and its `module:Class`; those of this package win."""
    installed = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return installed | BUILT_IN


def _here(options: Mapping[str, object]) -> dict[str, object]:
    """Options with the local copies of files and folders in place of their URLs in a store."""
    return {name: local_name(value) if isinstance(value, str) else value for name, value in options.items()}


def _registered(name: str) -> str:
    names = known()
    if name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(
            f"no reward is called {name!r}", f"{hint}there are {', '.join(sorted(names))}; your own is `module:Class`"
        )
    return names[name]
