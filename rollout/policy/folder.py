"""A Wan model folder as diffusers saves it: its layout, its parts, its fingerprint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from rollout.policy.wrong_folder import check_names, not_a_folder, not_a_pipeline, refuse_pointers
from rollout.words.paths import words_folder
from shards.errors import RunFailed, UserError
from shards.files import canonical_sha256
from shards.pointers import refuse_pointer
from shards.store.fetch import fetched_model
from shards.store.hashes import sha256_once

EXPERT_FOLDERS = ("transformer", "transformer_2")  # of the high-noise expert, of the low-noise one
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
CONFIGURATIONS = (".json", ".model", ".txt")  # the files of a tokenizer among them
FINGERPRINTED = (".json", ".safetensors", ".model", ".txt")
T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SchedulerConfig(TypedDict, total=False):
    """scheduler_config.json, which also holds what else its scheduler takes."""

    num_train_timesteps: int


@dataclass(frozen=True)
class Layout:
    """What the files of a folder say about a model; nothing about Wan's variants is written down in this program.

    `boundary` is a share of the training timesteps (0.875: the high-noise expert takes t >= 875), None for one expert.
    `patch` is (frames, height, width) in latent pixels. `takes_image`: "never", "may" (TI2V) or "must" (I2V).
    """

    folder: Path
    parts: tuple[str, ...]
    boundary: float | None
    expand_timesteps: bool
    takes_image: str
    channels: int
    patch: tuple[int, int, int]
    rope_length: int
    temporal_scale: int
    spatial_scale: int
    scheduler_config: SchedulerConfig

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Numbers of the experts: 0, and with two of them 1, the low-noise one."""
        return (0,) if self.boundary is None else (0, 1)

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a video of that size in pixels and frames."""
        steps = (frames - 1) // self.temporal_scale + 1
        return self.channels, steps, height // self.spatial_scale, width // self.spatial_scale

    def tokens(self, height: int, width: int, frames: int) -> int:
        """Tokens of a video of that size: its latents cut into patches."""
        return tokens(self.latent_shape(height, width, frames), self.patch)

    def check_shape(self, height: int, width: int, frames: int) -> None:
        """Raise UserError for a size the model cannot make, naming the nearest it can."""
        for name, value, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = self.spatial_scale * patch
            if value % unit:
                near = max(unit, round(value / unit) * unit)
                raise UserError(f"rollout.{name} = {value}: not a multiple of {unit}", f"the nearest is {near}")
        if (frames - 1) % self.temporal_scale:
            near = round((frames - 1) / self.temporal_scale) * self.temporal_scale + 1
            raise UserError(f"rollout.frames = {frames}: not {self.temporal_scale}k+1", f"the nearest is {near}")
        sizes = zip(self.latent_shape(height, width, frames)[1:], self.patch, strict=True)
        if max(size // patch for size, patch in sizes) > self.rope_length:
            raise UserError(f"{height}x{width}, {frames} frames: beyond the model's positions", "make it smaller")


def tokens(latents: tuple[int, int, int, int], patch: Sequence[int]) -> int:
    """Tokens of latents (C, F, H, W) cut into patches (frames, height, width)."""
    return prod(size // unit for size, unit in zip(latents[1:], patch, strict=True))


def find_folder(path: str, *, weights: bool = True) -> Path:
    """The local folder of a model: the embedded `words`, a path, or the local copy of a URL or a hub repository.

    Without `weights` only the configurations of a repository are fetched, and so from one that holds no pipeline.
    Raises UserError when there is no such folder, or a file.
    """
    stored = _fetched(lambda suffixes: fetched_model(path, lambda name: name.endswith(suffixes)), weights)
    if stored is not None:
        return stored
    folder = words_folder() / "model" if path == "words" else Path(path).expanduser()
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        folder = _fetched(lambda suffixes: _download(path, suffixes), weights) or folder
    if folder.is_file():
        raise not_a_folder(folder)
    if not folder.is_dir():
        hint = "model.path is a folder in WanPipeline layout, a hub id, or `words`"
        hint += "" if folder.is_absolute() else f"; relative, it counts from {Path.cwd()}"
        raise UserError(f"{path}: no such model folder", hint)
    return folder


def read_layout(folder: Path, *, weights: bool = True) -> Layout:
    """Read `model_index.json` and the configurations beside it; without `weights` they need not be there.

    Raises UserError for a folder that holds no Wan pipeline, or one of a layout this program cannot sample.
    """
    if not (folder / "model_index.json").is_file():
        raise not_a_pipeline(folder)
    index = read_config(folder / "model_index.json", "a Wan model folder is made by WanPipeline.save_pretrained")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        known = " and ".join(PIPELINES)
        raise UserError(f"{folder}/model_index.json: a {kind}, not a Wan pipeline", f"rushes samples {known}")
    parts = tuple(name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None)
    for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer"):
        if name not in parts or (weights and not (folder / name).is_dir()):
            raise UserError(f"{folder}: the part {name!r} is missing", "save the whole pipeline with save_pretrained")
    for name in parts:
        refuse_pointers(folder / name, FINGERPRINTED)
    for name in ("text_encoder", "vae", "transformer", "transformer_2"):
        if weights and name in parts:
            _check_weights(folder / name)
    if "image_encoder" in parts:
        raise UserError(f"{folder}: has an image encoder (Wan2.1 image-to-video)", "Wan2.2 image-to-video needs none")
    transformer = read_config(folder / "transformer" / "config.json", "save the transformer with save_pretrained")
    vae = read_config(folder / "vae" / "config.json", "save the VAE with save_pretrained")
    return Layout(
        folder=folder,
        parts=parts,
        boundary=_boundary(folder, index, parts),
        expand_timesteps=bool(index.get("expand_timesteps", False)),
        takes_image=_takes_image(folder, index, transformer, vae),
        channels=int(transformer["out_channels"]),
        patch=tuple(transformer["patch_size"]),
        rope_length=int(transformer.get("rope_max_seq_len", 1024)),
        temporal_scale=int(vae.get("scale_factor_temporal", 4)),
        spatial_scale=int(vae.get("scale_factor_spatial", 8)),
        scheduler_config=read_part(
            SchedulerConfig, folder / "scheduler", "save the scheduler too", "scheduler_config.json"
        ),
    )


def load_transformer(
    layout: Layout, expert: int, dtype: str, device: torch.device, folder: Path | None = None
) -> nn.Module:
    """One expert in host memory, frozen, in eval mode: the base model's, or the trained one in `folder`.

    The dtype is given to `from_pretrained` and never changed afterwards: diffusers keeps the time embedder, the norms
    and the rotary table in fp32, and `.to(dtype)` would not.
    """
    source = layout.folder / EXPERT_FOLDERS[expert] if folder is None else folder
    return _rest(_load_model(WanTransformer3DModel, source, torch_dtype=DTYPES[dtype]), device)


def load_vae(layout: Layout, device: torch.device) -> AutoencoderKLWan:
    """The VAE in host memory, fp32 whatever the transformers are (Wan's model cards load it so)."""
    return _rest(_load_model(AutoencoderKLWan, layout.folder / "vae", torch_dtype=torch.float32), device)


def load_text(layout: Layout, dtype: str, device: torch.device) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    """Tokenizer and text encoder in host memory.

    Raises RunFailed when the token embeddings came out zero or untied: some versions of transformers load Wan's encoder
    so, without a word, and no video follows its prompt then.
    """
    transformers_logging.disable_progress_bar()  # the stage has its own
    tokenizer = load_text_tokenizer(layout.folder)
    encoder = _rest(_load_model(UMT5EncoderModel, layout.folder / "text_encoder", dtype=DTYPES[dtype]), device)
    table = encoder.get_input_embeddings().weight
    if not bool(table.any()) or table.data_ptr() != encoder.shared.weight.data_ptr():
        raise RunFailed(f"{layout.folder}/text_encoder: the token embeddings were not loaded", "upgrade transformers")
    return tokenizer, encoder


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. UserError where its files are missing or damaged."""
    return _load(AutoTokenizer, folder / "tokenizer")


def fingerprint_folder(layout: Layout) -> str:
    """sha256 over the names and sha256 of every weight and configuration file of the parts in use."""
    files = [layout.folder / "model_index.json"]
    for part in layout.parts:
        files += [path for path in sorted((layout.folder / part).rglob("*")) if path.suffix in FINGERPRINTED]
    return canonical_sha256({path.relative_to(layout.folder).as_posix(): sha256_once(path) for path in files})


def _rest(model: Network, device: torch.device) -> Network:
    """A model frozen and in eval mode; on a CPU with its weights in memory of its own.

    Tensors of a memory-mapped or buffered file begin at any multiple of 8 bytes, and CPU matrix products take another
    path for each alignment: two loads of the same file differ by 1e-6. Fresh tensors are always aligned to 64 bytes.
    On a GPU the mapped pages stay as they are, shared by all processes of a machine.
    """
    if device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


def _load_model(kind: type[Network], folder: Path, **options: object) -> Network:
    """`_load` of a network. UserError where its files lack a weight, which the libraries draw at random with a log.

    Nor may transformer and VAE have others than their class computes with; those of a text decoder do no harm.
    """
    with quiet_libraries():
        model, found = _load(kind, folder, output_loading_info=True, **options)
    wrong = {"its files have no": found["missing_keys"]}
    if kind is not UMT5EncoderModel:
        wrong[f"a {kind.__name__} has no"] = found["unexpected_keys"]
    for problem, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
            hint = "files and config.json do not belong together; copy or fetch the whole model folder"
            raise UserError(f"{folder}: {problem} {min(names)}{more}", hint)
    return model


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep back the reports of diffusers and transformers on what they did not find; we look for ourselves."""
    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)


