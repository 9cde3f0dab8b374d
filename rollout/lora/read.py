"""A LoRA file of any form that diffusers loads, in the names of the diffusers model; what it would drop is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.utils import get_peft_kwargs
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rollout.lora.find import PEFT_WEIGHTS, LoraFile
from rollout.policy.folder import quiet_libraries, read_config
from shards.errors import UserError

PREFIX = "transformer."  # diffusers uses it in the files of both experts
NATIVE, MUSUBI = "diffusion_model.", "lora_unet_"
PEFT_PREFIX = "base_model.model."
METADATA = "lora_adapter_metadata"
LOADED = re.compile(r"transformer\..+\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?)")
MAGNITUDE = ".lora_magnitude_vector"
HEAD = "proj_out.lora_B.bias"  # what diffusers misses in head.head.diff without head.head.diff_b
MUSUBI_WANTS = (
    "diffusers wants attention, feed-forward and alpha of every block; convert_lora.py of musubi-tuner, with "
    "--target other, writes keys of which it takes any layers"
)
DROPPED = "take them out of the file, if you want what diffusers makes of it"


@dataclass(frozen=True)
class Lora:
    """A LoRA of one expert, in the names of the diffusers model."""

    path: Path
    state: dict[str, Tensor]
    """`blocks.0.attn1.to_q.lora_A.weight` and so on, in the dtype of the file; the strength alpha/rank of a native file
    is multiplied into lora_A."""
    config: LoraConfig
    """Of the file's metadata; without them, as diffusers infers it: alpha = rank."""
    plain: bool = True
    """Whether diffusers loads the file as it is."""

    @property
    def is_dora(self) -> bool:
        """Whether it also sets the magnitudes of the weights (DoRA)."""
        return any(MAGNITUDE in name for name in self.state)


def read_lora(file: LoraFile) -> Lora:
    """Read a LoRA as `WanPipeline.load_lora_weights` does, and a PEFT folder as peft does.

    Taken as well are `.lora_A.default.weight`, and names without a prefix, which diffusers would ignore. Raises
    UserError, naming keys, for a file that is damaged, that diffusers refuses, or of which it would drop something
    other than zeros.
    """
    found, header = _read(file.weights)
    names = [name for name in found if name.startswith(PEFT_PREFIX)]
    if names and file.config is None:
        problem = f"{file.weights}: keys of a PEFT folder ({names[0]}), but no adapter_config.json beside it"
        raise UserError(problem, f"alpha stands in it: put the two into one folder, the weights as {PEFT_WEIGHTS}")
    tensors = _prefixed({name.removeprefix(PEFT_PREFIX): value for name, value in found.items()})
    metadata = _peft_config(file.config) if file.config else _metadata(header, file.weights)
    state = convert(tensors, file.weights)
    plain = tensors.keys() == found.keys() and file.config is None
    return Lora(file.weights, state, _config(state, metadata, file.weights), plain)


