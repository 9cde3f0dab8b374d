"""Winograd's scheme against PyTorch's own convolutions, and the fast networks against those of EasyOCR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score.ocr import networks, winograd
from score.ocr.detector import FastDetector
from score.ocr.networks import english_weights, fuse_batch_norm, weights_folder
from score.ocr.recogniser import FastRecogniser
from score.ocr.winograd import Plane, Winograd


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    torch.manual_seed(inputs)
    return nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("shape", "pool"),
    [((2, 3, 8, 12), (1, 1)), ((1, 5, 6, 10), (2, 2)), ((3, 4, 2, 14), (2, 1)), ((1, 2, 7, 9), (1, 1))],
)
def test_winograd_convolves(shape: tuple[int, ...], pool: tuple[int, int], relu: bool) -> None:
    layer, maps = convolution(shape[1], 6), torch.randn(shape)
    expected = F.max_pool2d(layer(maps), pool)
    found = Winograd(layer, relu)(Plane.of(maps), pool)
    torch.testing.assert_close(found.maps, expected.relu() if relu else expected, rtol=1e-4, atol=1e-5)
    edges = found.buffer.clone()
    edges[:, 1 : found.height + 1, 1 : found.width + 1] = 0
    assert not edges.any()  # the next convolution reads the border


def test_the_parts_of_the_work_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, maps = Winograd(convolution(3, 4)), torch.randn(3, 3, 20, 28)
    whole = layer(Plane.of(maps)).maps
    for tiles in (1, 3, 10, 40):
        monkeypatch.setattr(winograd, "TILES", tiles)
        torch.testing.assert_close(layer(Plane.of(maps)).maps, whole)


def test_a_buffer_without_room_for_whole_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        Plane(torch.zeros(1, 8, 7, 2), 6, 5)  # one column less than two tiles and the border


def test_pooled_keeps_the_largest_of_four() -> None:
    maps = torch.randn(2, 3, 6, 10)
    torch.testing.assert_close(Plane.of(maps).pooled().maps, F.max_pool2d(maps, 2))


@pytest.fixture(scope="module")
def originals() -> tuple[Any, Any]:
    """EasyOCR's two networks with its weights, as its own reader computes them."""
    networks._easyocr()
    from easyocr.config import recognition_models
    from easyocr.craft import CRAFT
    from easyocr.model.vgg_model import Model

    alphabet = recognition_models["gen2"]["english_g2"]["characters"]
    with torch.device("meta"):
        detector, recogniser = CRAFT(), Model(1, 256, 256, len(alphabet) + 1)
    detector.load_state_dict(english_weights(weights_folder(), "craft_mlt_25k.pth"), assign=True)
    recogniser.load_state_dict(english_weights(weights_folder(), "english_g2.pth"), assign=True)
    return detector.eval().requires_grad_(False), recogniser.eval().requires_grad_(False)


def words(*shape: int) -> Tensor:
    """Smooth random images with edges in them, about as bright as normalised frames."""
    torch.manual_seed(0)
    batch, channels, height, width = shape
    coarse = torch.randn(batch, channels, height // 8, width // 8)
    return F.interpolate(coarse, size=(height, width)) + 0.1 * torch.randn(shape)


@torch.inference_mode()
def test_the_detector_sees_what_craft_sees(originals: tuple[Any, Any]) -> None:
    images = words(2, 3, 64, 96)
    expected = originals[0](images)[0]
    fused = fuse_batch_norm(originals[0])
    found = FastDetector(fused)(images)[0]
    assert found.shape == expected.shape == (2, 32, 48, 2)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@torch.inference_mode()
def test_the_recogniser_reads_what_the_model_reads(originals: tuple[Any, Any]) -> None:
    images = words(3, 1, 64, 128)
    expected = originals[1](images, None).softmax(2)
    found = FastRecogniser(fuse_batch_norm(originals[1]))(images).softmax(2)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
