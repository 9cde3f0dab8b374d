"""How the OCR reward compares two texts, and which characters of a target no recogniser could ever give it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-", "\u2044": "/"})
_CONFUSABLES = str.maketrans({"0": "o", "1": "l", "i": "l", "5": "s"})


@dataclass(frozen=True)
class Normaliser:
    """The function that both the target and the read text go through before they are compared."""

    keep_all: bool
    """Keep all visible characters, not letters and digits alone."""
    fold_confusables: bool
    """0/o, 1/i/l and 5/s count as equal."""
    plain: bool = False
    """Only U+0020 goes, only `lower`: flow_grpo and FastVideo."""

    def __call__(self, text: str) -> str:
        """What of `text` is compared."""
        if self.plain:
            kept = text.replace(" ", "").lower()
        else:
            folded = unicodedata.normalize("NFKC", text).translate(_PUNCTUATION).casefold()
            kept = "".join(filter(self._keeps, folded))
        return kept.translate(_CONFUSABLES) if self.fold_confusables else kept

    def _keeps(self, character: str) -> bool:
        return character.isalnum() or (self.keep_all and unicodedata.category(character)[0] not in "ZC")


def normaliser(target: str, fold_confusables: bool = False) -> Normaliser:
    """The normaliser of a target in the default mode of the OCR reward.

    NFKC (so that a superscript 2 is a 2), typographic to ASCII punctuation, case folded, and only letters and digits
    kept; a target without any keeps all visible characters instead. `fold_confusables`: 0/o, 1/i/l, 5/s are equal.
    """
    keep_all = not any(character.isalnum() for character in unicodedata.normalize("NFKC", target))
    return Normaliser(keep_all, fold_confusables)


def plain_normaliser(target: str, fold_confusables: bool = False) -> Normaliser:
    """That of the modes which repeat flow_grpo and FastVideo."""
    return Normaliser(True, fold_confusables, plain=True)


def unreadable(target: str, readable: frozenset[str], normalise: Normaliser) -> str:
    """The characters of a target, each once, that are compared and that no text made of `readable` ones has."""
    known = _known(readable, normalise)
    return "".join(dict.fromkeys(_foreign(unicodedata.normalize("NFC", target), known, normalise)))


def _foreign(target: str, known: frozenset[str], normalise: Normaliser) -> Iterable[str]:
    return (character for character in target if not known.issuperset(normalise(character)))


@lru_cache(maxsize=16)
def _known(readable: frozenset[str], normalise: Normaliser) -> frozenset[str]:
    """The characters that normalised texts of readable characters are made of."""
    return frozenset("".join(map(normalise, readable)))
