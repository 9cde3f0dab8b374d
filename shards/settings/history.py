"""How settings changed from iteration to iteration of a run, and what differs from its preset and between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shards.errors import UserError
from shards.run import Run
from shards.run_toml import parse_config, read_preset
from shards.settings.frozen import Settings, flat, is_same, of_stage

ABSENT = "–"


@dataclass(frozen=True)
class Change:
    """A value that holds from one iteration on."""

    iteration: int | None
    """None: from the next iteration on, as run.toml has it."""
    value: object


def setting_changes(run: Run) -> dict[str, list[Change]]:
    """Settings that did not stay the same, by name, each with its values in order; the first one held from the begin.

    The iterations say what they were planned and trained with, run.toml what the next one will have. Raises UserError
    for a damaged file.
    """
    kept = {k: of_stage(run.iteration(k)) for k in run.iterations()}
    ours = flat(run.config)
    found = {}
    for name in {name: None for settings in kept.values() for name in settings}:
        # an option or a reward may be gone from run.toml
        values = [Change(k, settings[name]) for k, settings in kept.items() if name in settings]
        values.append(Change(None, ours.get(name, ABSENT)))
        changes = values[:1]
        changes += [one for last, one in pairwise(values) if not is_same(last.value, one.value)]
        if len(changes) > 1:
            found[name] = changes
    return dict(sorted(found.items()))


def in_effect(run: Run) -> Settings:
    """Settings as the newest iterations have them; what no iteration keeps, as run.toml has it."""
    found = flat(run.config)
    for k in run.iterations():
        found |= of_stage(run.iteration(k))
    return found


def of_preset(run: Run) -> Settings:
    """All settings of the preset that a run began from; nothing where this version has none of that name."""
    try:
        return flat(parse_config(read_preset(run.config.preset), run.config.preset))
    except UserError:
        return {}


def differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Names of the settings that are not the same everywhere, in order."""
    names = sorted({name for one in settings for name in one})
    return [name for name in names if not all(is_same(settings[0].get(name), one.get(name)) for one in settings[1:])]


def written(value: object) -> str:
    """A value for people, as run.toml has it but for its quotation marks."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
