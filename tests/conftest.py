"""Fixtures shared by all tests: one thread, no network, and the folders of the tiny models."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# tests/support/forks.py forks this process, which neither threads of OpenMP nor those of a CUDA device would survive
os.environ["OMP_NUM_THREADS"] = "1"
if not any("tests/device" in word for word in sys.argv):  # a device is seen where its tests alone are asked for
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# read with the import of gcsfs: else it asks for real credentials at every turn, and machines of Google's for them
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["NO_GCE_CHECK"] = "true"

# what a batch system, torchrun or a user told this process is not meant for the runs of the tests
for name in [*os.environ]:
    if name.startswith(("SLURM_", "RUSHES_", "WANDB_", "AWS_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ["RUSHES_TRUSTED"] = tempfile.mkdtemp(prefix="rushes-trusted-")  # and not in the home of who runs the tests
atexit.register(shutil.rmtree, os.environ["RUSHES_TRUSTED"], ignore_errors=True)

# Modules that take longest, which `make test` begins with: one that came last would leave the other process idle.
LONGEST = (
    "test_words", "test_slurm", "test_parallel", "test_packaging", "test_examples", "test_first_gpu",
    "test_store_loop", "test_cli", "test_light", "test_workers", "test_store", "test_shards_kill", "test_report",
    "test_ocr", "test_score_run",
)  # fmt: skip

# Modules that `--cover` leaves out: they take long, and most of the lines they run are also
# run by other modules, or run in child processes.
UNCOVERED = (
    *LONGEST, "test_store_hub", "test_train", "test_export", "test_train_objectives", "test_experts", "test_card",
    "test_base_lora", "test_memory", "test_signals", "test_processes", "test_lora_forms", "test_lora_start",
    "test_live_report", "test_docs", "test_recognisers", "test_full_disk", "test_bit_flips", "test_marginals",
    "test_broken_samples", "test_memory_fake", "test_memory_sums",
)  # fmt: skip

# A busy machine is no failure, and the same code has the same result: `--hypothesis-profile search` looks elsewhere.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("patient", settings.get_profile("search"), derandomize=True, max_examples=30)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cover`: the lines that the shorter test modules run, for `make test COVER=1`."""
    parser.addoption("--cover", action="store_true", help="measure the coverage of the shorter test modules")


def pytest_configure(config: pytest.Config) -> None:
    """Start to measure before anything is imported: the lines of a module's body run with its import."""
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if config.getoption("--cover") and runs_tests:
        config.pluginmanager.register(Covered())


class Covered:
    """The coverage of imports, collection and the modules that are not in `UNCOVERED`, in this process alone."""

    def __init__(self) -> None:
        from coverage import Coverage

        self._measured = Coverage(
            config_file=False, source=["rollout", "score", "shards", "train"], source_pkgs=["cli"], omit=["*/here/*"],
            data_file="build/coverage/light/data", data_suffix=True,
        )  # fmt: skip
        self._measured.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure one test, or leave it out."""
        if item.path.stem not in UNCOVERED:
            return (yield)
        self._measured.stop()
        try:
            return (yield)
        finally:
            self._measured.start()

    def pytest_sessionfinish(self) -> None:
        """Write what was measured."""
        self._measured.stop()
        self._measured.save()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first, the others after them as they come."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Make this process one that can be forked cheaply, and whose children can train.

    What is imported by now stays: the garbage collector need not walk it, and forks need not copy it, ever again.
    The first backward pass of a process starts a thread for every device, and then no child of it can compute one.
    Fake tensors make devices appear, so the first one is here, before them.
    """
    if torch := sys.modules.get("torch"):
        torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> Iterator[None]:
    """End the processes that a failed test has left behind, and forget which worker a command was here."""
    yield
    if "tests.support.forks" in sys.modules:
        sys.modules["tests.support.forks"].end_all()
    if "shards.process.machine" in sys.modules:
        sys.modules["shards.process.machine"].take_place((0, 1))


def _tiny(layout: str, factory: pytest.TempPathFactory) -> Path:
    import torch

    from tests.support import tiny_models

    torch.set_num_threads(1)
    return tiny_models.save(layout, factory.mktemp("models") / layout)


@pytest.fixture(scope="session")
def tiny_t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to video, one expert (as Wan2.1)."""
    return _tiny("t2v", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_t2v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to video, two experts, boundary 0.875 (as Wan2.2 T2V-A14B)."""
    return _tiny("t2v2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_i2v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image to video, two experts, 36 input channels, boundary 0.9 (as Wan2.2 I2V-A14B)."""
    return _tiny("i2v2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text or image to video, a timestep for every token, 48 channels (as Wan2.2 TI2V-5B)."""
    return _tiny("ti2v", tmp_path_factory)
