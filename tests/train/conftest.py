"""What several tests of training begin with; each file has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.policy import Policy
from shards.run import Run
from tests.support import training


@pytest.fixture(scope="module")
def policy(tiny_t2v2: Path) -> Policy:
    """The tiny model of two experts, on the CPU."""
    return Policy.load(str(tiny_t2v2), device="cpu", text_length=training.TEXT_LENGTH)


@pytest.fixture(scope="module")
def rolled(tiny_t2v2: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Iteration 0 sampled and scored, not trained."""
    run = training.make_run(tmp_path_factory.mktemp("training") / "run", tiny_t2v2)
    training.advise(training.roll(run, 0, policy))
    return run
