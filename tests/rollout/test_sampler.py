"""Chunks by hand: which seed each noise has, which states are kept and how they are rounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.sampler import Sampler, State
from rollout.step import StepInputs, take_step
from rollout.transitions import noise, noise_seed
from shards.plan import Chunk
from tests.support.shard_fixtures import SHAPE, WINDOW, make_plan, plan_of

SEED, ITERATION = 11, 3
GROUPS = ("i000003-p000000", "i000003-p000001")
LAYOUT = SimpleNamespace(latent_shape=lambda *_: SHAPE)
POLICY: Any = SimpleNamespace(
    layout=LAYOUT, device=torch.device("cpu"), text=SimpleNamespace(pad=lambda text, count: text),
    velocity=lambda expert, x, *_: 0.5 * x, free_mask=lambda *_: None, impose=lambda x, _: x,
)  # fmt: skip


def sampler(**plan: Any) -> Sampler:
    return Sampler(POLICY, plan_of(make_plan(ITERATION, seed=SEED, **plan)), "0" * 64)


def chunk_of(group: str, *samples: int) -> Chunk:
    return Chunk(tuple((group, sample) for sample in samples))


def drawn(group: int, samples: tuple[int, ...], step: int, iteration: int = ITERATION) -> Tensor:
    """The noise of samples of a group, from its address."""
    seeds = [noise_seed(SEED, iteration, group, sample, step) for sample in samples]
    return torch.stack([noise(SHAPE, seed=seed) for seed in seeds])


@pytest.mark.parametrize("group", [0, 1])
def test_every_noise_has_the_seed_of_its_address(group: int) -> None:
    one, chunk = sampler(), chunk_of(GROUPS[group], 1, 2)
    assert torch.equal(one.start(chunk).x, drawn(group, (1, 2), -1))
    for step in WINDOW:
        found = one._noise(chunk, step, torch.device("cpu"))
        assert found is not None
        assert torch.equal(found, drawn(group, (1, 2), step))
    assert one._noise(chunk, 0, torch.device("cpu")) is None


def test_a_group_may_begin_from_one_noise_and_then_draws_its_own() -> None:
    one, chunk = sampler(same_initial_noise=True), chunk_of(GROUPS[1], 1, 2)
    assert torch.equal(one.start(chunk).x, drawn(1, (0, 0), -1))
    found = one._noise(chunk, WINDOW[0], torch.device("cpu"))
    assert found is not None
    assert torch.equal(found, drawn(1, (1, 2), WINDOW[0]))


def test_an_evaluation_takes_the_same_noise_in_every_iteration() -> None:
    one = sampler(kind="eval")
    assert torch.equal(one.start(chunk_of(GROUPS[0], 0)).x, drawn(0, (0,), -1, iteration=-1))


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_states_before_and_after_each_window_step_are_kept_as_stored(storage: str) -> None:
    one, chunk = sampler(storage_dtype=storage), chunk_of(GROUPS[0], 0, 1)
    state, dtype = one.start(chunk), getattr(torch, storage)
    assert torch.equal(state.x, drawn(0, (0, 1), -1).to(dtype).float())
    text = {"prompt": torch.zeros(1), "negative": torch.zeros(1)}
    for _, steps in one.phases:
        one.advance(chunk, state, {GROUPS[0]: text}, steps)
    x, kept, scores = drawn(0, (0, 1), -1).to(dtype).float(), {}, {}
    for step in range(one.schedule.steps):
        fresh = drawn(0, (0, 1), step) if step in WINDOW else None
        taken = take_step(POLICY, one.schedule, step, StepInputs(x, text["prompt"], None), fresh, dtype)
        x, kept[step + 1] = taken.x, taken.x
        if taken.log_prob is not None:
            scores[step] = taken.log_prob
    assert sorted(state.kept) == [1, 2, 3, 4]
    assert sorted(state.log_prob) == WINDOW
    for number, value in state.kept.items():
        assert value.dtype == dtype
        assert torch.equal(value.float(), kept[number])
    assert all(torch.equal(state.log_prob[step], scores[step]) for step in WINDOW)
    again = State.from_tensors(state.to_tensors(), 2)
    assert again is not None
    kept_again, kept_before = again.to_tensors(), state.to_tensors()
    assert list(kept_again) == list(kept_before)
    assert all(torch.equal(kept_again[name], value) for name, value in kept_before.items())
    assert State.from_tensors(state.to_tensors(), 3) is None
    assert State.from_tensors({name: value[0] for name, value in state.to_tensors().items() if value.dim()}, 2) is None
