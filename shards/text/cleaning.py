"""The text of a prompt as the text encoder gets it: one cleaning for prompts, targets, records and rewards."""

from __future__ import annotations

import html
import re

_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # as the module `regex` has \s, which diffusers takes


def clean(text: str) -> str:
    """`text` as diffusers' WanPipeline cleans a prompt before it is tokenised.

    That is ftfy.fix_text, HTML entities resolved twice, and white space made single spaces. ftfy makes typographic
    quotation marks straight. Cleaning twice may change a text once more (`<b> &ldquo;A&rdquo;`), so a cleaned text is
    kept as it is.
    """
    import ftfy

    return _SPACE.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()
