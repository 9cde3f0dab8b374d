"""The policy: a Wan model with its experts. Beside rollout/grids.py the only user of diffusers."""

from rollout.policy.wan import Policy

__all__ = ["Policy"]
