"""The plan of a stage: which policy samples which prompts, by which sampler, in which groups and shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollout.policy import Policy
from rollout.policy_folder import DTYPES, Layout, find_folder, read_layout
from rollout.policy_inputs import find_device, open_image
from rollout.prompts import Prompt, load_prompts, prompts_of_iteration, split, words_folder
from rollout.schedule import Plan, make_plan, step_std
from rollout.window import choose_window, trained_steps
from shards.errors import RunFailed, UserError
from shards.files import publish_new, read_json, to_json
from shards.run import AVERAGE, SCHEMA, Run, Stage, group_key
from shards.verify_policy import ANEW

if TYPE_CHECKING:
    from shards.config import RolloutConfig, RunConfig


def policy_source(run: Run, stage: Stage) -> Path | None:
    """The policy folder a stage samples with; None for iteration 0, which has the model as [model] names it.

    An evaluation takes the averaged weights where `eval.ema` asks for them and training kept them. Raises UserError
    when the iteration before was not trained.
    """
    if stage.iteration == 0:
        return None
    before = stage.iteration - 1
    folder = run.iteration(before).policy_dir
    if not run.iteration(before).trained():
        raise UserError(
            f"{folder / 'policy.json'} does not exist: iteration {stage.iteration} samples with the policy that "
            f"iteration {before} trains",
            run.way_to_policy(before),
        )
    run.iteration(before).fetched_policy()
    return (averaged(folder) if stage.kind == "eval" and run.config.eval.ema else None) or folder


def averaged(folder: Path) -> Path | None:
    """Folder of the averaged weights of a trained policy; None where training kept none. RunFailed: they are gone."""
    average = folder / AVERAGE
    if not average.is_dir() and "average" in read_json(folder / "policy.json"):
        raise RunFailed(f"{average} is missing, but policy.json names it", ANEW)
    return average if average.is_dir() else None


def check_committed(source: Path, identity: dict[str, Any]) -> None:
    """RunFailed unless weights, or averaged ones, have the identity that training wrote down in policy.json."""
    path = (source.parent if source.name == AVERAGE else source) / "policy.json"
    if not path.is_file():
        return
    record = read_json(path)
    known = record.get("average", identity) if source.name == AVERAGE else record  # once averages were not named
    if known.get("fingerprint") != identity["fingerprint"]:
        raise RunFailed(f"{source}: its files are not those its policy.json names", ANEW)


def take_policy(run: Run, stage: Stage, policy: Policy) -> dict[str, Any]:
    """Give the policy the weights of the stage; returns their identity, checked against what the run knows.

    Raises UserError when the base model is not the one the run began with, RunFailed when adapter files changed since
    training committed them.
    """
    _check_model(run, policy)
    source = policy_source(run, stage)
    identity = policy.fingerprint(source)
    if source is not None:
        check_committed(source, identity)
    policy.become(source)
    return identity


def check_stage(run: Run, stage: Stage, policy: Policy | None = None) -> None:
    """Refuse what a stage cannot be, from configurations and prompts alone: before a weight is read or a file written.

    `policy` is the model where it is loaded already. A stage that has its plan was checked when that was made. Raises
    UserError as `stage_plan` and `Policy.load` do.
    """
    if stage.plan() is not None:
        return
    model = run.config.model
    if policy is None:
        find_device(model.device, model.dtype)
    layout = policy.layout if policy is not None else read_layout(find_folder(model.path))
    stage_plan(run, stage, layout, {})


def stage_plan(run: Run, stage: Stage, layout: Layout, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of plan.json: a pure function of run.toml, the prompts file and the policy. Raises UserError."""
    config, rollout = run.config, run.config.rollout
    evaluation = config.eval if stage.kind == "eval" else None
    layout.check_shape(rollout.height, rollout.width, rollout.frames)
    sampler = make_plan(
        rollout, boundary=layout.boundary, scheduler_config=layout.scheduler_config, evaluation=evaluation
    )
    prompts = _prompts(run, stage)
    _check_images(prompts, layout, rollout.height, rollout.width, rollout.frames)
    if evaluation is None and stage.plan() is None:  # what was begun can be finished
        _check_noise(sampler, rollout)
    size = evaluation.videos_per_prompt if evaluation else rollout.group_size
    # an evaluation has small groups: as many videos a shard as in a rollout
    per_shard = max(1, rollout.groups_per_shard * rollout.group_size // size)
    keys = [group_key(stage.iteration, prompt.id) for prompt in prompts]
    return {
        "schema": SCHEMA,
        "kind": stage.kind,
        "iteration": stage.iteration,
        "seed": evaluation.seed if evaluation else rollout.seed,
        "policy": {**identity, "lag_of": stage.iteration},
        "sampler": sampler.to_dict(),
        "video": {
            "height": rollout.height,
            "width": rollout.width,
            "frames": rollout.frames,
            "fps": rollout.fps,
            "crf": rollout.video_crf,
        },
        "storage_dtype": rollout.storage_dtype,
        "group_size": size,
        "batch_size": batch_size(rollout, layout),
        "negative_prompt": rollout.negative_prompt,
        "groups": [_group(run, stage, sampler, prompt) for prompt in prompts],
        "shards": [keys[start : start + per_shard] for start in range(0, len(keys), per_shard)],
        "same_initial_noise": rollout.same_initial_noise and evaluation is None,
    }


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


def _group(run: Run, stage: Stage, sampler: Plan, prompt: Prompt) -> dict[str, Any]:
    """One group of the plan. A prompt's own negative prompt is written down only where there is one."""
    window = choose_window(sampler, run.config.rollout, iteration=stage.iteration, prompt_id=prompt.id)
    group = {
        "key": group_key(stage.iteration, prompt.id),
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "target": prompt.target,
        "image": prompt.image,
        "window": list(window),
    }
    return group if prompt.negative is None else {**group, "negative_prompt": prompt.negative}


def _prompts(run: Run, stage: Stage) -> list[Prompt]:
    """The prompts of the stage: a share of a seeded pass, or the head of the evaluation prompts."""
    config = run.config
    need_target = any(name.split(".")[0] == "ocr" for name in config.score.rewards)
    holdout = config.eval.holdout
    if stage.kind == "eval":
        embedded = words_folder() / "prompts" / "eval.txt"
        path = embedded if config.eval.prompts == "words" else Path(config.eval.prompts)
        every = _split(config, need_target)[1] if holdout else load_prompts(path, need_target)
        return every[: config.eval.limit]
    rollout = config.rollout
    every = _split(config, need_target)[0] if holdout else load_prompts(rollout.prompts, need_target)
    return prompts_of_iteration(every, rollout.prompts_per_iteration, rollout.seed, stage.iteration)


def _split(config: RunConfig, need_target: bool) -> tuple[list[Prompt], list[Prompt]]:
    """What is trained on and what is evaluated of the one prompts file."""
    share, names = config.eval.holdout, (config.rollout.prompts, config.eval.prompts)
    if names[0] != names[1] or names[0] == "words":
        raise UserError(
            f"eval.holdout = {share:g}, but rollout.prompts is {names[0]} and eval.prompts {names[1]}",
            "it divides one file: give both that file, or leave eval.holdout at 0",
        )
    prompts = load_prompts(names[0], need_target)
    train, test = split(prompts, share)
    if not train or not test:
        side = "evaluation" if train else "training"
        raise UserError(f"eval.holdout = {share:g} leaves no prompt of {len(prompts)} for {side}", "change that share")
    return train, test


def _check_noise(sampler: Plan, config: RolloutConfig) -> None:
    """UserError for noise so small that stored states do not hold it: a log-prob would be that of rounding errors.

    Rounding a normal variable to a dtype changes it by 0.2 eps, root mean square; and below the eps of float32 a std is
    not exact. All steps that any iteration may train are looked at, so that a run does not end in the middle.
    """
    storage = config.storage_dtype
    steps = {step: step_std(sampler, step) for step in trained_steps(sampler, config)}
    weakest = min(steps, key=steps.__getitem__, default=None)
    least = max(torch.finfo(DTYPES[storage]).eps / 4, torch.finfo(torch.float32).eps)
    if weakest is not None and steps[weakest] < least:
        problem = f"rollout.eta = {sampler.eta:g}: step {weakest} adds noise of {steps[weakest]:.2g}"
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


def _check_model(run: Run, policy: Policy) -> None:
    """Write down the base model at the first stage of a run; later stages must have the same one."""
    path = run.path / "model.json"
    record = {"schema": SCHEMA, "base": policy.base_fingerprint, "path": run.config.model.path}
    if policy.base_lora is not None:
        record |= {"model": policy.model_fingerprint, "base_lora": policy.base_lora.identity()}
    publish_new(path, to_json(record, path))
    known = read_json(path)
    if known.get("base") == policy.base_fingerprint:
        return
    if known.get("model", known.get("base")) != policy.model_fingerprint:
        raise UserError(
            f"{policy.layout.folder} is not the model this run began with ({known.get('path')})",
            f"{path} has its fingerprint; restore the model, or start a new run",
        )
    now = "is not what this run began with" if policy.base_lora else "is empty, but this run began with one"
    raise UserError(
        f"model.base_lora {now if 'base_lora' in known else 'is set, but this run began without one'}",
        f"{path} has the sha256 of its files and its strength; restore them, or start a new run",
    )
