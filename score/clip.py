"""CLIP text–image similarity, and the embeddings of frames and prompts that other rewards build on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from score.digests import digest_folder
from score.frames import FrameReward
from score.options import device_named
from shards.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

WEIGHTS = (".safetensors", ".bin")
CONFIGURATION = (".json", ".txt")
T = TypeVar("T")


class ClipReward(FrameReward):
    """A reward on the embeddings of a CLIP model."""

    neutral = ("device",)

    def __init__(self, model: str, processor: str = "", frames: int = 4, device: str = "auto") -> None:
        """model: folder of a CLIPModel as `save_pretrained` writes it. processor: folder of its CLIPProcessor, that of
        the model when empty. frames: how many are looked at, the first and the last among them.
        """
        self.look_at(frames)
        self.embedder = load_embedder(model, processor or model, device)

    def cosines(self, frames: NDArray[np.uint8], prompt: str) -> Tensor:
        """Cosines [T] of the embeddings of frames and prompt, from -1 to 1."""
        return self.embedder.images(frames) @ self.embedder.text(prompt)

    @staticmethod
    def identity(options: Mapping[str, Any]) -> dict[str, str]:
        """Digests of model and processor. Raises UserError for folders that hold none."""
        return model_identity(options)


class CLIP(ClipReward):
    """Cosine of the embeddings of prompt and frame, from -1 to 1, of frames spread evenly over the video.

    similarity   mean over the frames (CLIPScore of Hessel et al., 2021, without its factor of 2.5 and its cut at 0)
    lowest       the smallest of them: one frame off the prompt shows here
    Text beyond the window of the model (77 tokens) is not seen. It judges single frames: it cannot tell whether they
    fit together, and it is known to be blind to counts, positions and negations.
    """

    name = "clip"
    version = "1"
    components = ("similarity", "lowest")

    def values(self, frames: NDArray[np.uint8], prompt: str) -> Mapping[str, float]:
        """Similarity of the frames [T, H, W, 3] with the prompt."""
        cosines = self.cosines(frames, prompt)
        return {"similarity": float(cosines.mean()), "lowest": float(cosines.min())}


class Embedder:
    """A CLIP model with its processor: unit vectors of images and texts in float32."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, device: torch.device) -> None:
        self.model, self.processor, self.device = model, processor, device
        self.text = functools.lru_cache(maxsize=1024)(self._text)  # a group shares its prompt
        """Unit vector [D] of a prompt, cut to the window of the model."""

    @property
    def scale(self) -> float:
        """The learned factor of cosines, exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def size(self) -> int:
        """D, the length of an embedding."""
        return int(self.model.config.projection_dim)

    @torch.inference_mode()
    def images(self, frames: NDArray[np.uint8]) -> Tensor:
        """Unit vectors [T, D] of frames [T, H, W, 3] uint8 RGB."""
        pixels = self.processor.image_processor(list(frames), return_tensors="pt", input_data_format="channels_last")
        found = self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device))
        return _unit(found.pooler_output)

    @torch.inference_mode()
    def _text(self, prompt: str) -> Tensor:
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(prompt, truncation=True, max_length=window, return_tensors="pt")
        inputs = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return _unit(self.model.get_text_features(**inputs).pooler_output)[0]


def _unit(vectors: Tensor) -> Tensor:
    return (vectors / vectors.norm(dim=-1, keepdim=True)).float().cpu()


@functools.lru_cache(maxsize=2)
def load_embedder(model: str, processor: str, device: str = "auto") -> Embedder:
    """A CLIP model and processor from local folders, shared by the rewards of a process.

    Raises UserError for a folder without one, for weights that lack a tensor (it would be a random one), and for a
    device that is not there.
    """
    from transformers import CLIPModel, CLIPProcessor

    place = device_named(device)
    network, report = _load("model", model, lambda: CLIPModel.from_pretrained(
        model, local_files_only=True, output_loading_info=True, dtype=torch.float32
    ))  # fmt: skip
    if report["missing_keys"]:
        raise UserError(f"{model}: the weights lack {min(report['missing_keys'])}", "fetch or copy the model again")
    words = _load("processor", processor, lambda: CLIPProcessor.from_pretrained(processor, local_files_only=True))
    return Embedder(network.eval().requires_grad_(False).to(place), words, place)


def _load(what: str, folder: str, load: Callable[[], T]) -> T:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder", f"give a CLIP {what} as `save_pretrained` writes it")
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder}: no CLIP {what} can be loaded from it: {first}",
            f"give a CLIP {what} as `save_pretrained` writes it",
        ) from None


def model_identity(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests for the options `model` and `processor` of a reward on CLIP."""
    processor = options["processor"] or options["model"]
    return {
        "model": digest_folder(options["model"], (*WEIGHTS, "config.json")),
        "processor": digest_folder(processor, CONFIGURATION),
    }
