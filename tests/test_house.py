"""The rules of the house: who may import whom, and what stays out of memory until it is needed."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("cli", "shards", "rollout", "score", "train", "bench")
ALLOWED = {
    "shards": {"shards"},
    "rollout": {"rollout", "shards"},
    "score": {"score", "shards"},
    "train": {
        "train",
        "shards",
        "rollout.transitions",
        "rollout.schedule",
        "rollout.policy",
        "rollout.step",
        "rollout.ranks.world",
        "rollout.ranks.meet",
    },
}
YARDSTICK = "import asyncio, email.mime.text, http.server, unittest.mock, xml.dom.minidom"
YARD = 0.12  # seconds of processor that it takes where the limits of the tests were set
HEAVY = ("torch", "diffusers", "transformers", "pandas", "pyarrow", "easyocr", "matplotlib", "av")


def imports(path: Path, nested: bool = True) -> set[str]:
    """Dotted names that a file imports; without `nested` only those that importing the file itself executes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if nested else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def forbidden(package: str, path: Path) -> list[str]:
    """Imports of ours in a file of `package` that the rules do not allow."""
    found = [name for name in imports(path) if name.partition(".")[0] in OURS]
    return [name for name in found if not any(name == rule or name.startswith(f"{rule}.") for rule in ALLOWED[package])]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    broken = {}
    for path in (ROOT / package).rglob("*.py"):
        # `from rollout import policy` names the package itself too
        wrong = [name for name in forbidden(package, path) if name != "rollout" or package != "train"]
        if wrong:
            broken[str(path.relative_to(ROOT))] = wrong
    assert not broken


def test_the_rule_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from train.run import train\n")
    assert sorted(forbidden("score", path)) == ["train.run", "train.run.train"]


def test_nobody_imports_the_command_line() -> None:
    files = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in files if "cli" in imports(path)]


def test_only_the_policy_touches_diffusers_models() -> None:
    files = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    users = {
        path.relative_to(ROOT).as_posix() for path in files if any(n.startswith("diffusers") for n in imports(path))
    }
    allowed = {name for name in users if name.startswith("rollout/policy") or name == "rollout/words/pretrain.py"}
    assert users - allowed <= {"rollout/grids.py"}  # the grids ask diffusers' own schedulers for their sigmas


@pytest.mark.parametrize(
    "path", sorted((ROOT / "shards").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_the_ground_floor_imports_nothing_heavy(path: Path) -> None:
    top = {name.partition(".")[0] for name in imports(path, nested=False)}
    assert not top & set(HEAVY)


def test_every_file_says_what_lives_there() -> None:
    files = [path for package in (*ALLOWED, "bench", "tests") for path in (ROOT / package).rglob("*.py")]
    silent = [
        path for path in files if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not silent


def loaded_by(*arguments: str, before: str = "") -> set[str]:
    """Heavy modules in memory after the command line has run with these arguments, in a process of its own."""
    code = (
        f"import sys, atexit\n{before}\n"
        f"sys.argv = ['rushes', *{list(arguments)!r}]\n"
        f"atexit.register(lambda: print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "import cli\ncli.main()\n"
    )
    result = in_python(code)
    line = next(line for line in result.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


def in_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which compiles at most once what it imports, whatever this shell has set."""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def seconds_of_processor(work: Callable[[], object], enough: float) -> float:
    """What the processes that `work` starts take: the least of some tries, for a core that others use is slower.

    Where that is not `enough`, they are seconds of a machine as fast as the one that the limits come from.
    """
    found, yards = [], []
    for _ in range(4):
        found.append(spent(work))
        if found[-1] < enough:
            return found[-1]
        yards.append(spent(lambda: in_python(YARDSTICK)))
    return min(found) * YARD / max(YARD, min(yards))


def spent(work: Callable[[], object]) -> float:
    """Seconds of processor of the processes that end meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_help_is_light() -> None:
    assert loaded_by("--help") == set()
    assert loaded_by("train", "--help") == set()


def test_the_light_test_can_fail() -> None:
    assert loaded_by("--help", before="import av") == {"av"}


def test_a_thousand_samples_are_inspected_in_two_seconds_of_processor_and_without_torch(tmp_path: Path) -> None:
    from shards import sidecar
    from shards.writer import seal
    from tests.shard_fixtures import advantage_frame, fill, make_video, planned_stage, score_frame

    stage, video = planned_stage(tmp_path, groups=63, group_size=16, groups_per_shard=7), make_video(0)
    for shard in range(stage.expected()):
        fill(stage, shard, video=video)
        seal(stage, shard, {})
        sidecar.write_scores(stage, shard, "ocr-00000000", score_frame(stage, shard), {})
        sidecar.write_advantages(stage, shard, "00000000", advantage_frame(stage, shard), {})
    (tmp_path / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    command = ("inspect", str(tmp_path), "--sort", "-reward", "--format", "csv", "--out", str(tmp_path / "all.csv"))
    loaded = set[str]()
    assert seconds_of_processor(lambda: loaded.update(loaded_by(*command)), 2.0) < 2.0
    assert len((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()) == 1 + 63 * 16
    assert not loaded & {"torch", "diffusers", "transformers", "easyocr"}
