"""What VideoAlign reads: the released prompt template, taken from the user's own copy, and the chat around it.

The template is part of the released model's input format and is not shipped here. It is read from a VideoAlign
checkout, whose `prompt_template.py` is parsed and never run, or from a text file. The chat is Qwen2-VL's own template.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
import string
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
VIDEO_TOKEN = "<|video_pad|>"
CONSTANT = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
FIELD = "{text_prompt}"
# VQ and MQ come before the prompt: with causal attention they cannot depend on it, which is why they may be cached.
ORDER = (REWARD_TOKENS[0], REWARD_TOKENS[1], FIELD, REWARD_TOKENS[2])


def read_template(path: str | Path) -> str:
    """The prompt template in a VideoAlign checkout, a `prompt_template.py`, or a text file that holds it alone.

    Warns when the text is not the released one. Raises UserError when there is none or it cannot serve as a template.
    """
    place = Path(path) / "prompt_template.py" if Path(path).is_dir() else Path(path)
    try:
        content = place.read_bytes().decode()  # bytes: blanks and line ends count
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read VideoAlign's prompt template at {place}: {error}",
            "give `template` the folder of a VideoAlign checkout, or a text file that holds the template",
        ) from None
    template = _constant(place, content) if place.suffix == ".py" else content
    _check_template(place, template)
    found = hashlib.sha256(template.encode()).hexdigest()
    if found != TEMPLATE_SHA256:
        _warn(place, found)
    return template


@functools.cache  # once for a file and its content, however often it is read
def _warn(place: Path, found: str) -> None:
    logging.getLogger(__name__).warning(
        "%s: this is not the released prompt template (sha256 %s, released %s); scores will differ from the released "
        "model's. Blanks at line ends and the outer line ends belong to it.",
        place,
        found,
        TEMPLATE_SHA256,
    )


def _constant(place: Path, source: str) -> str:
    """The value of CONSTANT in Python source, which is parsed and never run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{place} is not Python: {error}", "take the file from a VideoAlign checkout") from None
    for node in reversed(tree.body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        named = any(isinstance(target, ast.Name) and target.id == CONSTANT for target in targets)
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    raise UserError(f"{place} assigns no string to {CONSTANT}", "take the file from a VideoAlign checkout")


def _check_template(place: Path, template: str) -> None:
    """UserError unless the template formats with `text_prompt` alone and holds each part of ORDER once, in order."""
    hint = "take the template from a VideoAlign checkout"
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"{place}: the template is not a format string: {error}", hint) from None
    counts = [template.count(part) for part in ORDER]
    positions = [template.find(part) for part in ORDER]
    if fields != ["text_prompt"] or counts != [1] * len(ORDER) or positions != sorted(positions):
        raise UserError(f"{place}: the template must hold {', '.join(ORDER)} once each, in this order", hint)


def load_tokenizer(base_model: Path, checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model with the three reward tokens added, or else the one saved with the checkpoint.

    Raises UserError when neither folder holds one, or a token VideoAlign needs is missing or is split.
    """
    from transformers import AutoTokenizer

    folders = [base_model, checkpoint / "tokenizer"]
    folder = next((f for f in folders if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"no tokenizer in {folders[0]} or {folders[1]}", "give `base_model` the folder of Qwen2-VL-2B-Instruct"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer library raises its own bare exceptions for damaged files
        raise UserError(f"cannot load the tokenizer in {folder}: {error}", "fetch the folder again") from None
    tokenizer.add_special_tokens({"additional_special_tokens": list(REWARD_TOKENS)})
    for token in (*REWARD_TOKENS, VIDEO_TOKEN):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(f"the tokenizer in {folder} has no {token}", "use the tokenizer of Qwen2-VL-2B-Instruct")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no padding token", "use the tokenizer of Qwen2-VL-2B-Instruct")
    return tokenizer


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """UserError when a prompt holds one of the tokenizer's added tokens: it would double what the model reads."""
    for token in tokenizer.get_added_vocab():
        if token in prompt:
            raise UserError(f"{name}: the prompt holds the special token {token}", "remove it from the prompt")


def chat(template: str, prompt: str, video_tokens: int) -> str:
    """The whole text of one request: the default system turn, the video, the filled template, the generation prompt."""
    question = template.format(text_prompt=prompt)
    video = f"<|vision_start|>{VIDEO_TOKEN * video_tokens}<|vision_end|>"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{video}{question}<|im_end|>\n<|im_start|>assistant\n"
    )
