"""The rules of the house: who may import whom, what a name means, how large a folder, a file or a function may be."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.cost import HEAVY

ROOT = Path(__file__).parents[2]
PACKAGES = ("shards", "rollout", "score", "train")
OURS = ("cli", *PACKAGES, "bench", "tests")

FOLDERS: dict[str, set[str]] = {
    "shards": {"shards/records", "shards/store"},
    "shards/compare": {"shards", "shards/process", "shards/report", "shards/settings", "shards/store"},
    "shards/doctor": {"shards", "shards/store"},
    "shards/inspect": {"shards", "shards/records", "shards/store", "shards/text"},
    "shards/notebook": {"shards", "shards/inspect", "shards/records", "shards/report"},
    "shards/presets": set(),
    "shards/process": {"shards"},
    "shards/records": {"shards"},
    "shards/report": {"shards", "shards/inspect", "shards/process", "shards/records", "shards/settings", "shards/store",
                      "shards/text", "shards/workers"},
    "shards/settings": {"shards", "shards/records", "shards/text"},
    "shards/store": {"shards", "shards/records"},
    "shards/text": {"shards", "shards/store"},
    "shards/trackers": {"shards", "shards/process", "shards/records", "shards/settings"},
    "shards/verify": {"shards", "shards/process", "shards/records", "shards/store", "shards/workers"},
    "shards/workers": {"shards", "shards/process", "shards/records"},
    "rollout": {"rollout/policy", "rollout/policy/kernels", "rollout/prompts", "rollout/ranks", "rollout/words",
                "shards", "shards/process", "shards/records", "shards/text", "shards/workers"},
    "rollout/export": {"rollout", "rollout/lora", "rollout/policy", "shards", "shards/process", "shards/records",
                       "shards/report", "shards/store"},
    "rollout/lora": {"rollout/policy", "shards", "shards/records", "shards/store"},
    "rollout/memory": {"rollout", "rollout/lora", "rollout/policy", "rollout/ranks", "shards"},
    "rollout/policy": {"rollout/lora", "rollout/policy/kernels", "rollout/ranks", "rollout/words", "shards",
                       "shards/process", "shards/records", "shards/store", "shards/text"},
    "rollout/policy/kernels": {"rollout/lora", "rollout/policy", "shards"},
    "rollout/prompts": {"rollout/policy", "rollout/words", "shards", "shards/process", "shards/records", "shards/store",
                        "shards/text"},
    "rollout/ranks": {"shards", "shards/process"},
    "rollout/words": set(),
    "score": {"score/catalogue", "score/ocr", "shards", "shards/process", "shards/records", "shards/store",
              "shards/settings", "shards/text", "shards/workers"},
    "score/audit": {"score", "shards", "shards/records", "shards/verify"},
    "score/catalogue": {"score", "shards"},
    "score/ocr": {"score", "shards", "shards/text"},
    "score/videoalign": {"score", "shards"},
    "train": {"rollout", "rollout/policy", "rollout/ranks", "shards", "shards/process", "shards/records",
              "shards/store", "shards/trackers", "shards/workers", "train/experts", "train/objectives"},
    "train/experts": {"rollout", "rollout/memory", "rollout/policy", "rollout/ranks", "shards", "shards/process",
                      "shards/trackers", "shards/workers", "train"},
    "train/objectives": {"rollout", "shards", "shards/records"},
}  # fmt: skip
"""Every folder of the packages, and the other folders whose modules its own may import."""
ONLY = {
    ("train", "rollout"): {"lineage", "schedule", "step", "transitions"},
    ("train/experts", "rollout"): {"processes"},
    ("train/objectives", "rollout"): {"schedule", "transitions"},
    ("train/objectives", "shards/records"): {"schedule"},
    ("shards/store", "shards"): {"errors", "files", "locks"},
    ("shards/store", "shards/records"): {"opening"},
    ("shards/process", "shards"): {"errors"},
}
"""Where a folder may import only these modules of another one."""
FACE = {"shards": "shards.notebook.view"}
"""The one module above its own folder that a package may import, to hand it to those who import the package."""
DIFFUSERS = {
    "rollout/sigmas.py": "the sigmas of its schedulers",
    "rollout/words/pretrain.py": "makes the model `words`",
}

PACKAGE_MODULES = {"shards": 23, "rollout": 14, "score": 16, "train": 16}  # modules that lie in a package itself
MOST_MODULES = 12  # in any other folder
MOST_LINES = 350
LONG_FILES = {"rollout/words/pretrain.py": "one program: the whole training of the embedded model"}
LONGEST_BODY = 40  # lines of a function without its signature and docstring
MOST_ANY = 130  # words `Any` in cli.py and the packages, imports and docstrings included

MODULE_SAYS = "called as module.name, and the module says of what"
TWICE = {
    "Clip": "a clip on the page of a tracker, and the patches VideoAlign sees; neither module knows the other",
    "Entry": "an entry of a tensor file, and one of a store's listing; neither leaves its format",
    "Work": "one worker's way through the shards, and what a training carries along",
    "Worker": "a worker at work, and what `status` sees of one",
    "check": "checksums of tensors, one table beside a shard, and a signal to this process or to any rank",
    "checksum": "of an object as its store counts it, and of weights in memory",
    "describe": "one sample in full, and the steps of a schedule",
    "encode": MODULE_SAYS,
    "groups": "a report's clips by group, and the table of groups",
    "judge": "one text against the wanted one, and whole video files",
    "prove": "an export by loading it back, and the log-probs of shards by replaying them",
    "read": MODULE_SAYS,
    "read_scores": "the tables of one scorer, and those of all that a specification needs",
    "render": "the text of `status`, and that of `plan-memory`",
    "rollout": "by one process, and by several that call it",
    "select": "rows of a table, and rewards of a run",
    "show": "progress, and a sample in full",
    "split": "prompts for training and evaluation, scenes of `words`, and a list in equal parts",
    "sweep": "the spool of a shard, and claims of the dead",
    "write_advantages": "one table, and all of a stage",
}
"""Public names of two modules, each with what they stand for. A debt: no name is added without a good reason."""


# --- What the rules are checked on -----------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, nested: bool = True) -> set[tuple[str, str]]:
    """Imports as (module, name), the name empty for `import module`; without `nested` those on the top level alone."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree) if nested else iter(tree.body):
        if isinstance(node, ast.Import):
            found.update((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((node.module, alias.name) for alias in node.names)
    return found


def imported_modules(tree: ast.Module) -> set[str]:
    """Our modules that a file imports, inside functions and for types too."""
    names = {f"{module}.{name}" if f"{module}.{name}" in modules() else module for module, name in imports(tree)}
    return {name for name in names if name.partition(".")[0] in OURS}


def folder_of(module: str) -> str:
    """The folder in which a module lies, `shards/store`."""
    return modules()[module].parent.relative_to(ROOT).as_posix()


def is_allowed(user: str, used: str) -> bool:
    """Whether one module may import another one."""
    if used not in modules():
        return False
    here, there = folder_of(user), folder_of(used)
    only = ONLY.get((here, there))
    if FACE.get(user) == used:
        return True
    return here == there or (there in FOLDERS[here] and (only is None or used.rpartition(".")[2] in only))


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules that reach each other by their imports, as large as they are."""
    reach = {start: _reached(start, graph) for start in graph}
    around = {start: frozenset(one for one in found if start in reach.get(one, ())) for start, found in reach.items()}
    return {circle for circle in around.values() if circle}


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += graph.get(one, ())
    return found


def public_names(tree: ast.Module) -> Iterator[str]:
    """Functions and classes of a module's top level whose names have no underscore."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def names_of_two(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Public names that several modules define, with these modules."""
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for module, tree in trees.items():
        for name in public_names(tree):
            homes[name].append(module)
    return {name: found for name, found in homes.items() if len(found) > 1}


def long_functions(tree: ast.Module) -> list[str]:
    """Functions and methods whose body has more than LONGEST_BODY lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > LONGEST_BODY:
                found.append(node.name)
    return found


# --- Who imports whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(ROOT).as_posix() for path in modules().values()}))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    mine = [name for name in modules() if folder_of(name) == folder]
    broken = {
        f"{name} imports {used}"
        for name in mine for used in imported_modules(tree_of(modules()[name])) if not is_allowed(name, used)
    }  # fmt: skip
    assert not broken


def test_the_rules_of_folders_can_fail() -> None:
    assert is_allowed("train.replay", "rollout.step")
    assert not is_allowed("train.replay", "rollout.run")
    assert not is_allowed("score.run", "train.run")
    assert not is_allowed("shards.reader", "shards.verify.shards")
    assert not is_allowed("shards.run", "cli")
    assert is_allowed("shards", "shards.notebook.view")
    assert not is_allowed("shards.run", "shards.notebook.view")
    tree = ast.parse("def f():\n    from train.run import train\n    from shards.store import hub\n")
    assert imported_modules(tree) == {"train.run", "shards.store.hub"}


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions and for types count: a circle that is put off is a circle."""
    graph = {name: imported_modules(tree_of(path)) & modules().keys() for name, path in modules().items()}
    assert circles(graph) == set()


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == {frozenset("abc")}


def test_only_the_policy_imports_diffusers() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values() if any(module.startswith("diffusers") for module, _ in imports(tree_of(path)))
    }  # fmt: skip
    assert {name for name in users if not name.startswith(("rollout/policy/", "rollout/lora/"))} == DIFFUSERS.keys()


def in_shards() -> list[Path]:
    return [path for name, path in modules().items() if name.partition(".")[0] == "shards"]


@pytest.mark.parametrize("path", in_shards(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ground_floor_imports_nothing_heavy(path: Path) -> None:
    top = {module.partition(".")[0] for module, _ in imports(tree_of(path), nested=False)}
    assert not top & set(HEAVY)


# --- Names, and the size of things -----------------------------------------------------------------------------------


def test_a_public_name_has_one_home() -> None:
    found = names_of_two({name: tree_of(path) for name, path in modules().items()})
    assert found.keys() == TWICE.keys()


def test_names_of_two_homes_are_found() -> None:
    trees = {"one": "def look(): ...", "two": "class Eye:\n    def look(self): ...", "three": "def look(): ...\n_a = 1"}
    assert names_of_two({name: ast.parse(text) for name, text in trees.items()}) == {"look": ["one", "three"]}


def test_no_folder_is_too_full() -> None:
    folders: defaultdict[str, int] = defaultdict(int)
    for path in modules().values():
        folders[path.parent.relative_to(ROOT).as_posix()] += path.name != "__init__.py"
    assert folders.keys() == FOLDERS.keys()
    assert {
        folder: count for folder, count in folders.items() if count > PACKAGE_MODULES.get(folder, MOST_MODULES)
    } == {}


def test_every_folder_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["setuptools"]["packages"]) == {folder.replace("/", ".") for folder in FOLDERS}


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    long = {path.relative_to(ROOT).as_posix() for path, lines in lengths.items() if lines > MOST_LINES}
    assert long == LONG_FILES.keys()


def test_no_function_is_too_long() -> None:
    found = {name: long_functions(tree_of(path)) for name, path in modules().items()}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_long_functions_are_found() -> None:
    def source(lines: int) -> str:
        return 'def f(\n    a: int,\n) -> None:\n    """One.\n\n    Two.\n    """\n' + "    a += 1\n" * lines

    assert [long_functions(ast.parse(source(LONGEST_BODY + more))) for more in (0, 1)] == [[], ["f"]]


def test_signatures_name_their_types() -> None:
    """`Any` tells a reader nothing and hides mistakes from mypy; it is for what really may be anything."""
    files = [ROOT / "cli.py", *modules().values()]
    assert sum(len(re.findall(r"\bAny\b", path.read_text(encoding="utf-8"))) for path in files) <= MOST_ANY


def test_every_file_says_what_lives_there() -> None:
    files = [path for name in (*PACKAGES, "bench", "tests") for path in (ROOT / name).rglob("*.py")]
    assert not [path for path in files if path.stat().st_size and not ast.get_docstring(tree_of(path))]


def test_no_file_name_says_nothing() -> None:
    empty = {"ahead", "beacons", "board", "card", "common", "core", "crew", "freeze", "helper", "masters", "meet",
             "memos", "misc", "notes", "share", "stuff", "together", "tools", "utils"}  # fmt: skip
    assert not {name for name in modules() if name.rpartition(".")[2] in empty}
