"""A VideoReward checkpoint on disk: where it is, which step of it, and what its configuration says.

Source: the reference's `utils.py` and `inference.py` (KwaiVGI/VideoAlign, git 219ab9d).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError

CONFIG = "model_config.json"
AGAIN = "fetch or copy the checkpoint again"
DIMENSIONS = ("VQ", "MQ", "TA")
ConfigSection = Mapping[str, Any]
"""A section of model_config.json, as VideoAlign's own dataclasses name its fields."""


@dataclass(frozen=True)
class Checkpoint:
    """One step of a checkpoint folder and what its `model_config.json` asks for."""

    config_file: Path
    folder: Path
    """checkpoint-STEP."""
    data: ConfigSection
    model: ConfigSection
    lora: ConfigSection
    norm: Mapping[str, tuple[float, float]]
    """Mean and standard deviation by dimension; empty when the configuration states none."""

    @property
    def output_dim(self) -> int:
        """Columns of the head: 1 (the release: one vector for all three scores) or 3."""
        return int(self.model.get("output_dim", 1))

    @property
    def lora_scale(self) -> float:
        """Factor of B @ A in a merged weight: alpha / r, or alpha / sqrt(r) with rslora."""
        rank = self.lora["lora_r"]
        return float(self.lora["lora_alpha"]) / float(rank**0.5 if self.lora.get("use_rslora") else rank)


def find_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: its root, the folder the root was cloned into, or one checkpoint-STEP itself.

    `step` None or -1 takes the newest. Raises UserError for a missing or foreign folder, an unknown step, or a
    configuration this reader does not cover.
    """
    place = Path(path)
    full = place.absolute()  # links are not followed: a download may be made of them
    named = re.fullmatch(r"checkpoint-(\d+)", full.name)
    step = None if step == -1 else step
    if named and place.is_dir() and not (place / CONFIG).is_file():
        if step not in (None, int(named[1])):
            raise UserError(f"step {step} was asked for, but checkpoint {place} is step {named[1]}", "drop `step`")
        above = (folder for folder in full.parents if (folder / CONFIG).is_file())
        folder, root = place, next(above, None) or _root(place)
    else:
        root = _root(place)
        folder = _step_folder(root, step)
    data, model, lora, norm = _read_config(root / CONFIG)
    return Checkpoint(root / CONFIG, folder, data, model, lora, norm)


def _root(place: Path) -> Path:
    """The folder with model_config.json: `place`, or the only one right below it."""
    if (place / CONFIG).is_file():
        return place
    below = sorted(file.parent for file in place.glob(f"*/{CONFIG}")) if place.is_dir() else []
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(folder.name for folder in below)
        raise UserError(f"checkpoint {place} holds several checkpoints: {names}", "give the path of one of them")
    raise UserError(
        f"no {CONFIG} in checkpoint folder {place}", "give `checkpoint` the folder of a VideoReward download"
    )


def _step_folder(root: Path, step: int | None) -> Path:
    """checkpoint-STEP, or the one with the largest number."""
    found = {int(m[1]): f for f in root.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", f.name))}
    if not found:
        raise UserError(f"no checkpoint-STEP folder in {root}", AGAIN)
    if step is not None and step not in found:
        steps = ", ".join(str(number) for number in sorted(found))
        raise UserError(f"checkpoint {root} has no step {step}", f"it has {steps}; leave `step` out for the newest")
    return found[max(found) if step is None else step]


def _read_config(
    file: Path,
) -> tuple[ConfigSection, ConfigSection, ConfigSection, dict[str, tuple[float, float]]]:
    """The sections of model_config.json that matter, checked. `inference_config` is the release's, and optional."""
    try:
        content = json.loads(file.read_text())
        data, model, lora = (dict(content[key]) for key in ("data_config", "model_config", "peft_lora_config"))
        constants = content.get("inference_config") or {}
        norm = {d: (float(constants[f"{d}_mean"]), float(constants[f"{d}_std"])) for d in DIMENSIONS if constants}
        if lora.get("lora_enable"):
            float(lora["lora_r"]), float(lora["lora_alpha"])
        data["max_frame_pixels"] = int(data["max_frame_pixels"])
    except KeyError as error:
        raise UserError(f"{file} has no {error}", AGAIN) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}", AGAIN) from None
    _refuse_unknown(file, data, model)
    return data, model, lora, norm


def _refuse_unknown(file: Path, data: ConfigSection, model: ConfigSection) -> None:
    """UserError for a head, a pooling, a template or a sampling that no released checkpoint has."""
    known: list[tuple[ConfigSection, str, object, tuple[object, ...]]] = [
        (model, "output_dim", 1, (1, 3)),
        (model, "use_special_tokens", False, (True,)),
        (model, "reward_token", "special", ("special",)),
        (model, "load_in_8bit", False, (False, None)),
        (model, "load_in_4bit", False, (False, None)),
        (data, "prompt_template_type", "none", ("detailed_special",)),
        (data, "sample_type", "uniform", ("uniform",)),
    ]
    for section, key, default, accepted in known:
        value = section.get(key, default)
        if value not in accepted:
            wanted = " or ".join(str(choice) for choice in accepted if choice is not None)
            raise UserError(
                f"{file}: {key} is {value!r}, only {wanted} is known", "use a released VideoReward checkpoint"
            )
