"""3×3 convolutions by Winograd's minimal filtering, F(4×4, 3×3): a quarter of the multiplications, in fp32 on a CPU.

PyTorch convolves directly on CPUs, which is bound by multiplications. Here every tile of 4×4 results comes from the
6×6 inputs around it: both are transformed by small constant matrices, and 36 matrix products over the channels lie
between (Lavin and Gray, 2016, with the points 0, ±1, ±2). Results differ from direct ones by about 1e-5 of their size.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

Size = tuple[int, int]
TILE, WINDOW = 4, 6
TILES = 128  # transformed at a time, which stay in the cache until they are multiplied
INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
FILTER = torch.tensor(
    [[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
) / torch.tensor(24.0, dtype=torch.float64)
OUTPUT = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


class Plane:
    """Feature maps [B, H, W, C] with zeros around them, in one buffer, as a 3×3 convolution reads them.

    The buffer reaches one pixel beyond H and W rounded up to whole tiles; it is filled by who makes it.
    """

    def __init__(self, buffer: Tensor, height: int, width: int) -> None:
        """Clears what is outside `height` and `width` of a buffer [B, ≥ H + 2, ≥ W + 2, C].

        Raises ValueError for a buffer without room for whole tiles.
        """
        if buffer.shape[1] < _whole(height) + 2 or buffer.shape[2] < _whole(width) + 2:
            raise ValueError(f"a buffer {list(buffer.shape)} is too small for maps of {height} by {width}")
        self.buffer, self.height, self.width = buffer, height, width
        for edge in (buffer[:, 0], buffer[:, height + 1 :], buffer[:, :, 0], buffer[:, :, width + 1 :]):
            edge.zero_()

    @staticmethod
    def empty(batch: int, height: int, width: int, channels: int) -> Tensor:
        """A buffer for maps of this size."""
        return torch.empty(batch, _whole(height) + 2, _whole(width) + 2, channels)

    @staticmethod
    def inner(buffer: Tensor, height: int, width: int) -> Tensor:
        """What of a buffer holds maps of this size: [B, H, W, C], a view."""
        return buffer[:, 1 : height + 1, 1 : width + 1]

    @classmethod
    def of(cls, maps: Tensor) -> Plane:
        """A copy of maps [B, C, H, W]."""
        batch, channels, height, width = maps.shape
        buffer = cls.empty(batch, height, width, channels)
        cls.inner(buffer, height, width).copy_(maps.permute(0, 2, 3, 1))
        return cls(buffer, height, width)

    def pooled(self) -> Plane:
        """The maximum of each 2×2 pixels; height and width must be even."""
        inner = Plane.inner(self.buffer, self.height, self.width)
        rows = torch.maximum(inner[:, ::2], inner[:, 1::2])
        size = (self.height // 2, self.width // 2)
        buffer = Plane.empty(len(inner), *size, inner.shape[3])
        torch.maximum(rows[:, :, ::2], rows[:, :, 1::2], out=Plane.inner(buffer, *size))
        return Plane(buffer, *size)

    @property
    def maps(self) -> Tensor:
        """[B, C, H, W], a view."""
        return Plane.inner(self.buffer, self.height, self.width).permute(0, 3, 1, 2)


class Winograd(nn.Module):
    """A 3×3 convolution of stride 1 with a border of zeros; then ReLU, unless `relu` is false."""

    weight: Tensor
    bias: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, convolution: nn.Conv2d, relu: bool = True) -> None:
        """Takes over the weights [K, C, 3, 3] and the bias of a convolution."""
        super().__init__()
        filters = convolution.weight.detach().double()
        transformed = torch.einsum("ai,kcij,bj->abck", FILTER, filters, FILTER).float()
        self.register_buffer("weight", transformed.reshape(WINDOW**2, filters.shape[1], filters.shape[0]).contiguous())
        self.register_buffer("bias", (convolution.bias if convolution.bias is not None else torch.zeros(1)).detach())
        self.register_buffer("before", torch.kron(INPUT, INPUT))
        self.register_buffer("after", torch.kron(OUTPUT, OUTPUT))
        self.relu = relu

    def forward(self, plane: Plane, pool: Size = (1, 1)) -> Plane:
        """Maps of the same size, or smaller by factors `pool` of 1 or 2, where the maximum of each such block is kept.

        What is halved must be even.
        """
        batch, height, width = len(plane.buffer), plane.height, plane.width
        rows, columns = _whole(height) // TILE, _whole(width) // TILE
        size, tile = (height // pool[0], width // pool[1]), (TILE // pool[0], TILE // pool[1])
        buffer = Plane.empty(batch, *size, self.weight.shape[2])
        out = _tiles(buffer[:, 1:, 1:], tile, tile, (batch, rows, columns))
        windows = _tiles(plane.buffer, (TILE, TILE), (WINDOW, WINDOW), (batch, rows, columns))
        lines = max(1, TILES // columns)
        for image in _parts(batch, TILES // (rows * columns)):
            for row, column in product(_parts(rows, lines), _parts(columns, TILES)):
                part = (slice(None), slice(None), image, row, column)
                self._convolve(windows[part], pool, out[part])
        return Plane(buffer, *size)

    def _convolve(self, windows: Tensor, pool: Size, out: Tensor) -> None:
        """Tiles [4, 4, …, K] of windows [6, 6, …, C], smaller by the factors of `pool`, written to `out`."""
        kept = windows.shape[2:-1]
        # one small product transforms rows and columns of all windows together
        inputs = torch.mm(self.before, windows.reshape(WINDOW**2, -1)).view(WINDOW**2, -1, windows.shape[-1])
        products = torch.bmm(inputs, self.weight)
        tiles = torch.mm(self.after, products.view(WINDOW**2, -1)).view(TILE, TILE, *kept, -1)
        if pool[0] == 2:
            tiles = torch.maximum(tiles[::2], tiles[1::2])
        if pool[1] == 2:
            tiles = torch.maximum(tiles[:, ::2], tiles[:, 1::2])
        if self.relu:
            torch.clamp_min(tiles.add_(self.bias), 0, out=out)
        else:
            torch.add(tiles, self.bias, out=out)


def _tiles(buffer: Tensor, step: Size, sides: Size, counts: tuple[int, int, int]) -> Tensor:
    """View [*sides, *counts, C] of a buffer [B, H, W, C]: pieces that begin every `step` pixels and may overlap."""
    image, row, column, channel = buffer.stride()
    strides = (row, column, image, step[0] * row, step[1] * column, channel)
    return buffer.as_strided((*sides, *counts, buffer.shape[3]), strides, buffer.storage_offset())


def _parts(count: int, most: int) -> list[slice]:
    """`count` in equal parts of at most `most`, or of 1."""
    parts = -(-count // max(1, most))
    return [slice(count * number // parts, count * (number + 1) // parts) for number in range(parts)]


def _whole(size: int) -> int:
    """`size` rounded up to whole tiles."""
    return -(-size // TILE) * TILE
