"""That the mathematics learns: the sampler's transitions and the trainer's losses on a problem of two dimensions.

The base model is exact: for data N(0, I) the velocity is (2s-1) x / ((1-s)² + s²). A small network, zero at first, is
added to it and trained by GRPO on stored transitions to bring samples closer to a point. No file, no Wan model.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rollout.transitions import kernel as kernel_of
from rollout.transitions import log_prob, transition
from train.objectives.estimators import adaptive_weight, compare
from train.objectives.losses import clip_advantage, held_loss, policy_loss
from train.order import Unit, minibatches

STEPS, GROUPS, SIZE = 10, 8, 16
SIGMAS = [3.0 * u / (1.0 + 2.0 * u) for u in ((STEPS - i) / STEPS for i in range(STEPS + 1))]
TARGET = torch.tensor([1.5, 0.0])
Stored = dict[int, tuple[Tensor, Tensor, Tensor]]  # step -> x, x_next, log_prob; under STEPS the final x three times


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        features = torch.tensor([sigma, math.sin(3 * sigma), math.cos(3 * sigma)]).expand(len(x), 3)
        base = (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * x
        return base + self.net(torch.cat([x, features], 1))


def score(model: Velocity, law: str, form: str, eta: float, step: int, x: Tensor) -> tuple[Tensor, float]:
    return transition(law, form, x, model(x, SIGMAS[step]), SIGMAS[step], SIGMAS[step + 1], eta,
                      sigma_1=SIGMAS[1])  # type: ignore[arg-type]  # fmt: skip


@torch.no_grad()
def roll(model: Velocity, kernel: tuple[str, str, float], generator: torch.Generator) -> tuple[Stored, Tensor]:
    """Transitions of all steps but the last, which has no noise, and the rewards [groups, size]."""
    x = torch.randn(GROUPS, 1, 2, generator=generator).expand(GROUPS, SIZE, 2).reshape(-1, 2)
    stored: Stored = {}
    for step in range(STEPS):
        mean, std = score(model, *kernel, step, x)
        x_next = mean + std * torch.randn(x.shape, generator=generator)
        if std > 0:
            stored[step] = (x, x_next, log_prob(x_next, mean, std))
        x = x_next
    stored[STEPS] = (x, x, x)
    return stored, -(x - TARGET).norm(dim=1).view(GROUPS, SIZE)


@pytest.mark.parametrize("kernel", [("flow-sde", "euler-maruyama", 0.7), ("flow-sde", "exact", 0.7),
                                    ("dance-sde", "euler-maruyama", 0.3), ("cps", "exact", 0.8),
                                    ("dpm-sde", "exact", 1.0)], ids=str)  # fmt: skip
def test_reward_rises_under_every_law(kernel: tuple[str, str, float]) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Velocity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    history = []
    for iteration in range(20):
        stored, rewards = roll(model, kernel, generator)
        history.append(rewards.mean().item())
        spread = rewards.std(dim=1, correction=0, keepdim=True)
        advantage = clip_advantage((rewards - rewards.mean(dim=1, keepdim=True)) / spread, 5.0)
        units = [
            Unit(0, 0, str(group), tuple(range(SIZE)), step)
            for group in range(GROUPS)
            for step in stored
            if step < STEPS
        ]
        for number, batch in enumerate(minibatches(units, seed=0, iteration=iteration, expert=0, updates=2)):
            optimizer.zero_grad()
            for step in sorted({unit.step for unit in batch}):
                groups = [int(unit.group) for unit in batch if unit.step == step]
                rows = torch.cat([torch.arange(group * SIZE, (group + 1) * SIZE) for group in groups])
                x, x_next, old = (value[rows] for value in stored[step])
                mean, std = score(model, *kernel, step, x)
                log_ratio = log_prob(x_next, mean, std) - old
                if number == 0:
                    assert log_ratio.abs().max() < 1e-5
                (policy_loss(log_ratio, advantage[groups].flatten(), 0.05).loss.sum() / (len(batch) * SIZE)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert sum(history[-3:]) / 3 - sum(history[:3]) / 3 > 0.25


@pytest.mark.parametrize("estimator", ["noise", "endpoint", "fresh"])
def test_reward_rises_under_every_estimator_with_a_hold(estimator: str) -> None:
    """The same problem with the targets and weights of `train.objectives.estimators`; an update sees everything."""
    torch.manual_seed(0)
    generator, kernel = torch.Generator().manual_seed(1), ("flow-sde", "exact", 0.7)
    model, sampler = Velocity(), Velocity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    history = []
    for _ in range(20):
        sampler.load_state_dict(model.state_dict())
        stored, rewards = roll(sampler, kernel, generator)
        history.append(rewards.mean().item())
        spread = rewards.std(dim=1, correction=0, keepdim=True)
        advantage = clip_advantage((rewards - rewards.mean(dim=1, keepdim=True)) / spread, 5.0).flatten()
        for _ in range(4):
            optimizer.zero_grad()
            for step in range(1, STEPS - 1):
                x, old, target = asked(estimator, sampler, kernel, stored, step, generator)
                weight = adaptive_weight(old, target, SIGMAS[step])
                compared = compare(model(x, SIGMAS[step]), old, target, weight)
                held_loss(compared.pull, compared.square, advantage, 1.0, 10.0).loss.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert sum(history[-3:]) / 3 - sum(history[:3]) / 3 > 0.25


def asked(
    estimator: str, sampler: Velocity, kernel: tuple[str, str, float], stored: Stored, step: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """State, velocity of the policy that sampled, and target of a step, [n, 2] each."""
    (x, x_next, _), x0, sigma = stored[step], stored[STEPS][0], SIGMAS[step]
    if estimator == "fresh":
        x = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=rng)
    with torch.no_grad():
        old = sampler(x, sigma)
        mean, _ = score(sampler, *kernel, step, x)
    if estimator == "noise":
        law, form, eta = kernel
        slope = kernel_of(law, form, sigma, SIGMAS[step + 1], eta, SIGMAS[1]).on_velocity  # type: ignore[arg-type]
        return x, old, old + (x_next - mean) / slope
    return x, old, (x - x0) / sigma
