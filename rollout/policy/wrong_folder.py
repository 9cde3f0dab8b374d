"""What lies at a path that is not a model folder in WanPipeline layout: official checkpoints, single files, parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shards.errors import UserError
from shards.pointers import refuse_pointer
from shards.process.progress import counted

WANTED = "model.path is a folder in WanPipeline layout, with model_index.json, transformer, text encoder and VAE"
STEMS = {"text_encoder": "model"}  # beginnings of the names of weights; of all other parts that of diffusers
STEM = "diffusion_pytorch_model"
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".sft", ".gguf", *PICKLED)
SHOWN = 4  # names of files in a message

_NAME = re.compile(r"Wan2\.\d-[A-Za-z0-9]+-[A-Za-z0-9.]*B(?:-\d+P)?")
_PREFIX = re.compile(r"^(model\.diffusion_model|diffusion_model|model)\.")
_KINDS = (  # a tensor that tells what a file is; the first that is there counts
    (r"(^|[._])lora_|\.diff(_b)?$", "a LoRA"),
    (
        r"^blocks\.0\.self_attn\.q\.weight$",
        "the transformer of a Wan model as ComfyUI and Wan's own code have it",
    ),
    (r"^blocks\.0\.attn1\.to_q\.weight$", "the transformer of a Wan model alone"),
    (r"^(token_embedding|shared|encoder\.embed_tokens)\.weight$", "a text encoder"),
    (r"^(decoder\.conv1|decoder\.conv_in)\.", "a VAE"),
)


def not_a_folder(path: Path) -> UserError:
    """What to say of a file that `model.path` names. Raises UserError for a Git LFS pointer."""
    refuse_pointer(path)
    kind = "pickled weights" if path.suffix.lower() in PICKLED else f"of type {path.suffix or 'unknown'}"
    if path.suffix.lower() in (".safetensors", ".sft"):
        kind = _kind_of(path)
    elif path.suffix.lower() == ".gguf":
        kind = "quantised weights (GGUF)"
    if kind == "a LoRA":
        return UserError(f"{path}: a LoRA, not a model folder", "name it in model.lora, and its base in model.path")
    return UserError(f"{path}: a single file, {kind}, not a model folder", f"{WANTED}: {_release(path)}")


def not_a_pipeline(folder: Path) -> UserError:
    """What to say of a folder without model_index.json: what it holds, and what is wanted."""
    official = [path.name for path in sorted(folder.iterdir()) if _is_official(path)]
    if official:
        problem = f"{folder}: a checkpoint of Wan's official code ({_some(official)}), not of diffusers"
        return UserError(problem, f"take the release whose name ends in -Diffusers: {_release(folder)}")
    inside = [*folder.glob("*/model_index.json"), *folder.glob("snapshots/*/model_index.json")]
    if inside:
        hint = f"name the folder with model_index.json: {inside[0].parent}"
        return UserError(f"{folder}: holds a model folder, but is none itself", hint)
    if list(folder.glob("pytorch_lora_weights*.safetensors")) or (folder / "adapter_config.json").is_file():
        return UserError(f"{folder}: a LoRA, not a model folder", "name it in model.lora, and its base in model.path")
    if kind := _class_of(folder / "config.json"):
        where = folder.parent if (folder.parent / "model_index.json").is_file() else "the one above it"
        return UserError(f"{folder}: a {kind} alone, one part of a model", f"name the folder of the whole: {where}")
    weights = [
        path.relative_to(folder).as_posix()
        for path in sorted((*folder.iterdir(), *folder.glob("*/*")))
        if path.suffix.lower() in WEIGHTS
    ]
    if weights:
        problem = f"{folder}: holds single files of weights ({_some(weights)}), but no model_index.json"
        return UserError(problem, f"{WANTED}: {_release(folder)}")
    names = _some([path.name for path in sorted(folder.iterdir())])
    hint = f"the folder holds {names}" if names else "the folder is empty"
    return UserError(
        f"{folder}/model_index.json: no such file", f"{hint}; a Wan model folder is made by WanPipeline.save_pretrained"
    )


def check_names(folder: Path) -> None:
    """UserError unless a part of a model has weights under the name that diffusers and transformers load.

    Files of a variant (`….fp16.safetensors`), pickled ones and those of other names are distinguished.
    """
    stem = STEMS.get(folder.name, STEM)
    wanted = f"{stem}.safetensors"
    if (folder / wanted).is_file() or (folder / f"{wanted}.index.json").is_file():
        return
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in WEIGHTS)
    found = [name for name in names if name.endswith(".safetensors")]
    variants = {match[1] for name in found if (match := re.fullmatch(rf"{stem}\.(\w+?)(-\d+-of-\d+)?\.\w+", name))}
    if variants:
        problem = f"{folder}: has only the variant {_some(sorted(variants))} of its weights ({_some(found)})"
        hint = "fetch the files without that word in their names, or save the model again without `variant`"
        raise UserError(f"{problem}, not {wanted}", hint)
    if found:
        problem = f"{folder}: holds {_some(found)}, but neither {wanted} nor its index"
        raise UserError(problem, "copy or fetch the whole model folder; its files keep their names")
    pickled = f" but {_some(names)}" if names else ""
    hint = "copy or fetch the whole model folder; weights are safetensors, never pickled"
    raise UserError(f"{folder}: holds no weights{pickled}", hint)


def refuse_pointers(folder: Path, suffixes: Sequence[str]) -> None:
    """UserError when a file of a part of a model is a Git LFS pointer."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and path.is_file():
            refuse_pointer(path)


def _is_official(path: Path) -> bool:
    """Whether a file or folder is one of those in Wan's own releases."""
    if path.is_dir():
        return path.name in ("high_noise_model", "low_noise_model")
    if path.name == "config.json":
        return _class_of(path).startswith("WanModel")
    return re.fullmatch(r"models_t5_.*\.pth|Wan2\.\d_VAE\.pth", path.name) is not None


def _class_of(path: Path) -> str:
    """The class that a config.json names; "" where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(values.get("_class_name") or "") if isinstance(values, dict) else ""


def _kind_of(path: Path) -> str:
    """What the names of the tensors in a file say it is."""
    try:
        with safe_open(path, framework="np") as opened:
            names = {_PREFIX.sub("", name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return "damaged or cut off"
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"with {counted(len(names), 'tensor')}"


def _release(path: Path) -> str:
    """The command that fetches a release this program can take: that of the same name, if the path tells."""
    name = next(reversed(_NAME.findall(str(path))), "Wan2.2-T2V-A14B")
    return f"hf download Wan-AI/{name}-Diffusers"


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
