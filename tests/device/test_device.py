"""On a CUDA device: the steps of `bench/first_gpu.py` with tiny models, and what they leave behind there.

    python -m pytest tests/device

The device is hidden from all other tests, which fork.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import first_gpu
from bench.gpu.found import Place

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is seen here"),
]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_step_finds_all_as_it_should_be(number: int, tmp_path: Path) -> None:
    place = Place(tmp_path, torch.device("cuda"), small=True, minutes=5)
    before = torch.cuda.memory_allocated()
    step = first_gpu.steps(first_gpu.parse(["--small"]))[number]
    found = first_gpu.run_all(place, {number: step}, lambda known: None)
    assert found
    assert [one for one in found if one.ok is False] == []
    place.forget()
    assert torch.cuda.memory_allocated() <= before + 2**20
