"""The catalogue of mutations stays true: each text stands once in the source, and its change can be compiled."""

from __future__ import annotations

import ast

from tests.mutants.catalogue import MUTATIONS
from tests.mutants.mutation import ROOT


def test_every_mutation_applies_exactly_once() -> None:
    assert len(MUTATIONS) >= 200
    assert len({(mutant.path, mutant.before, mutant.after) for mutant in MUTATIONS}) == len(MUTATIONS)
    for mutant in MUTATIONS:
        changed = mutant.applied()
        assert changed != (ROOT / mutant.path).read_text(encoding="utf-8")


def test_every_mutation_names_tests_that_are_there() -> None:
    functions: dict[str, set[str]] = {}
    for name in {name for mutant in MUTATIONS for name in mutant.tests}:
        path, _, node = name.partition("::")
        if path not in functions:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions[path] = {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}
        assert not node or node.partition("[")[0] in functions[path], name
