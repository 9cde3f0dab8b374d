"""CRAFT, EasyOCR's text detector, computed another way: the same maps with half of the arithmetic, in fp32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score.ocr.winograd import Plane, Winograd

if TYPE_CHECKING:
    from easyocr.craft import CRAFT

ENCODER, DECODER = ("slice1", "slice2", "slice3", "slice4"), ("upconv1", "upconv2", "upconv3", "upconv4")
POOLED = (1, 3, 6, 9)  # which convolutions of the encoder, counted from 0, a 2×2 maximum follows
KEPT = (8, 5, 3)  # whose results the decoder takes up: at an eighth, a quarter and half of the size
KEPT_CHANNELS = (512, 512, 256, 128)  # of the last map of the encoder and of those
HALVED, WHOLE = (2, 2), (1, 1)


class FastDetector(nn.Module):
    """CRAFT with its own weights; gives what CRAFT gives to about 1e-6.

    3×3 convolutions go by Winograd's scheme. Linear steps in a row become one: the last two convolutions of the encoder
    and the first of the decoder have no activation between them. The decoder's 1×1 convolutions see an enlarged map
    beside a kept one; the part for the enlarged map is done before it is enlarged, on a quarter of the pixels.
    """

    def __init__(self, craft: CRAFT) -> None:
        """`craft`: easyocr.craft.CRAFT in evaluation mode, its batch norms fused into its convolutions."""
        super().__init__()
        base = craft.basenet
        self.first, *others = (layer for name in ENCODER for layer in _convolutions(getattr(base, name)))
        self.encoder = nn.ModuleList(Winograd(layer, relu=layer is not others[-1]) for layer in others)
        mixing, refining = zip(*(_convolutions(getattr(craft, name).conv) for name in DECODER), strict=True)
        halves = [_split(layer, channels) for layer, channels in zip(mixing, KEPT_CHANNELS, strict=True)]
        self.context = _composed(_composed(base.slice5[1], base.slice5[2]), halves[0][0])
        self.enlarged = nn.ModuleList(half for half, _ in halves[1:])
        self.kept = nn.ModuleList(half for _, half in halves)
        self.refine = nn.ModuleList(Winograd(layer) for layer in refining)
        self.last = nn.ModuleList(_convolutions(craft.conv_cls))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Scores of text and of links [B, H/2, W/2, 2] of images [B, 3, H, W], H and W multiples of 32.

        In a tuple, as CRAFT gives them.
        """
        kept, top = self._encode(images)
        wide = F.max_pool2d(top.maps, 3, stride=1, padding=1)
        plane = self.refine[0](_mixed(self.context(wide), self.kept[0], top))
        for enlarge, keep, refine, other in zip(self.enlarged, self.kept[1:], self.refine[1:], kept, strict=True):
            small = _pointwise(enlarge, plane)
            large = F.interpolate(small, size=(other.height, other.width), mode="bilinear", align_corners=False)
            plane = refine(_mixed(large, keep, other))
        maps = plane.maps
        for layer in self.last[:-1]:
            maps = layer(maps).relu_()
        return (self.last[-1](maps).permute(0, 2, 3, 1),)

    def _encode(self, images: Tensor) -> tuple[list[Plane], Plane]:
        """The maps that are kept, smallest first, and the last ones, at a sixteenth of the size."""
        height, width = images.shape[2:]
        # convolved with a border of its own the image fills a whole buffer, and no copy is needed
        maps = F.conv2d(images, self.first.weight, self.first.bias, padding=2).relu_()
        plane = Plane(maps.permute(0, 2, 3, 1), height, width)
        kept: dict[int, Plane] = {}
        for number, layer in enumerate(self.encoder, start=1):
            plane = layer(plane, pool=HALVED if number in POOLED and number not in KEPT else WHOLE)
            if number in KEPT:
                kept[number] = plane
                plane = plane.pooled() if number in POOLED else plane
        return [kept[number] for number in KEPT], plane


def _pointwise(layer: nn.Module, plane: Plane) -> Tensor:
    """A 1×1 convolution [B, K, H, W] of maps: one product over the whole buffer, border and all: no copies."""
    assert isinstance(layer, nn.Conv2d)  # a module list forgets what it holds
    rows, weight = plane.buffer.flatten(0, 2), layer.weight.flatten(1).t()
    results = rows @ weight if layer.bias is None else torch.addmm(layer.bias, rows, weight)
    return Plane.inner(results.view(*plane.buffer.shape[:3], -1), plane.height, plane.width).permute(0, 3, 1, 2)


def _mixed(maps: Tensor, layer: nn.Module, plane: Plane) -> Plane:
    """ReLU of maps [B, K, H, W] and of a 1×1 convolution of kept ones, added."""
    buffer = Plane.empty(len(maps), plane.height, plane.width, maps.shape[1])
    mixed = Plane.inner(buffer, plane.height, plane.width)
    torch.add(maps.permute(0, 2, 3, 1), _pointwise(layer, plane).permute(0, 2, 3, 1), out=mixed)
    mixed.relu_()
    return Plane(buffer, plane.height, plane.width)


def _convolutions(layers: Iterable[nn.Module]) -> list[nn.Conv2d]:
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def _convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution with the padding and dilation of `like`."""
    outputs, inputs, size = weight.shape[:3]
    spread, border = int(like.dilation[0]), int(like.padding[0])
    made = nn.Conv2d(inputs, outputs, size, padding=border, dilation=spread, bias=bias is not None, device="meta")
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    made.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return made.requires_grad_(False).to(memory_format=torch.channels_last)


def _composed(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """`second`, of 1×1 pixels, after `first` as one convolution, multiplied out in double precision."""
    mix = second.weight.double()[:, :, 0, 0]
    bias = 0.0 if second.bias is None else second.bias.double()
    assert first.bias is not None
    return _convolution(
        first, torch.einsum("km,mcij->kcij", mix, first.weight.double()), mix @ first.bias.double() + bias
    )


def _split(mixing: nn.Conv2d, kept: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A 1×1 convolution of two maps side by side as one of each, to be added; the second sees the last `kept` channels.

    The second holds the bias.
    """
    return (
        _convolution(mixing, mixing.weight[:, :-kept], None),
        _convolution(mixing, mixing.weight[:, -kept:], mixing.bias),
    )
