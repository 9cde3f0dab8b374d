"""A policy whose forwards several ranks compute together, each with a part of the tokens; its weights stay whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffusers.hooks.context_parallel import remove_context_parallel
from diffusers.models.attention import AttentionModuleMixin

from rollout.policy.sharding import check_ulysses, split_tokens

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

    from rollout.policy import Policy
    from rollout.ranks.world import World


@contextmanager
def shared_tokens(policy: Policy, size: tuple[int, int, int], world: World) -> Iterator[None]:
    """Inside, the ranks of each Ulysses group must call the policy with the same inputs at the same time.

    `size` is (height, width, frames). Every rank gets the whole output, the same bits on all; they differ from those of
    one rank alone by rounding, since a matrix product over fewer tokens may add up in another order.
    Raises UserError when the degree does not divide the model's heads or the video's tokens.
    """
    check_ulysses(
        policy.experts.module(policy.layout.expert_ids[0]), policy.layout.latent_shape(*size), world, "rollout.ulysses"
    )
    modules = [policy.experts.module(expert) for expert in policy.layout.expert_ids]
    for module in modules:
        split_tokens(module, world)
    try:
        yield
    finally:
        for module in modules:
            _join_tokens(module)


def _join_tokens(module: WanTransformer3DModel) -> None:
    """Undo what split_tokens did; diffusers has no call for it."""
    remove_context_parallel(module, module._cp_plan)
    for part in module.modules():
        if isinstance(part, AttentionModuleMixin):
            part.processor._parallel_config = None
    module._parallel_config = None
