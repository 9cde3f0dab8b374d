"""EasyOCR's recogniser computed another way: the same probabilities with fewer multiplications, in fp32 on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from score.ocr.winograd import Plane, Winograd

if TYPE_CHECKING:
    from easyocr.model.vgg_model import Model

POOLS = ((2, 2), (1, 1), (2, 1), (1, 1), (2, 1))  # after the second to the sixth convolution; the first has (2, 2)


class FastRecogniser(nn.Module):
    """The convolutions of english_g2 by Winograd's scheme, its recurrent layers as they are."""

    def __init__(self, model: Model) -> None:
        """`model`: easyocr.model.vgg_model.Model in evaluation mode, its batch norms fused into its convolutions."""
        super().__init__()
        self.first, *others, self.last = (
            layer for layer in model.FeatureExtraction.ConvNet if isinstance(layer, nn.Conv2d)
        )
        self.convolutions = nn.ModuleList(Winograd(layer) for layer in others)
        self.sequence, self.prediction = model.SequenceModeling, model.Prediction

    def forward(self, images: Tensor, text: None = None) -> Tensor:
        """Logits [B, W/4 - 1, K] of grey images [B, 1, 64, W] from -1 to 1, W a multiple of 4."""
        height, width = images.shape[2:]
        # convolved with a border of its own the image fills a whole buffer, and no copy is needed
        maps = F.conv2d(images, self.first.weight, self.first.bias, padding=2).relu_()
        plane = Plane(maps.permute(0, 2, 3, 1).contiguous(), height, width).pooled()
        for layer, pool in zip(self.convolutions, POOLS, strict=True):
            plane = layer(plane, pool)
        features = self.last(plane.maps).relu_().mean(dim=2)
        logits: Tensor = self.prediction(self.sequence(features.permute(0, 2, 1).contiguous()))
        return logits
