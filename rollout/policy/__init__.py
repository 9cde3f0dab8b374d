"""The policy: a Wan model with its experts. Beside rollout/sigmas.py and rollout/lora the only user of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.policy.wan import Policy

__all__ = ["Policy"]


def __getattr__(name: str) -> object:
    """`Policy`, imported when asked for: rollout/lora needs modules of this room, and `Policy` needs rollout/lora."""
    if name == "Policy":
        from rollout.policy.wan import Policy

        return Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
