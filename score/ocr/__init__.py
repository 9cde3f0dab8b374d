"""The OCR reward, its networks and its reading of text. `score.ocr:OCR` is the name that counts in directories."""

from score.ocr.reward import OCR

__all__ = ["OCR"]
