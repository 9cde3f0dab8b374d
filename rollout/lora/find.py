"""Which file is the LoRA of which expert: files, folders, pairs, policy folders, URLs and the local hub cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.absolute_paths import NONE
from shards.errors import UserError
from shards.files import sha256_file
from shards.run import EXPERT_NAMES
from shards.store.fetch import fetched
from shards.store.files import of_policy

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# how the names of published pairs tell the two apart, the clearest way first; in lower case, words parted by signs
MARKS = (
    re.compile(r"(?<![a-z])(?:(?P<high>hi(?:gh)?)|(?P<low>low?))[-_. ]?noise"),
    re.compile(r"(?<![a-z])(?:(?P<high>high)|(?P<low>low))(?![a-z])"),
    re.compile(r"(?<![a-z0-9])(?:(?P<high>hn?)|(?P<low>ln?))(?![a-z0-9])"),
)


@dataclass(frozen=True)
class LoraFile:
    """The LoRA of one expert on disk."""

    weights: Path
    name: str
    """What fingerprints call it: its path in a policy folder, or EXPERT/FILE."""
    config: Path | None = None
    """adapter_config.json of a PEFT folder."""

    def hashes(self) -> dict[str, str]:
        """sha256 (hex) of its files, by the name in fingerprints."""
        found = {self.name: sha256_file(self.weights)}
        if self.config is not None:
            found[(Path(self.name).parent / PEFT_CONFIG).as_posix()] = sha256_file(self.config)
        return found


@dataclass(frozen=True)
class Start:
    """What a policy starts from, where that is not the base model alone: `model.lora`."""

    files: Mapping[int, LoraFile] | None
    """The LoRA of each expert, where one of two may have none; None for a folder of whole transformers."""
    folder: Path | None
    """Where they were found together."""


def find_lora(setting: str, text: str, second: str, experts: Sequence[int]) -> dict[int, LoraFile]:
    """The LoRA of each expert that has one, as `setting` (model.lora) names it, and `setting`_2 for the second expert.

    One file alone is for the high-noise expert of two, as in `WanPipeline.load_lora_weights`. Raises UserError, naming
    files, where nothing is there, and where it is not clear what is meant.
    """
    if not second:
        place = locate_lora(setting, text)
        return {0: _single(setting, place)} if len(experts) == 1 else _pair(setting, place)
    if len(experts) == 1:
        raise UserError(f"{setting}_2: {second}, but the model has one expert", f"name its LoRA in {setting} alone")
    named = {0: (setting, text), 1: (f"{setting}_2", second)}
    return {
        expert: _of_expert(_single(where, locate_lora(where, one), expert), expert)
        for expert, (where, one) in named.items()
        if one not in ("", NONE)
    }


def policy_files(folder: Path, experts: Sequence[int]) -> dict[int, LoraFile]:
    """The adapters of a policy folder, as training writes them. Raises UserError when one is missing."""
    found = {expert: folder / EXPERT_NAMES[expert] / WEIGHTS for expert in experts}
    if len(experts) == 1 and not (folder / EXPERT_NAMES[0]).is_dir() and (folder / WEIGHTS).is_file():
        found = {0: folder / WEIGHTS}
    for path in found.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file", "the policy folder is incomplete: train that iteration again")
    return {expert: LoraFile(path, path.relative_to(folder).as_posix()) for expert, path in found.items()}


def hashes_of(files: Mapping[int, LoraFile]) -> dict[str, str]:
    """sha256 (hex) of the files of all experts, by the names in fingerprints."""
    return {name: value for file in files.values() for name, value in file.hashes().items()}


def locate_lora(setting: str, text: str) -> Path:
    """The local file or folder that a setting names; what is at a URL is fetched.

    A name of the hub, `owner/name` or `owner/name/path/in/it`, is looked up in the local cache of the hub's client and
    never downloaded. Raises UserError when there is nothing.
    """
    stored = _fetched(setting, text)
    if stored is not None:
        return stored
    path = Path(text).expanduser()
    if path.exists():
        return path
    hint = "it takes a .safetensors file, a folder, a URL, or a name of the hub that is in the local cache"
    parts = text.strip("/").split("/")
    if len(parts) < 2 or text.startswith((".", "~", "/")):
        raise UserError(f"{setting}: {text}: no such file or folder", hint)
    cached = _cached("/".join(parts[:2]))
    if cached is None:
        owner = "/".join(parts[:2])
        hint = f"is it on the hub? `hf download {owner}` fetches it, or write hf://{text}"
        raise UserError(f"{setting}: {text}: no such file or folder, and not in the local cache of the hub", hint)
    path = cached.joinpath(*parts[2:])
    if not path.exists():
        raise UserError(f"{setting}: {text}: the local cache of the hub has no {path.name} there", f"look in {cached}")
    return path


def _fetched(setting: str, url: str) -> Path | None:
    """The local copy of what a URL names, of a PEFT file with its configuration; None for what is not a URL."""
    path = fetched(url, lambda name: name.endswith((".safetensors", ".json")) and of_policy(name))
    if path is not None and path.name == PEFT_WEIGHTS:
        fetched(f"{url.rpartition('/')[0]}/{PEFT_CONFIG}")
    if path is not None and not path.exists():
        raise UserError(f"{setting}: {url}: no such file or folder", "correct the URL")
    return path


def _cached(name: str) -> Path | None:
    """The newest snapshot of a hub repository in the local cache; None when it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _single(setting: str, place: Path, expert: int = 0) -> LoraFile:
    """The LoRA of one expert in a file or folder."""
    if not place.is_dir():
        if place.suffix != ".safetensors":
            raise UserError(f"{setting}: {place} is no .safetensors file", "pickled weights are not read: convert them")
        config = place.with_name(PEFT_CONFIG)
        beside = place.name == PEFT_WEIGHTS and config.is_file()
        return LoraFile(place, place.name, config if beside else None)
    if (place / EXPERT_NAMES[expert]).is_dir():
        return _of_expert(_single(setting, place / EXPERT_NAMES[expert]), expert)
    if (place / PEFT_CONFIG).is_file() and (place / PEFT_WEIGHTS).is_file():
        return LoraFile(place / PEFT_WEIGHTS, PEFT_WEIGHTS, place / PEFT_CONFIG)
    names = _names(setting, place)
    if WEIGHTS not in names and len(names) > 1:
        raise UserError(f"{setting}: {place} holds {', '.join(names)}: which one?", f"name the file in {setting}")
    name = WEIGHTS if WEIGHTS in names else names[0]
    return LoraFile(place / name, name)


