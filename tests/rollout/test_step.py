"""One step by hand: what the policy is asked, what is drawn, what is rounded, and which law or solver is used."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.schedule import step_std
from rollout.step import StepInputs, step_log_prob, step_mean, take_step
from rollout.transitions import clean_estimate, dpm_2m, euler, kernel, log_prob, noise, transition
from shards.records.schedule import Schedule

SIGMAS = (1.0, 0.875, 0.625, 0.25, 0.0)
X, PROMPT, NEGATIVE, DRAWN, BEFORE = (noise((2, 3, 2, 4, 4), seed=seed) for seed in range(5))


def schedule(law: Any = "flow-sde", form: Any = "euler-maruyama", eta: float = 0.7, solver: Any = "euler") -> Schedule:
    """Four steps, two of each expert, each with a guidance of its own."""
    return Schedule(
        sigmas=SIGMAS, timesteps=(1000.0, 875.0, 625.0, 250.0), experts=(0, 0, 1, 1), guidance=(4.0, 3.5, 3.0, 2.5),
        law=law, form=form, eta=eta, solver=solver,
    )  # fmt: skip


class Linear:
    """A policy that is half its state, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def velocity(self, expert: int, x: Tensor, t: float, *others: Any) -> Tensor:
        self.asked.append((expert, t, others))
        return 0.5 * x

    def free_mask(self, x: Tensor, condition: Tensor | None) -> None:
        return None


def inputs(before: Tensor | None = None) -> StepInputs:
    return StepInputs(X, PROMPT, NEGATIVE, None, before)


@pytest.mark.parametrize("step", range(4))
def test_the_policy_is_asked_for_the_step_as_scheduled(step: int) -> None:
    policy, plan = Linear(), schedule()
    take_step(policy, plan, step, inputs(), None, torch.float32)  # type: ignore[arg-type]
    expected = (plan.experts[step], plan.timesteps[step], (PROMPT, NEGATIVE, plan.guidance[step], None))
    assert policy.asked == [expected]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_is_mean_plus_std_times_noise_rounded_and_then_scored(step: int, storage: torch.dtype) -> None:
    plan = schedule()
    k = kernel("flow-sde", "euler-maruyama", SIGMAS[step], SIGMAS[step + 1], 0.7, SIGMAS[1])
    mean = k.on_x * X + k.on_velocity * 0.5 * X
    taken = take_step(Linear(), plan, step, inputs(), DRAWN, storage)  # type: ignore[arg-type]
    assert k.std not in (0.0, 1.0)
    assert torch.equal(taken.x, (mean + k.std * DRAWN).to(storage).float())
    assert taken.log_prob is not None
    assert torch.equal(taken.log_prob, log_prob(taken.x, mean, k.std))
    assert torch.equal(taken.clean, clean_estimate(X, 0.5 * X, SIGMAS[step]))
    scored = step_log_prob(Linear(), plan, step, inputs(), taken.x)  # type: ignore[arg-type]
    assert torch.equal(scored.log_prob, taken.log_prob)
    assert math.isclose(scored.std, k.std)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_without_noise_the_solver_of_the_schedule_is_used(storage: torch.dtype) -> None:
    v = 0.5 * X
    for solver, want in {
        "euler": euler(X, v, 0.625, 0.25), "dpm-2m": dpm_2m(X, v, 0.625, 0.25, (BEFORE, 0.875)),
    }.items():  # fmt: skip
        taken = take_step(Linear(), schedule(solver=solver), 2, inputs(BEFORE), None, storage)  # type: ignore[arg-type]
        assert torch.equal(taken.x, want.to(storage).float())
        assert taken.log_prob is None
    assert not torch.equal(euler(X, v, 0.625, 0.25), dpm_2m(X, v, 0.625, 0.25, (BEFORE, 0.875)))


def test_a_law_that_looks_back_is_given_the_step_before() -> None:
    plan = schedule("dpm-sde-2m", "exact", 1.0)
    for step, previous in ((0, None), (2, (BEFORE, SIGMAS[1]))):
        mean, std = transition(
            "dpm-sde-2m", "exact", X, 0.5 * X, SIGMAS[step], SIGMAS[step + 1], 1.0, sigma_1=SIGMAS[1], previous=previous
        )
        taken = take_step(Linear(), plan, step, inputs(BEFORE), DRAWN, torch.float32)  # type: ignore[arg-type]
        assert torch.equal(taken.x, mean + std * DRAWN)


def test_a_frame_that_is_given_does_not_count() -> None:
    mask = torch.ones(1, 1, 2, 1, 1)
    mask[:, :, 0] = 0
    policy = SimpleNamespace(velocity=lambda *_: 0.5 * X, free_mask=lambda *_: mask)
    taken = take_step(policy, schedule(), 1, inputs(), DRAWN, torch.float32)  # type: ignore[arg-type]
    k = kernel("flow-sde", "euler-maruyama", 0.875, 0.625, 0.7, SIGMAS[1])
    want = log_prob(taken.x[:, :, 1:], (k.on_x + 0.5 * k.on_velocity) * X[:, :, 1:], k.std)
    torch.testing.assert_close(taken.log_prob, want)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("law", "form"),
    [*((law, form) for law in ("flow-sde", "dance-sde", "wan-sde") for form in ("euler-maruyama", "exact")),
     *((law, "exact") for law in ("cps", "dpm-sde", "dpm-sde-2m"))],
)  # fmt: skip
def test_the_noise_of_a_step_tells_its_mean_under_every_law(law: str, form: str, step: int) -> None:
    """What `train.forwards.Forwards.sampled_mean` rests on: x' - std z, with the std of the schedule alone."""
    plan, policy = schedule(law, form, 0.5), Linear()
    before = BEFORE if law == "dpm-sde-2m" else None
    inputs = StepInputs(X, PROMPT, NEGATIVE, None, before)
    taken = take_step(policy, plan, step, inputs, DRAWN, torch.float32)
    mean = step_mean(plan, step, X, 0.5 * X, before)
    assert not torch.allclose(taken.x, mean, atol=1e-2)
    torch.testing.assert_close(taken.x - step_std(plan, step) * DRAWN, mean, rtol=0, atol=2e-6)
