"""A video as HTML."""

from __future__ import annotations

PAGE = (
    '<figure style="margin:0"><video title="{title}" width="{width}" style="image-rendering:pixelated" controls loop '
    'muted autoplay src="data:video/mp4;base64,{data}"></video><figcaption>{caption}</figcaption></figure>'
)


class Player(str):
    """HTML that a notebook shows as what it is. It is a `str`, so it can be written into a page, too."""

    __slots__ = ()

    @classmethod
    def of(cls, data: str, title: str, caption: str, width: int) -> Player:
        """An mp4 in base64, with a title and a caption that are HTML already, `width` pixels wide."""
        return cls(PAGE.format(data=data, title=title, caption=caption, width=width))

    def _repr_html_(self) -> str:
        return str(self)