def convert(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors under the names of the diffusers model, without a prefix. Raises UserError as `read_lora` does."""
    state = _converted(dict(tensors), path)
    lost = [name for name in _dropped(tensors, path) if bool(tensors[name].float().any())]
    if lost:
        raise UserError(f"{path}: diffusers drops {_some(lost)} without a word", DROPPED)
    unknown = [name for name in state if not LOADED.fullmatch(name)]
    if unknown:
        raise UserError(f"{path}: diffusers does not load {_some(unknown)} as LoRA of one expert", _advice(unknown))
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def _converted(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What diffusers makes of the names, its many errors turned into one sentence."""
    prefix = next((one for one in (NATIVE, MUSUBI) if any(name.startswith(one) for name in tensors)), "")
    form = {NATIVE: "ComfyUI", MUSUBI: "musubi"}.get(prefix, "diffusers")
    begin = f"{path}: diffusers cannot convert this file of {form} keys"
    try:
        with quiet_libraries():
            state: dict[str, Tensor] = WanPipeline.lora_state_dict(tensors)
    except KeyError as error:
        key = str(error.args[0])
        key = "head.head.diff_b" if key == HEAD else key
        hint = MUSUBI_WANTS if prefix == MUSUBI else "is it whole?"
        raise UserError(f"{begin}: it has no {prefix}{key}", hint) from None
    except IndexError:
        odd = [name for name in tensors if "blocks_" not in name]
        raise UserError(f"{begin}: it does not know {_some(odd or list(tensors))}", DROPPED) from None
    except (ValueError, RuntimeError, TypeError) as error:
        line = str(error).splitlines()[0]
        left = [prefix + name for name in re.findall(r"'([^']+)'", line) if prefix + name in tensors]
        if left:
            raise UserError(f"{begin}: it does not know {_some(left)}", DROPPED) from None
        why = f"it finds no blocks, but {_some(list(tensors))}" if line.startswith("min()") else line
        raise UserError(f"{begin}: {why}", "is it a LoRA of Wan?") from None
    return state


def _dropped(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """Keys whose tensors have no part in what diffusers makes of them.

    Found by converting numbered stand-ins of rank 1 and alpha 1, which are multiplied by 1 alone.
    """
    numbers = {name: float(number) for number, name in enumerate(tensors, start=2)}
    stand_ins = {name: _stand_in(name, number) for name, number in numbers.items()}
    arrived = {float(value.flatten()[0]) for value in _converted(stand_ins, path).values()}
    return [name for name, number in numbers.items() if number not in arrived and not name.endswith(".alpha")]


def _stand_in(name: str, number: float) -> Tensor:
    if name.endswith(".alpha"):
        return torch.tensor(1.0)
    return torch.full((1,) if name.endswith((".diff_b", ".bias")) else (1, 1), number, dtype=torch.float64)


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as diffusers wants them: without peft's name of an adapter, and with the prefix that belongs to them."""
    names = {name: re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name) for name in tensors}
    if all(name.startswith("blocks.") for name in names.values()):
        native = any(re.search(r"\.(self_attn|cross_attn|ffn\.[02])\.", name) for name in names.values())
        names = {old: (NATIVE if native else PREFIX) + new for old, new in names.items()}
    return {names[name]: value for name, value in tensors.items()}


def _config(state: dict[str, Tensor], metadata: dict[str, Any] | None, path: Path) -> LoraConfig:
    """The configuration that diffusers would make. Raises UserError when the metadata make none."""
    ranks = {f"^{name}": value.shape[1] for name, value in state.items() if ".lora_B." in name and value.ndim > 1}
    if not ranks:
        raise UserError(f"{path}: has no lora_B of any layer", "is it whole?")
    known = get_peft_kwargs(ranks, None, state) if metadata is None else metadata
    if known.get("modules_to_save"):
        problem = f"{path}: holds whole modules beside the LoRA ({', '.join(known['modules_to_save'])})"
        raise UserError(problem, "only LoRA is read")
    if known.get("init_lora_weights", True) not in (True, False, "gaussian"):
        known = {**known, "init_lora_weights": True}  # some ways to begin change the weights beneath
    layers = sorted({re.split(r"\.lora_", name)[0] for name in state})
    try:
        return LoraConfig(**{**known, "target_modules": known.get("target_modules") or layers})
    except (TypeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: its metadata are not a configuration of a LoRA: {line}", "save it anew") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{path}: a pointer of git-lfs, not the file itself", "fetch it: git lfs pull")
        with safe_open(path, framework="pt") as opened:
            header = dict(opened.metadata() or {})
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "is it still being written?") from None
    except (OSError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as LoRA weights: {line}", "the file is damaged or foreign") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensor", "is it whole?")
    return tensors, header


def _metadata(header: dict[str, str], path: Path) -> dict[str, Any] | None:
    """The configuration that diffusers wrote into the header, of a pipeline or of a model; None when there is none."""
    text = header.get(METADATA)
    if not text:
        return None
    try:
        values = json.loads(text)
        ours = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        return ours or dict(values)
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: its metadata are not a JSON object", "save it anew") from None


def _peft_config(path: Path) -> dict[str, Any]:
    """The configuration of a PEFT folder. UserError when it is not that of a LoRA."""
    kind = read_config(path, "save the adapter anew").get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: {kind}, not LoRA", "only LoRA is read")
    try:
        values: dict[str, Any] = LoraConfig.from_pretrained(str(path.parent)).to_dict()
    except (OSError, ValueError, TypeError, KeyError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: is not a configuration of a LoRA: {line}", "save the adapter anew") from None
    return values


def _some(names: list[str]) -> str:
    """A few names and the number of the others."""
    shown = ", ".join(names[:2])
    return f"{shown} and {len(names) - 2} more keys" if len(names) > 2 else shown


def _advice(names: list[str]) -> str:
    if any(name.startswith("transformer_2.") for name in names):
        return "the low-noise expert wants a file of its own, in the names of the first one: transformer."
    if any("lokr_" in name or "hada_" in name for name in names):
        return "LoKr and LoHa are not LoRA"
    return DROPPED
