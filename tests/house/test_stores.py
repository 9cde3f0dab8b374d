"""The rules of stores: who may name them, that the files of a run know none of them, and where they may remember."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.test_house import ROOT, folder_of, imported_modules, imports, modules, tree_of

STORE, FOLDER = "shards.store", "shards/store"
LENT = {
    f"{STORE}.fetch": {"fetched", "fetched_file", "fetched_model", "local_name"},
    f"{STORE}.files": {"files_at", "of_policy"},
    f"{STORE}.hashes": {"sha256_once"},
    f"{STORE}.objects": {"PACKAGES"},
    f"{STORE}.urls": {"beside", "full_path", "in_shell", "last_name", "named_here", "shown"},
}
"""What code outside of shards/store may import of it: files, local copies, and the names of things; no question whether
something is in a store, whose answer is in the object `files` that a run hands down."""
KINDS = {"LocalFiles", "MirroredFiles"}
CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
CACHES = {"cache", "lru_cache", "cached"}


def questions(tree: ast.Module) -> Iterator[str]:
    """Where a module imports from shards.store what is not lent, or asks of which kind some files are."""
    for module, name in imports(tree):
        if module.startswith(STORE) and name not in LENT.get(module, ()):
            yield f"imports {name or module} of {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            asked = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            yield from (f"asks for {name}" for name in asked & KINDS)


def remembered(tree: ast.Module) -> Iterator[str]:
    """What a module keeps from call to call: names other than constants, constants that it changes, caches."""
    constants = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for name in (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)):
            constants.add(name)
            if not name.isupper():
                yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            uses = {one for use in node.decorator_list for one in ast.unparse(use).replace("(", ".").split(".")}
            yield from (node.name for _ in uses & CACHES)
        changed = node.func if isinstance(node, ast.Call) else node if isinstance(node, ast.Subscript) else None
        if isinstance(changed, ast.Attribute) and changed.attr in CHANGES and _is_one(changed.value, constants):
            yield ast.unparse(changed)
        if isinstance(changed, ast.Subscript) and not isinstance(changed.ctx, ast.Load):
            yield from ([ast.unparse(changed)] if _is_one(changed.value, constants) else [])


def _is_one(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def test_nobody_asks_where_a_run_lies() -> None:
    found = {name: list(questions(tree_of(path))) for name, path in modules().items() if folder_of(name) != FOLDER}
    found["cli"] = list(questions(tree_of(ROOT / "cli.py")))
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_files_of_a_run_know_no_store() -> None:
    records = {"shards.records.opening", "shards.records.strict_json"}
    assert imported_modules(tree_of(modules()["shards.files"])) == {"shards.errors", "shards.locks"} | records


def test_a_store_remembers_in_objects_alone() -> None:
    found = {name: list(remembered(tree_of(modules()[name]))) for name in modules() if folder_of(name) == FOLDER}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_rules_of_stores_can_fail() -> None:
    asked = "from shards.store.urls import is_url, shown\nfrom shards.store import files\nisinstance(a, LocalFiles)"
    assert len(list(questions(ast.parse(asked)))) == 3
    kept = """
A, B = {}, 3
C = []
_later = set()
@functools.cache
def f():
    global B
    A["x"] = 1
    C.append(A["x"])
"""
    assert sorted(remembered(ast.parse(kept))) == ["A['x']", "B", "C.append", "_later", "f"]
