"""Step 5: the same velocity, bit for bit, with and without a gradient, after a swap, and in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.found import Finding, Place, difference
from bench.gpu.models import Case
from rollout.policy import Policy
from shards.config import ModelConfig


def velocities(place: Place, case: Case) -> Iterator[Finding]:
    """Whether ratios can be 1: rollout and gate compute without a gradient, the update with one."""
    policy, seed = place.policy(case), 11
    policy.experts.become(None)
    put_on(policy, case, seed)
    policy.experts.use(0)
    with torch.no_grad():
        first = velocity(policy, case)
        yield Finding(5, f"{case}: twice without gradient", *difference(first, velocity(policy, case)))
    yield Finding(5, f"{case}: with gradient", *difference(first, velocity(policy, case).detach()))
    module = policy.experts.module(0)
    module.enable_gradient_checkpointing()  # type: ignore[operator]
    yield Finding(5, f"{case}: with gradient checkpointing", *difference(first, velocity(policy, case).detach()))
    module.disable_gradient_checkpointing()  # type: ignore[operator]
    policy.experts.use(None)
    policy.experts.use(0)
    with torch.no_grad():
        yield Finding(5, f"{case}: after it left the device and came back", *difference(first, velocity(policy, case)))
    ours = digest(first)
    policy.experts.become(None)
    theirs = place.in_a_process(_elsewhere, str(policy.layout.folder), str(place.device), case, seed)
    same = ours == theirs
    yield Finding(5, f"{case}: in another process", "equal" if same else f"{theirs[:8]} is not {ours[:8]}", same)


def put_on(policy: Policy, case: Case, seed: int) -> None:
    """An adapter that changes the velocity, the same for a seed on every device."""
    policy.experts.add_lora(case.rank, 2.0 * case.rank, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in policy.experts.trainable(0):
            if ".lora_B." in name:
                value.copy_(0.01 * torch.randn(value.shape, generator=draw))


def velocity(policy: Policy, case: Case) -> Tensor:
    """The guided velocity of a state and embeddings drawn on the host."""
    draw = torch.Generator().manual_seed(5)
    shape = policy.layout.latent_shape(case.height, case.width, case.frames)
    module: Any = policy.experts.module(0)
    width = int(module.config.text_dim)
    x = torch.randn(case.batch, *shape, generator=draw).to(policy.device)
    prompt, negative = (
        torch.randn(case.batch, case.text_length, width, generator=draw).to(policy.device) for _ in range(2)
    )
    return policy.velocity(0, x, 700.0, prompt, negative, 4.0)


def digest(tensor: Tensor) -> str:
    """sha256 of the bits of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def _elsewhere(folder: str, device: str, case: Case, seed: int) -> str:
    policy = Policy.of(ModelConfig(path=folder, dtype=case.dtype, device=device, text_length=case.text_length))
    put_on(policy, case, seed)
    policy.experts.use(0)
    return digest(velocity(policy, case))