def _pair(setting: str, place: Path) -> dict[int, LoraFile]:
    """The LoRA of each of two experts of a folder; of the high-noise one where there is only one file."""
    ways = (
        f"name the folder of a pair (high_noise/ and low_noise/, or files whose names say high and low), or the "
        f"high-noise file in {setting} and the low-noise file in {setting}_2; the same file twice is the same LoRA on "
        "both"
    )
    if not place.is_dir():
        return {0: _high(setting, _single(setting, place))}
    inner = [place / name for name in EXPERT_NAMES]
    if any(folder.is_dir() for folder in inner):
        for folder in inner:
            if not folder.is_dir():
                raise UserError(f"{setting}: {folder}: no such folder, but the model has two experts", ways)
        return {expert: _of_expert(_single(setting, folder), expert) for expert, folder in enumerate(inner)}
    if (place / PEFT_CONFIG).is_file():
        return {0: _high(setting, _single(setting, place))}
    names = _names(setting, place)
    if len(names) == 1:
        return {0: _high(setting, _single(setting, place))}
    sides = told_apart(names)
    if sides is None:
        raise UserError(f"{setting}: {place} holds {', '.join(names)}: which is of which expert?", ways)
    return {expert: LoraFile(place / name, f"{EXPERT_NAMES[expert]}/{name}") for expert, name in enumerate(sides)}


def _high(setting: str, file: LoraFile) -> LoraFile:
    """The one file given for two experts, for the first. UserError where its name says that it is the other's.

    A name without a word of its own, as training and peft give it, is that of its folder.
    """
    path = file.weights
    named = path.parent.name if path.name in (WEIGHTS, PEFT_WEIGHTS) else path.stem
    words = _words(named)
    if {match.lastgroup for match in MARKS[0].finditer(words)} == {"low"} or re.search(r"(?<![a-z])low$", words):
        raise UserError(
            f"{setting}: {path} is of the low-noise expert, by its name",
            f"name it in {setting}_2 instead; if it is of the high-noise expert, set {setting}_2 = {NONE}",
        )
    return _of_expert(file, 0)


def told_apart(names: Sequence[str]) -> tuple[str, str] | None:
    """(high-noise file, low-noise file) of two names that say so; None when they do not, or are not two.

    They say so by high_noise and low_noise, by HIGH and LOW, or by the letters H and L, with signs or capitals around.
    """
    words = {name: _words(Path(name).stem) for name in names}
    for mark in MARKS:
        sides = {name: {match.lastgroup for match in mark.finditer(text)} for name, text in words.items()}
        for high, low in ((names[0], names[-1]), (names[-1], names[0])):
            if len(names) == 2 and (sides[high], sides[low]) == ({"high"}, {"low"}):
                return high, low
    return None


def _words(name: str) -> str:
    """A name in lower case, its words apart."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _names(setting: str, folder: Path) -> list[str]:
    """The .safetensors files of a folder. UserError when there is none."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names:
        return names
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        problem = f"{setting}: {folder} holds {pickled[0]}, but no .safetensors file"
        raise UserError(problem, "pickled weights are not read: convert them")
    inner = sorted(path.parent for path in folder.glob("*/*.safetensors"))
    hint = f"{inner[0]} does: name it, or a file" if inner else f"{setting} takes a file, or the folder it lies in"
    raise UserError(f"{setting}: {folder} holds no .safetensors file", hint)


def _of_expert(file: LoraFile, expert: int) -> LoraFile:
    """The same, under the name it has in the fingerprint of two experts, or of a folder for each."""
    return LoraFile(file.weights, f"{EXPERT_NAMES[expert]}/{Path(file.name).name}", file.config)
