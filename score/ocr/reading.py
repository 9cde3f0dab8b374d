"""Reading text from frames with EasyOCR's networks: batched over frames and boxes, in an order of our own."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from score.ocr.networks import Networks, load_networks
from score.ocr.reading_order import reading_order
from shards.text.recognisers import Recogniser

Frames = NDArray[np.uint8]
Upright = list[int]
"""A region of text along the axes: least and largest x, least and largest y."""
Slanted = list[list[float]]
"""The four corners (x, y) of any other region."""
Regions = tuple[list[Upright], list[Slanted]]

TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT = 0.7, 0.4, 0.4  # EasyOCR's defaults, as all numbers below
SLOPE, CENTRE, HEIGHT, WIDTH, MARGIN = 0.1, 0.5, 0.5, 0.5, 0.1
LOW_CONFIDENCE, STRETCHED_CONTRAST = 0.1, 0.5


@dataclass(frozen=True)
class Box:
    """One piece of text: its corners [4, 2] in pixels (x, y), clockwise from the top left; confidence in [0, 1]."""

    corners: NDArray[np.float64]
    text: str
    confidence: float


class TextReader:
    """Reads many frames at once; the same text as `easyocr.Reader.readtext` frame by frame, in reading order."""

    def __init__(
        self,
        *,
        min_size: int = 0,
        canvas_size: int = 2560,
        detector_bf16: bool = False,
        device: str = "cpu",
        batch_pixels: int = 100_000,
        batch_crops: int = 64,
        recogniser: Recogniser | None = None,
    ) -> None:
        """min_size: boxes whose larger side is not above it are dropped (0: 5 px in frames under 128 px, else EasyOCR's
        20). canvas_size: the detector sees frames shrunk to this larger side. batch_pixels, batch_crops: memory bounds.
        recogniser: None reads English.
        """
        self.min_size, self.canvas_size = min_size, canvas_size
        self.batch_pixels, self.batch_crops = batch_pixels, batch_crops
        self._device, self._bf16, self._recogniser = device, detector_bf16, recogniser

    @property
    def networks(self) -> Networks:
        """Loaded at first use."""
        return load_networks(self._device, self._bf16, self._recogniser)

    def read(self, frames: Sequence[Frames]) -> list[list[Box]]:
        """Text of RGB frames [H, W, 3] uint8, of any sizes; boxes in EasyOCR's order. Equal frames are read once."""
        first: dict[bytes, int] = {}
        names = [hashlib.blake2b(repr(frame.shape).encode() + frame.tobytes()).digest() for frame in frames]
        for position, name in enumerate(names):
            first.setdefault(name, position)
        distinct = dict(zip(first, self._read([frames[position] for position in first.values()]), strict=True))
        return [distinct[name] for name in names]

    def lines(self, frames: Sequence[Frames], *, ordered: bool = True, min_confidence: float = 0.0) -> list[str]:
        """One string a frame [H,W,3], boxes joined by a space in reading order, or in EasyOCR's unless `ordered`."""
        rtl = self.networks.right_to_left
        return [
            joined(boxes, ordered=ordered, min_confidence=min_confidence, right_to_left=rtl)
            for boxes in self.read(frames)
        ]

    def _read(self, frames: list[Frames]) -> list[list[Box]]:
        import cv2

        found: list[list[tuple[NDArray[np.float64], Frames, int]]] = []
        for frame, regions in zip(frames, self._detect(frames), strict=True):
            # EasyOCR takes RGB for BGR here, which swaps the weights of red and blue
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            found.append(_crops(grey, *regions, self.networks.height))
        texts = self._recognise([crop for crops in found for crop in crops])
        iterator = iter(texts)
        return [[Box(corners, *next(iterator)) for corners, _, _ in crops] for crops in found]

    def _detect(self, frames: list[Frames]) -> list[Regions]:
        """Text regions of every frame: (upright boxes, slanted boxes); one forward pass for frames of one size."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, frame in enumerate(frames):
            by_shape[frame.shape].append(position)
        regions: dict[int, Regions] = {}
        for shape, positions in by_shape.items():
            size = max(1, self.batch_pixels // (shape[0] * shape[1]))
            for start in range(0, len(positions), size):
                part = positions[start : start + size]
                regions.update(zip(part, self._detect_batch([frames[position] for position in part]), strict=True))
        return [regions[position] for position in range(len(frames))]

    @torch.inference_mode()
    def _detect_batch(self, frames: list[Frames]) -> list[Regions]:
        from easyocr.craft_utils import adjustResultCoordinates, getDetBoxes
        from easyocr.utils import group_text_box

        batch, ratio = _canvas(frames, self.canvas_size)
        networks = self.networks
        images = batch.to(networks.device, networks.detector_dtype).contiguous(memory_format=torch.channels_last)
        maps = networks.detector(images)[0].float().cpu().numpy()
        smallest = self.min_size or (5 if min(frames[0].shape[:2]) < 128 else 20)
        results = []
        for scores in maps:
            boxes, _, _ = getDetBoxes(scores[..., 0], scores[..., 1], TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT)
            boxes = adjustResultCoordinates(boxes, 1 / ratio, 1 / ratio)
            corners = [np.asarray(box).astype(np.int32).reshape(-1) for box in boxes]
            upright, slanted = group_text_box(corners, SLOPE, CENTRE, HEIGHT, WIDTH, MARGIN, True)
            upright = [box for box in upright if max(box[1] - box[0], box[3] - box[2]) > smallest]
            slanted = [box for box in slanted if np.ptp(np.asarray(box), axis=0).max() > smallest]
            results.append((upright, slanted))
        return results

    def _recognise(self, crops: list[tuple[NDArray[np.float64], Frames, int]]) -> list[tuple[str, float]]:
        """Text and confidence of every crop; crops of one padded width share a batch, since padding is input too."""
        by_width: dict[int, list[int]] = defaultdict(list)
        for position, (_, _, width) in enumerate(crops):
            by_width[width].append(position)
        texts: dict[int, tuple[str, float]] = {}
        for width, positions in by_width.items():
            for start in range(0, len(positions), self.batch_crops):
                part = positions[start : start + self.batch_crops]
                texts.update(zip(part, self._recognise_batch([crops[p][1] for p in part], width), strict=True))
        return [texts[position] for position in range(len(crops))]

    def _recognise_batch(self, crops: list[Frames], width: int) -> list[tuple[str, float]]:
        from easyocr.recognition import adjust_contrast_grey

        height = self.networks.height
        texts = self._predict(np.stack([_padded(crop, width, height) for crop in crops]))
        weak = [position for position, (_, confidence) in enumerate(texts) if confidence < LOW_CONFIDENCE]
        if weak:  # EasyOCR looks again at what it could hardly read, with the contrast stretched
            stretched = [adjust_contrast_grey(crops[position], target=STRETCHED_CONTRAST) for position in weak]
            again = self._predict(np.stack([_padded(crop, width, height) for crop in stretched]))
            for position, second in zip(weak, again, strict=True):
                if second[1] >= texts[position][1]:
                    texts[position] = second
        return texts

    @torch.inference_mode()
    def _predict(self, crops: NDArray[np.float32]) -> list[tuple[str, float]]:
        """Greedy CTC decoding of crops [B, rows, W], grey 0..255."""
        networks = self.networks
        images = torch.from_numpy(crops)[:, None].to(networks.device).div_(255).sub_(0.5).div_(0.5)
        probabilities = networks.recogniser(images, None).softmax(2)
        if networks.ignored is not None:  # EasyOCR shares what they had among the others
            probabilities.index_fill_(2, networks.ignored, 0.0)
            probabilities /= probabilities.sum(2, keepdim=True)
        best, indices = (tensor.cpu().numpy() for tensor in probabilities.max(2))
        read = [_decode(row, values, networks.alphabet) for row, values in zip(indices, best, strict=True)]
        if not networks.right_to_left:
            return read
        from bidi import get_display

        return [(get_display(text), sure) for text, sure in read]


def joined(
    boxes: Sequence[Box], *, ordered: bool = True, min_confidence: float = 0.0, right_to_left: bool = False
) -> str:
    """The text of one frame; boxes of confidence `min_confidence` or less are left out."""
    kept = [box for box in boxes if box.confidence > min_confidence and box.text]
    corners = [box.corners[[1, 0, 3, 2]] * (-1, 1) if right_to_left else box.corners for box in kept]  # in a mirror
    order: Iterable[int] = reading_order(corners) if ordered else range(len(kept))
    return " ".join(kept[position].text for position in order)


def confidence(boxes: Sequence[Box], min_confidence: float = 0.0) -> float:
    """Mean confidence of the boxes that `joined` keeps; 0 for a frame without any."""
    kept = [box.confidence for box in boxes if box.confidence > min_confidence and box.text]
    return float(np.mean(kept)) if kept else 0.0


def _canvas(frames: list[Frames], canvas_size: int) -> tuple[Tensor, float]:
    """Detector input [B, 3, H', W'] fp32, padded with black to multiples of 32, and the scale before padding."""
    import cv2

    height, width = frames[0].shape[:2]
    ratio = min(1.0, canvas_size / max(height, width))
    size = (int(height * ratio), int(width * ratio))
    images = np.zeros((len(frames), math.ceil(size[0] / 32) * 32, math.ceil(size[1] / 32) * 32, 3), np.uint8)
    for image, frame in zip(images, frames, strict=True):
        scaled = frame if ratio == 1.0 else cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
        image[: size[0], : size[1]] = scaled
    mean = torch.tensor([0.485, 0.456, 0.406]) * 255
    deviation = torch.tensor([0.229, 0.224, 0.225]) * 255
    return torch.from_numpy(images).float().sub_(mean).div_(deviation).permute(0, 3, 1, 2), ratio


def _crops(
    grey: Frames, upright: list[Upright], slanted: list[Slanted], rows: int
) -> list[tuple[NDArray[np.float64], Frames, int]]:
    """(corners, crop `rows` px high, padded width) of every region; regions that leave no pixels are skipped."""
    import cv2
    from easyocr.utils import get_image_list

    crops: list[tuple[NDArray[np.float64], Frames, int]] = []
    regions: list[Regions] = [([box], []) for box in upright]
    regions += [([], [box]) for box in slanted]
    for region in regions:
        try:
            images, width = get_image_list(*region, grey, model_height=rows)
        except (cv2.error, ZeroDivisionError):  # a region wholly outside the frame has an empty crop
            continue
        crops.extend((np.asarray(corners, dtype=np.float64), crop, int(width)) for corners, crop in images)
    return crops


def _padded(crop: Frames, width: int, rows: int) -> NDArray[np.float32]:
    """Recogniser input [rows, width]: the crop resized to `rows`, its last column repeated to the right."""
    from PIL import Image

    height, own = crop.shape
    scaled = min(width, math.ceil(rows * (own / height)))
    if (own, height) != (scaled, rows):
        crop = np.asarray(Image.fromarray(crop).resize((scaled, rows), Image.Resampling.BICUBIC))
    image = np.empty((rows, width), np.float32)
    image[:, :scaled] = crop
    image[:, scaled:] = crop[:, -1:]
    return image


def _decode(indices: NDArray[np.int64], values: NDArray[np.float32], alphabet: str) -> tuple[str, float]:
    """Greedy CTC: repeats collapse, blanks (0) vanish. Confidence: EasyOCR's prod(p)^(2/sqrt(n)) over the rest."""
    seen = indices != 0
    if not seen.any():
        return "", 0.0
    starts = seen & np.concatenate(([True], indices[1:] != indices[:-1]))
    text = "".join(alphabet[index - 1] for index in indices[starts])
    return text, float(values[seen].prod() ** (2.0 / math.sqrt(int(seen.sum()))))
