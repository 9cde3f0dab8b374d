"""What the settings of [train] ask for, and which do not go together. Imports no torch: `rushes init` asks too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from shards.config import RunConfig, TrainConfig


def noised_afresh(config: TrainConfig) -> bool:
    """Whether the model is shown final latents with fresh noise, so that no state before the end is needed."""
    return config.objective != "grpo" or config.estimator == "fresh"


def check_settings(config: RunConfig) -> None:
    """UserError for settings that do not go together."""
    train, law = config.train, config.rollout.law
    hint = "choose a stochastic law, or train.estimator = fresh with train.error_weight = adaptive"
    if law == "ode" and train.objective == "grpo" and train.estimator != "fresh":
        raise UserError(
            f"rollout.law = ode has no stochastic steps, which train.estimator = {train.estimator} needs", hint
        )
    by_law = train.error_weight in ("derived", "calibrated")
    if law == "ode" and train.objective == "grpo" and by_law:
        raise UserError(f"train.error_weight = {train.error_weight} weighs steps by a law, but rollout.law = ode", hint)
    if train.objective == "grpo" and train.estimator == "noise" and train.error_weight != "derived":
        problem = f"train.error_weight = {train.error_weight} does not apply to train.estimator = noise"
        raise UserError(problem, "the noise of a step weighs as its law says: set train.error_weight = derived")
    if train.objective == "grpo" and train.step_weight != "none" and not by_law:
        problem = (
            f"train.step_weight = {train.step_weight} and train.error_weight = {train.error_weight} both weigh steps"
        )
        raise UserError(problem, "set train.step_weight = none")
    if train.ratio_norm and train.objective == "grpo" and not train.is_published:
        problem = "train.ratio_norm corrects the clipped ratio of train.estimator = noise without train.proximal"
        raise UserError(problem, "set train.ratio_norm = false: with a hold the ratio has no shift to correct")
    if train.ratio_norm and law == "cps-unnormalised":
        raise UserError(
            "train.ratio_norm needs a density, which rollout.law = cps-unnormalised is not", "set rollout.law = cps"
        )
