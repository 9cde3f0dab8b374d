"""What every page has around its content: head, style, script, and a policy that lets nothing else run or load."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from string import Template

from shards.text.visible import visible

HERE = Path(__file__).parent


def escape(text: str) -> str:
    """Text of a file as HTML, also inside an attribute; control characters and marks of direction are shown."""
    return html.escape(visible(text), quote=True)


def shell(
    title: str, about: str, parts: Mapping[str, tuple[str, str]], head: str = "", *, version: str = "", footer: str = ""
) -> str:
    """A whole page. `title` is text; `about` and `head`, what stands above the sections, are HTML.

    `parts`: id of a section -> its name in the navigation and its HTML. With a `version` the page follows a server
    that shows one run: it asks for newer parts. Inline code runs by its hash alone, so nothing that a file of a run
    holds can be code.
    """
    style, script = (_text(name) for name in ("style.css", "script.js"))
    if version:
        script += _text("live.js")
    links = "".join(f'<li><a href="#{name}">{escape(label)}</a></li>' for name, (label, _) in parts.items())
    body = "".join(f'<section id="{name}" data-part="{name}">{text}</section>' for name, (_, text) in parts.items())
    return Template(_text("page.html")).substitute(
        policy=security_policy(style, script, live=bool(version)),
        version=escape(version),
        title=escape(title),
        about=about,
        links=links,
        now='<pre id="now" class="card" aria-live="off"></pre>' if version else "",
        head=head,
        parts=body,
        footer=footer or "Made by rushes from the files of the run; nothing in this page is loaded from elsewhere.",
        style=style,
        script=script,
    )


def security_policy(style: str, script: str, *, live: bool) -> str:
    """The content-security policy of a page with this style and this script; a live one may ask its own server."""
    rules = ["default-src 'none'", f"style-src {_hash(style)}", f"script-src {_hash(script)}", "media-src data:"]
    rules += ["img-src data:", "base-uri 'none'", "form-action 'none'"]
    return "; ".join([*rules, "connect-src 'self'"] if live else rules)


def _hash(code: str) -> str:
    return f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'"


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
