"""Settings that the files of a stage keep, by the names that they have in run.toml."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from shards.config import RunConfig, TrainConfig
from shards.plan import RolloutPlan
from shards.records.kinds import read_summary, read_train_plan
from shards.run import Stage
from shards.run_toml import parse_config

TWO_FORMS = ("flow-sde", "dance-sde", "wan-sde")
"""Laws that are computed in the form that is asked for; the plan of another one says `exact`, whatever that is."""
Settings = dict[str, object]
"""Values by dotted name, `train.learning_rate`."""


def flat(config: RunConfig) -> Settings:
    """Every setting of a configuration; each reward, and each option of one, is a setting of its own."""
    return _flat({name: value for name, value in config.model_dump().items() if isinstance(value, dict)})


def _flat(tables: Mapping[str, object], before: str = "") -> Settings:
    found: Settings = {}
    for name, value in tables.items():
        named = f"{before}{name}"
        found |= _flat(value, f"{named}.") if isinstance(value, dict) and value else {named: value}
    return found


def of_plan(plan: RolloutPlan) -> Settings:
    """What the plan of a rollout keeps of [rollout] and [model]. Of that of an evaluation nothing: its values have two
    homes."""
    if plan.kind == "eval":
        return {}
    schedule, video = plan.schedule, plan.video
    found = {name: getattr(plan, name) for name in ("seed", "group_size", "same_initial_noise", "storage_dtype")}
    found |= {"negative_prompt": plan.negative_prompt, "law": schedule.law, "solver": schedule.solver}
    found |= {name: getattr(video, name) for name in ("height", "width", "frames", "fps")}
    found |= {"video_crf": video.crf, "video_preset": video.preset, "steps": schedule.steps}
    if schedule.law != "ode":  # which has no noise
        found["eta"] = schedule.eta
    if schedule.law in TWO_FORMS:
        found["form"] = schedule.form
    for expert, guidance in zip(schedule.experts, schedule.guidance, strict=True):
        found["guidance_scale_2" if expert == 1 else "guidance_scale"] = guidance
    found |= {name: getattr(plan.arithmetic, name) for name in ("batch_guidance", "decode_batch")}
    of_model = {f"model.{name}": getattr(plan.arithmetic, name) for name in ("attention", "compile")}
    of_model["model.merge_lora"] = plan.arithmetic.adapters == "merged"
    return of_model | {f"rollout.{name}": value for name, value in found.items()}


def of_training(stage: Stage) -> TrainConfig | None:
    """The settings of [train] that an iteration is trained with; None before training began.

    A setting that the file does not have, because it was written before there was one, has its default, and one that
    this version does not know is left out. Raises UserError for a file that is damaged.
    """
    values = training_record(stage)
    if values is None:
        return None
    known = {name: value for name, value in values.items() if name in TrainConfig.model_fields}
    return parse_config({"train": known}, str(stage.train_plan_path)).train


def training_record(stage: Stage) -> dict[str, object] | None:
    """[train] as train/plan.json has it: without what may change while an iteration is trained."""
    path = stage.train_plan_path
    return read_train_plan(path).train if path.exists() else None


def of_scores(stage: Stage) -> Settings:
    """The rewards and how they became the advantages that an iteration was trained on; nothing before that."""
    path = stage.train_plan_path
    summary = stage.summary_path(read_train_plan(path).advantage) if path.exists() else None
    if summary is None or not summary.exists():
        return {}
    found = dict(read_summary(summary).specification)
    weights = found.pop("weights", {})
    return _flat({"score": {**found, "rewards": weights}})


def of_stage(stage: Stage) -> Settings:
    """All that an iteration keeps of its settings. Raises UserError for a damaged file."""
    plan = stage.plan()
    found = of_plan(plan) if plan else {}
    trained, kept = of_training(stage), training_record(stage) or {}
    values = trained.model_dump() if trained else {}
    found |= {f"train.{name}": value for name, value in values.items() if name in kept}
    return found | of_scores(stage)


def is_same(one: object, other: object) -> bool:
    """Whether two values are equal, or one of them is the other in fp32, as a plan has it."""
    if isinstance(one, float) and isinstance(other, float | int) and one != other:
        try:
            return struct.pack("f", one) == struct.pack("f", other)
        except OverflowError:
            return False
    return bool(one == other)
