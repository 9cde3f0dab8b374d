"""What stands in the fields of a prompts file: text, chat messages, tags, images; checked, and cleaned once."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from rollout.prompts.files import refuse_nul
from shards.errors import UserError
from shards.store.urls import beside
from shards.text.cleaning import clean
from shards.text.quotes import COUNTED, quoted

LARGEST = 100_000  # bytes of a prompt
CHAT = "write the prompt as text, or as messages of which one is the user's and none another's"

_WRITTEN_CHAT = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def prompt_text(value: object, where: str) -> str:
    """The cleaned text of a prompt, which may be a chat of one user message (`chat_text`); "" where there is none.

    Raises UserError for values of another type, and for text that a prompt cannot be.
    """
    if isinstance(value, Mapping) or _is_list(value):
        value = chat_text([value] if isinstance(value, Mapping) else list(value), where)
    elif isinstance(value, str) and _WRITTEN_CHAT.match(value):
        value = chat_text(_parsed(value, where), where)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: the prompt is {shortened(value)}, not text", "write the prompt as text")
    return checked(value, where)


def optional_text(value: object, name: str, where: str) -> str | None:
    """The cleaned text of a target or a negative prompt; None where there is none. A negative prompt may be empty on
    purpose. Raises UserError as `prompt_text` does."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {shortened(value)}, not text", f"write the {name} as text")
    text = checked(value, where)
    return text if text or (name == "negative" and not value) else None


def checked(text: str, where: str) -> str:
    """`text` cleaned. UserError for NUL bytes, half surrogate pairs and more than 100 kB."""
    refuse_nul(text, where)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{where}: contains half a surrogate pair", "it cannot be UTF-8; correct it") from None
    if size > LARGEST:
        raise UserError(f"{where}: {size} bytes, above the limit of {LARGEST}", "a model reads about 512 tokens")
    return clean(text)


def quoted_target(text: str, where: str, needed: bool) -> str | None:
    """What a cleaned prompt has between quotation marks, joined by spaces. UserError where it is needed and missing."""
    try:
        target = " ".join(span for span in quoted(text) if span)
    except ValueError as error:
        if not needed:
            return None
        raise UserError(f"{where}: {error}", "close it, or give the text to be read in a `target` field") from None
    if needed and not target:
        hint = f'write it in quotation marks: a sign that says "OPEN" ({COUNTED}); or use a reward other than ocr'
        raise UserError(f"{where}: no quoted text to be read", hint)
    return target or None


def image_of(file: Path, value: object, where: str) -> str | None:
    """Where an image lies that a prompts file names: at a URL, or in a file; relative names count from the prompts."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: image is {shortened(value)}, not text", "name a file or a URL")
    checked(value, where)  # its name stays as it is
    try:
        return beside(file, value)
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.hint) from None


# --- Tags ------------------------------------------------------------------------------------------------------------


def tags_of(fields: Mapping[str, object], where: str) -> tuple[str, ...]:
    """The tags of a record: `tags`, a list or a text with commas, and `tag`, one of them. Numbers and booleans become
    text as JSON writes them. Raises UserError for a tag that is a list, an object or bytes."""
    many, one = fields.get("tags"), fields.get("tag")
    found = [_tag(value, where) for value in many] if _is_list(many) else _tag(many, where).split(",")
    found += _tag(one, where).split(",")
    return tuple(dict.fromkeys(tag.strip() for tag in found if tag.strip()))


def _tag(value: object, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping | bytes) or _is_list(value):
        raise UserError(f"{where}: a tag is {shortened(value)}, not text", "write tags as text, or as a list of texts")
    return json.dumps(value) if isinstance(value, bool | int | float) else str(value)


# --- Chats -----------------------------------------------------------------------------------------------------------


def chat_text(messages: Sequence[object], where: str) -> str:
    """The text of the one user message in a list of {"role", "content"}; messages without content do not count.

    `content` is text, or a list of parts {"type": "text", "text"}. Raises UserError, naming it, where anything would be
    dropped: another role, a second message, an image, further fields.
    """
    texts: dict[str, list[str]] = {}
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            problem = f"{where}: the prompt is a list with {shortened(message)}, which is not a chat message"
            raise UserError(problem, 'a message is {"role": "user", "content": "a sign"}')
        role = str(message["role"])
        more = sorted(name for name, value in message.items() if name not in ("role", "content") and value)
        if more:
            raise UserError(f"{where}: the prompt is a chat whose {role} message has `{more[0]}`", CHAT)
        text = _content(message["content"], role, where)
        if text.strip():
            texts.setdefault(role, []).append(text)
    others = [role for role in texts if role != "user"]
    if others:
        raise UserError(f"{where}: the prompt is a chat with a message of role {others[0]!r}", CHAT)
    users = texts.get("user", [])
    if len(users) > 1:
        raise UserError(f"{where}: the prompt is a chat of {len(users)} user messages", CHAT)
    return users[0] if users else ""


def _content(content: object, role: str, where: str) -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = list(content) if _is_list(content) else [content]
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        used = {"text"} | ({"type"} if isinstance(part, Mapping) and part.get("type") in (None, "text") else set())
        more = [name for name, value in part.items() if name not in used and value] if isinstance(part, Mapping) else []
        if not isinstance(text, str) or more:
            problem = f"{where}: the prompt is a chat whose {role} message holds {shortened(part)}"
            raise UserError(problem, "a prompt is text alone; an image belongs in the field `image` of the record")
        texts.append(text)
    return " ".join(texts)


def _parsed(text: str, where: str) -> list[object]:
    """The messages of a chat that was written into a field of text, as JSON or as Python shows it."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if _is_list(value) else [value]
    raise UserError(f"{where}: the prompt begins like a chat, but cannot be read as one: {shortened(text)}", CHAT)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def shortened(value: object) -> str:
    """A value for an error, on one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
