"""Rewards by their names: what there is, and how the option --reward names one."""