def _load(kind: Any, folder: Path, **options: object) -> Any:
    """`from_pretrained` from local files only, its many errors turned into one sentence."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"{folder}: cannot be loaded as {kind.__name__}: {line}"
        raise UserError(problem, "the folder is damaged or foreign") from error


def read_config(path: Path, hint: str) -> dict[str, Any]:
    """One configuration file; UserError when it is missing, a Git LFS pointer or not a JSON object."""
    refuse_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}", hint) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object", hint)
    return values


def read_part(kind: type[T], folder: Path, hint: str, name: str = "config.json") -> T:
    """The configuration of a part, whose fields are those of `kind`. Raises as `read_config`."""
    return cast(T, read_config(folder / name, hint))


def _check_weights(folder: Path) -> None:
    """UserError when a part of the model has no weights under the names that are loaded, lacks one of the files its
    index names, or has one cut off.

    Only the beginning of each file is read. Without this a VAE copied by half would be told after the sampling.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    hint = "copy or fetch the whole model folder; weights are safetensors, never pickled"
    for index in indexes:
        for name in sorted(set(read_config(index, hint).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: no such file, but {index.name} names it", hint)
    check_names(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or cut off: {error}", "copy or fetch this file again") from None


def _boundary(folder: Path, index: Mapping[str, Any], parts: tuple[str, ...]) -> float | None:
    """The share of timesteps above which expert 0 works; None when there is one expert."""
    ratio = index.get("boundary_ratio")
    if "transformer_2" not in parts:
        return None
    if ratio is None:
        problem = f"{folder}/model_index.json: two experts but no boundary_ratio"
        raise UserError(problem, "set it (Wan2.2: 0.875 or 0.9)")
    return float(ratio)


def _takes_image(folder: Path, index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> str:
    """Whether the model starts from an image: told by the number of input channels and by `expand_timesteps`."""
    inputs, outputs = int(transformer["in_channels"]), int(transformer["out_channels"])
    if inputs == outputs:
        return "may" if index.get("expand_timesteps") else "never"
    if inputs == 2 * outputs + int(vae.get("scale_factor_temporal", 4)):  # noise, mask, encoded image
        return "must"
    problem = f"{folder}/transformer: {inputs} input and {outputs} output channels"
    raise UserError(problem, "neither text-to-video nor image-to-video")


def _fetched(fetch: Callable[[tuple[str, ...]], Path | None], weights: bool) -> Path | None:
    """The local folder of a repository: configurations first, and weights where these are wanted and of a pipeline."""
    folder = fetch(CONFIGURATIONS)
    return fetch(FINGERPRINTED) if folder and weights and (folder / "model_index.json").is_file() else folder


def _download(name: str, suffixes: tuple[str, ...]) -> Path:
    """The local copy of a hub repository's files, fetched when not there; never a pickled weight file."""
    from huggingface_hub import snapshot_download

    patterns = ["*" + suffix for suffix in suffixes]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of types, from bad names to dead networks
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"{name}: no such model folder, and not to be had from the hub: {line}"
        raise UserError(problem, "check model.path") from error
