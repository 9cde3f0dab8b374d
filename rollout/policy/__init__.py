"""The policy: a Wan model with its experts. The only room, beside rollout/grids.py, that imports diffusers."""

from rollout.policy.wan import Policy

__all__ = ["Policy"]
