"""The plan of a stage: which policy samples which prompts, by which sampler, in which groups and shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rollout.policy import Policy
from rollout.policy.folder import DTYPES, Layout, find_folder, read_layout
from rollout.policy.images import open_image
from rollout.policy.kernels.arithmetic import arithmetic_of, check_arithmetic
from rollout.prompts.checks import check_lengths, check_readable
from rollout.prompts.chosen import evaluation_prompts, training_prompts
from rollout.prompts.load import Prompt, prompts_of_iteration
from rollout.ranks.device import find_device
from rollout.schedule import make_schedule, step_std
from rollout.window import choose_window, trained_steps
from shards.errors import UserError
from shards.plan import SCHEMA, Arithmetic, Group, PolicyIdentity, RolloutPlan, VideoShape, group_key
from shards.records.schedule import Schedule
from shards.run import Run, Stage
from shards.text.cleaning import clean

if TYPE_CHECKING:
    from rollout.policy.experts import Identity
    from shards.config import RolloutConfig


def check_stage(run: Run, stage: Stage, policy: Policy | None = None) -> list[str]:
    """Refuse what a stage cannot be, from configurations and prompts alone: before a weight is read or a file written.

    `policy` is the model where it is loaded already. A stage that has its plan was checked when that was made. Returns
    sentences for the user about prompts that are longer than the model reads, and about a LoRA that only one of two
    experts gets. Raises UserError as `stage_plan`, `check_prompts`, `find_lora` and `Policy.load` do.
    """
    if stage.plan() is not None:
        return []
    model = run.config.model
    device = find_device(model.device, model.dtype) if policy is None else policy.device
    layout = policy.layout if policy is not None else read_layout(find_folder(model.path))
    check_arithmetic(stage_plan(run, stage, layout).arithmetic, layout, model.dtype, device)
    said = Policy.check_loras(model, layout) if stage.iteration == 0 else []  # later policies have both
    return said + check_prompts(run, stage, layout)


def check_prompts(run: Run, stage: Stage, layout: Layout) -> list[str]:
    """Sentences about texts of a stage that are longer than the model reads.

    Raises UserError for a target, of any prompt that a stage like it may take, which stands beyond that, or which the
    OCR reward could never read whole.
    """
    taken = stage_prompts(run, stage)
    every = taken if stage.kind == "eval" else training_prompts(run.config)
    check_readable(every, run.config.score)
    return check_lengths(every, taken, run.config, layout.folder)


def stage_plan(run: Run, stage: Stage, layout: Layout, identity: Identity | None = None) -> RolloutPlan:
    """The plan of a stage: a pure function of run.toml, the prompts file and the policy. Raises UserError.

    `identity` is what `Policy.fingerprint` gives. Without it the plan names no policy, and is only good to look at.
    """
    config, rollout = run.config, run.config.rollout
    evaluation = config.eval if stage.kind == "eval" else None
    layout.check_shape(rollout.height, rollout.width, rollout.frames)
    schedule = make_schedule(
        rollout, boundary=layout.boundary, scheduler_config=layout.scheduler_config, evaluation=evaluation
    )
    prompts, begun = stage_prompts(run, stage), stage.plan()
    _check_images(prompts, layout, rollout.height, rollout.width, rollout.frames)
    if evaluation is None and begun is None:  # what was begun can be finished
        _check_noise(schedule, rollout)
    size = evaluation.videos_per_prompt if evaluation else rollout.group_size
    across = evaluation is not None and (begun is None or begun.batch_across_groups)
    return RolloutPlan(
        schema=SCHEMA,
        kind=stage.kind,
        iteration=stage.iteration,
        seed=evaluation.seed if evaluation else rollout.seed,
        policy=PolicyIdentity(**(identity or {"fingerprint": "", "base": "", "adapters": {}}), lag_of=stage.iteration),
        schedule=schedule,
        video=_video(rollout),
        storage_dtype=rollout.storage_dtype,
        group_size=size,
        batch_size=batch_size(rollout, layout),
        negative_prompt=clean(rollout.negative_prompt),
        groups=tuple(_group(run, stage, schedule, prompt) for prompt in prompts),
        shards=_shards([group_key(stage.iteration, prompt.id) for prompt in prompts], size, rollout, across),
        same_initial_noise=rollout.same_initial_noise and evaluation is None,
        arithmetic=_arithmetic(run, stage),
        batch_across_groups=across,
    )


def _shards(keys: list[str], size: int, rollout: RolloutConfig, even: bool) -> tuple[tuple[str, ...], ...]:
    """The groups of each shard. An evaluation has small groups, of `size` videos: as many videos a shard as in a
    rollout, and shards that are `even` give workers equal shares."""
    per_shard = max(1, rollout.groups_per_shard * rollout.group_size // size)
    if even:
        per_shard = math.ceil(len(keys) / math.ceil(len(keys) / per_shard))
    return tuple(tuple(keys[start : start + per_shard]) for start in range(0, len(keys), per_shard))


def _video(rollout: RolloutConfig) -> VideoShape:
    size = rollout.height, rollout.width, rollout.frames
    return VideoShape(*size, rollout.fps, rollout.video_crf, rollout.video_preset)


def _arithmetic(run: Run, stage: Stage) -> Arithmetic:
    """What run.toml asks for. What no setting decides stays as it was when the stage began, with an older version."""
    begun = stage.plan()
    wanted = arithmetic_of(run.config)
    if begun is None or "merged" in (wanted.adapters, begun.arithmetic.adapters):  # which run.toml asks for
        return wanted
    return replace(wanted, adapters=begun.arithmetic.adapters)


def batch_size(rollout: RolloutConfig, layout: Layout) -> int:
    """Videos in one forward pass: `batch_size`, or, where `batch_tokens` is set, as many as hold no more tokens.

    The plan keeps the number, because training replays the same batches. Raises UserError when one video alone has more
    tokens than `batch_tokens` allows.
    """
    if rollout.batch_tokens is None:
        return rollout.batch_size
    tokens = layout.tokens(rollout.height, rollout.width, rollout.frames)
    if tokens > rollout.batch_tokens:
        raise UserError(
            f"rollout.batch_tokens = {rollout.batch_tokens}, but one video has {tokens} tokens "
            f"({rollout.height}x{rollout.width}, {rollout.frames} frames)",
            f"take rollout.batch_tokens >= {tokens}, or a smaller or shorter video",
        )
    return min(rollout.batch_tokens // tokens, rollout.group_size)


def _group(run: Run, stage: Stage, schedule: Schedule, prompt: Prompt) -> Group:
    return Group(
        key=group_key(stage.iteration, prompt.id),
        prompt_id=prompt.id,
        prompt=prompt.text,
        target=prompt.target,
        image=prompt.image,
        window=choose_window(schedule, run.config.rollout, iteration=stage.iteration, prompt_id=prompt.id),
        negative_prompt=prompt.negative,
    )


def stage_prompts(run: Run, stage: Stage) -> list[Prompt]:
    """The prompts of the stage: a share of a seeded pass, or the head of the evaluation prompts."""
    if stage.kind == "eval":
        return evaluation_prompts(run.config)
    every, rollout = training_prompts(run.config), run.config.rollout
    return prompts_of_iteration(every, rollout.prompts_per_iteration, rollout.seed, stage.iteration)


def _check_noise(schedule: Schedule, config: RolloutConfig) -> None:
    """UserError for noise so small that stored states do not hold it: a log-prob would be that of rounding errors.

    Rounding a normal variable to a dtype changes it by 0.2 eps, root mean square; and below the eps of float32 a std is
    not exact. All steps that any iteration may train are looked at, so that a run does not end in the middle.
    """
    storage = config.storage_dtype
    steps = {step: step_std(schedule, step) for step in trained_steps(schedule, config)}
    weakest = min(steps, key=steps.__getitem__, default=None)
    least = max(torch.finfo(DTYPES[storage]).eps / 4, torch.finfo(torch.float32).eps)
    if weakest is not None and steps[weakest] < least:
        problem = f"rollout.eta = {schedule.eta:g}: step {weakest} adds noise of {steps[weakest]:.2g}"
        hint = "take a larger rollout.eta" + (", or rollout.storage_dtype=float32" if storage != "float32" else "")
        raise UserError(f"{problem}, which latents stored as {storage} cannot hold", hint)


def _check_images(prompts: Sequence[Prompt], layout: Layout, height: int, width: int, frames: int) -> None:
    """UserError when a prompt lacks the image its model starts from, or has one that the model cannot take.

    Every image is opened here, before anything is sampled, and must have the size of the video: silently scaled it
    would be stretched.
    """
    takes = layout.takes_image
    for prompt in prompts:
        if prompt.image is None and takes == "must":
            raise UserError(
                f"prompt {prompt.id} ({prompt.text[:60]!r}) has no image, but the model is image-to-video",
                "give every prompt an `image`, in a JSON-lines, CSV or Parquet file",
            )
        if prompt.image is not None and takes == "never":
            raise UserError(
                f"prompt {prompt.id} ({prompt.text[:60]!r}) has an image, but the model is text-to-video",
                "remove the `image`, or take an image-to-video model",
            )
        if prompt.image is not None and takes == "may" and layout.latent_shape(height, width, frames)[1] == 1:
            raise UserError(
                f"prompt {prompt.id} ({prompt.text[:60]!r}) has an image, which is all of a video of one frame",
                f"take rollout.frames >= {1 + layout.temporal_scale}, or remove the `image`",
            )
        if prompt.image is not None and (size := open_image(prompt.image).size) != (width, height):
            raise UserError(
                f"prompt {prompt.id}: {prompt.image} is {size[0]} x {size[1]}, but the video is {width} x {height}",
                "crop and scale the image to the size of the video, or set rollout.width and rollout.height",
            )
