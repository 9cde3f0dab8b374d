"""The order in which a person would read boxes of text: turned upright, gathered into lines, left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Corners = NDArray[np.float64]


def reading_order(boxes: Sequence[Corners]) -> list[int]:
    """Positions of `boxes` ([4, 2] corners in pixels, clockwise from the top left) in reading order.

    EasyOCR lists boxes by height of their top edge, which permutes the words of a slightly tilted or jittered line.
    Here all boxes are first turned by the common tilt; boxes that overlap by half a height are then one line.
    """
    if len(boxes) < 2:
        return list(range(len(boxes)))
    angle = tilt(boxes)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    upright = [np.asarray(box, dtype=np.float64) @ turn.T for box in boxes]
    left = [float(box[:, 0].min()) for box in upright]
    return [position for line in _lines(upright) for position in sorted(line, key=lambda p: (left[p], p))]


def tilt(boxes: Sequence[Corners]) -> float:
    """Common angle of the text in radians: the median of the slopes of the top edges, weighted by their lengths.

    Boxes higher than wide say nothing about it (a lone letter, vertical text).
    """
    slopes = []
    for box in boxes:
        across, down = box[1] - box[0], box[3] - box[0]
        length = float(np.hypot(*across))
        if length > float(np.hypot(*down)):
            slopes.append((math.atan2(across[1], across[0]), length))
    half, passed = sum(length for _, length in slopes) / 2, 0.0
    for angle, length in sorted(slopes):
        passed += length
        if passed >= half:
            return angle
    return 0.0


def _lines(boxes: Sequence[Corners]) -> list[list[int]]:
    """Positions of upright boxes, line by line from the top; a line lies where its boxes lie on average."""
    centres = [float(box[:, 1].mean()) for box in boxes]
    # of a turned box the mean length of its sides is the height; its bounding box would be too high
    halves = [float(np.hypot(*(box[3] - box[0])) + np.hypot(*(box[2] - box[1]))) / 4 for box in boxes]
    lines: list[list[int]] = []
    for position in sorted(range(len(boxes)), key=lambda p: (centres[p], p)):
        for line in lines:
            centre = sum(centres[p] for p in line) / len(line)
            half = sum(halves[p] for p in line) / len(line)
            overlap = half + halves[position] - abs(centre - centres[position])
            if overlap > min(half, halves[position]):
                line.append(position)
                break
        else:
            lines.append([position])
    return lines
