"""Settings without effect on what a command works on: of sections it does not read, or of a stage that has its plan."""

from __future__ import annotations

from collections.abc import Iterator

from shards.run import Run, Stage
from shards.settings.frozen import flat, is_same, of_plan, of_training, training_record
from shards.text.cleaning import clean

READS = {  # by command: sections, and single keys of others
    "rollout": ("model", "rollout", "score.rewards", "score.options", "eval.prompts", "eval.holdout"),
    "score": ("score",),
    "train": ("model", "rollout.ulysses", "score", "train"),
    "loop": ("model", "rollout", "score", "train", "eval.prompts", "eval.holdout"),
    "eval": ("model", "rollout", "score", "eval"),
}
EVERYWHERE = ("workers", "track")
BY_PROCESS = ("rollout.workers", "rollout.ulysses", "eval.ema")  # no plan holds them
OF_MODEL = ("model.attention", "model.compile", "model.merge_lora")  # settings of [model] that a plan holds
NOTHING_SCORED = ("score.workers",)


def without_effect(run: Run, stage: Stage, command: str, advantages_only: bool = False) -> str:
    """One line that names settings without effect on this stage, those of --set and those edited in run.toml; or "".

    A stage keeps the plan it was begun by, and a policy the settings it was trained with. Raises UserError for a
    damaged plan.
    """
    reasons: dict[str, str] = {}
    changed = _changed(run)
    for name in changed:
        if not any(name == key or name.startswith(f"{key}.") for key in (*READS[command], *EVERYWHERE)):
            reasons[name] = f"`{command}` does not read it"
        if advantages_only and name in NOTHING_SCORED:
            reasons[name] = "with --advantages-only nothing is scored"
    if _is_planned(stage, command):
        sections = ("rollout.", "eval.") if stage.kind == "eval" else ("rollout.",)
        frozen = [name for name in changed if name.startswith((*sections, *OF_MODEL))] if command != "score" else []
        for name in [*frozen, *_edited(run, stage)]:
            if name not in BY_PROCESS:
                reasons[name] = "the plan of the stage is made"
    if command == "train" and stage.trained():
        reasons |= dict.fromkeys(_edited_training(run, stage), "the policy is trained")
    if not reasons:
        return ""
    whys = list(dict.fromkeys(reasons.values()))
    parts = [f"{', '.join(name for name, why in reasons.items() if why == one)} ({one})" for one in whys]
    return f"{stage.name}: without effect: {'; '.join(parts)}"


def _is_planned(stage: Stage, command: str) -> bool:
    """Whether the plan of a stage holds from now on; a rollout that is not complete refuses one that differs."""
    return stage.plan() is not None and (command in ("score", "train") or stage.is_complete())


def _changed(run: Run) -> list[str]:
    """Dotted names of the settings that --set gives another value than run.toml."""
    if not run.sets:
        return []
    ours, theirs = flat(run.config), flat(Run(run.path).config)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _edited(run: Run, stage: Stage) -> Iterator[str]:
    """Settings of [rollout] that a plan holds with another value."""
    plan, ours = stage.plan(), flat(run.config)
    ours["rollout.negative_prompt"] = clean(run.config.rollout.negative_prompt)
    ours["model.merge_lora"] = run.config.model.merge_lora and not run.config.train.full  # which has no LoRA
    for name, value in (of_plan(plan) if plan else {}).items():
        if not is_same(value, ours[name]):
            yield name


def _edited_training(run: Run, stage: Stage) -> Iterator[str]:
    """Settings of [train] that a policy was trained with otherwise."""
    trained, kept = of_training(stage), training_record(stage) or {}
    for name in kept:
        if trained is not None and hasattr(trained, name) and getattr(trained, name) != getattr(run.config.train, name):
            yield f"train.{name}"
