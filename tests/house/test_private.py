"""Tests go through the public face: how many places reach for a private name of ours, and which of others' may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
MOST = 30  # places in all of tests/; a debt, which only shrinks
FOREIGN = {
    "_exit": "of os: the end of a fork, which must not end pytest",
    "_processes": "of an executor: no other way to the process that is to be killed",
    "_wait_until_ready": "of the fake of Google's storage, whose start is waited for otherwise here",
    "_replace": "of a named tuple: its documented method",
    "_repr_html_": "of IPython's protocol",
    "_dynamo": "of torch",
    "_AttentionBackendRegistry": "of diffusers: which attention is chosen",
    "_attention_backend": "of diffusers: the same of one layer",
}
"""Private names of other libraries that have no public form, or are public in truth."""
BY_NAME = ("setattr", "getattr", "delattr", "hasattr")


def is_private(name: str) -> bool:
    """Whether a name is of a module's or a class's own use; `__dict__` and its like belong to Python."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a file reads, replaces or imports from elsewhere, once for each place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in BY_NAME:
            words = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            names = [next((part for part in word.split(".") if is_private(part)), "") for word in words]
        else:
            names = []
        yield from (name for name in names if is_private(name))


def test_tests_seldom_reach_for_private_names() -> None:
    found = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in FOREIGN
    ]
    assert len(found) <= MOST, "\n".join(found)


def test_private_names_are_found() -> None:
    source = """
from rollout.plan import _prompts, check_stage
from torch import _dynamo
import rollout.plan
rollout.plan._batch(self._own, cls._own, module.__dict__)
monkeypatch.setattr(rollout.plan, "_batch", None)
monkeypatch.setattr("rollout.plan._batch", None)
monkeypatch.setattr(rollout.plan, "batch", "_text")
"""
    assert sorted(private_names(ast.parse(source))) == ["_batch", "_batch", "_batch", "_dynamo", "_prompts"]
