"""A backward pass for each forward: the gradients of one pass for all, and less memory on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rollout.policy import sharding
from rollout.policy.sizes import peak_bytes
from rollout.ranks.backwards import Backwards
from rollout.ranks.world import World
from tests.support.tiny_models import tiny_transformer


def test_the_gradients_are_those_of_one_backward_pass() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 3)
    module, said = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), []

    def gradients(backwards: Backwards | None) -> list[Tensor]:
        module.zero_grad()
        a, b = (module(one) if backwards is None else backwards.cut(module(one)) for one in (x, y))
        loss = (a + 3.0 * (b - a)).pow(2).sum() + b.exp().mean()
        loss.backward() if backwards is None else backwards.run(loss)
        return [value.grad.clone() for value in module.parameters() if value.grad is not None]

    apart = Backwards(said.append)
    for _ in range(2):
        torch.testing.assert_close(gradients(apart), gradients(None))
    assert said == [False, True] * 2


def test_a_forward_that_the_loss_does_not_need_is_left_out() -> None:
    said: list[bool] = []
    module, backwards = nn.Linear(2, 2), Backwards(said.append)
    kept, _ = (backwards.cut(module(torch.ones(1, 2))) for _ in range(2))
    backwards.run(kept.sum())
    assert said == [True]
    assert module.weight.grad is not None
    assert module.weight.grad.eq(1).all()


def test_a_forward_without_gradient_is_as_it_was() -> None:
    out = torch.ones(3)
    assert Backwards().cut(out) is out


@pytest.fixture
def eight_ranks() -> Iterator[World]:
    """The first of eight ranks, of which the others send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield World(fsdp_mesh=init_device_mesh("cpu", (8,), mesh_dim_names=("fsdp",)))
    dist.destroy_process_group()


def test_no_gradient_of_a_block_waits_for_the_other_forward(eight_ranks: World) -> None:
    """In one pass for both forwards of guidance, those of all blocks do."""
    module: Any = WanTransformer3DModel.from_config({**dict(tiny_transformer(1).config), "num_layers": 6})
    block = sum(4 * value.numel() for value in module.blocks[0].parameters())
    module.enable_gradient_checkpointing()  # or activations make room for gradients
    experts = sharding.distribute({0: module}, eight_ranks)
    x, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 4, module.config.text_dim)

    def step(backwards: Backwards | None) -> None:
        outs = [experts(0, x, torch.tensor([500.0]), scale * text) for scale in (1.0, -1.0)]
        a, b = outs if backwards is None else map(backwards.cut, outs)
        loss = (a + 3.0 * (b - a)).pow(2).sum()
        loss.backward() if backwards is None else backwards.run(loss)

    step(None)  # afterwards the sharded gradients are there
    together, apart = (peak_bytes(partial(step, one), module) for one in (None, sharding.backwards(experts)))
    assert together - apart > 3 * block
