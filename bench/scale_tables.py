"""The simulated part of docs/scaling.md: tables of bench/scale_simulation.py and bench/scale_limits.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from bench import scale_limits as limits
from bench.scale_simulation import GB, Assumed, Iteration, Measured, Scene, Units
from shards.run_toml import parse_config, read_preset

WORLDS = (8, 64, 512)
SHAPES = {"480p": (480, 832, 81), "720p": (720, 1280, 81)}
PROMPTS = 128  # of the simulated iteration: with 16 videos each, 2,048 videos


def preset_iteration() -> Iteration:
    """The iteration that the preset wan22-a14b asks for."""
    config = parse_config(read_preset("wan22-a14b"), "preset wan22-a14b")
    rollout, train = config.rollout, config.train
    return Iteration(
        rollout.prompts_per_iteration, rollout.group_size, rollout.groups_per_shard, rollout.steps, rollout.high_steps,
        rollout.low_steps, train.updates_per_rollout, train.replay_samples,
    )  # fmt: skip


def large_iteration() -> Iteration:
    """The same with more prompts and one group a shard, so that more workers find work."""
    one = preset_iteration()
    return Iteration(PROMPTS, one.group, 1, one.steps, one.high, one.low, one.updates, one.replay)


def simulated_section(units: dict[str, Units], measured: Measured) -> str:
    """The simulated part of the page."""
    lines = [
        "Not measured on any GPU: arithmetic on counted sizes, the file costs above and the assumptions below.",
        "",
    ]
    for name, unit in units.items():
        height, width, frames = SHAPES[name]
        scenes = [Scene(world, unit, large_iteration(), measured) for world in WORLDS]
        lines += [f"### {height}x{width}, {frames} frames: {large_iteration().videos:,} videos an iteration", ""]
        lines += [*scene_table(scenes), ""]
    lines += ["### The iteration of the preset, 480x832, 81 frames", "", *preset_lines(units["480p"], measured), ""]
    lines += ["### One machine a day dies, 480x832, 81 frames", "", *failure_table(units["480p"], measured), ""]
    counted = "Counted from the model's configuration on the meta device, with torch's own FLOP counter:"
    lines += ["### Assumptions", "", *assumption_lines(), "", counted, "", *counted_lines(units)]
    return "\n".join(lines) + "\n"


def table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """A table in Markdown, one line a name."""
    lines = [f"| | {' | '.join(heads)} |", "|-" * (len(heads) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def scene_table(scenes: Sequence[Scene]) -> list[str]:
    """Times, efficiency, what each rank moves, and what is the fullest resource."""

    def row(cell: Any) -> list[str]:
        return [cell(scene) for scene in scenes]

    def written(scene: Scene) -> float:
        return scene.written_bytes / sum(scene.sample_seconds().values()) / scene.rollout_degree

    def read(scene: Scene) -> float:
        return 2 * scene.units.state / sum(scene.pass_seconds().values())

    def gathered(scene: Scene) -> float:
        return scene.gather_bytes(int(scene.assumed.gpus)) / scene.pass_seconds()["updates"]

    return table(
        [f"{scene.gpus} GPUs" for scene in scenes],
        {
            "Ulysses degree, rollout / training": row(lambda s: f"{s.rollout_degree} / {s.train_degree}"),
            "rollout, minutes": row(lambda s: f"{s.rollout_seconds() / 60:.1f}"),
            "rollout without Ulysses, minutes": row(lambda s: f"{alone(s).rollout_seconds() / 60:.1f}"),
            "training, minutes": row(lambda s: f"{s.train_seconds() / 60:.1f}"),
            "one update, minutes": row(lambda s: f"{s.update_seconds() / 60:.1f}"),
            "GPU time in forwards, decoding, updates": row(lambda s: f"{100 * s.efficiency():.1f} %"),
            "the rest, largest part": row(largest_loss),
            "publishing shards, of a rollout": row(lambda s: share(s.sample_seconds(), "writing shards")),
            "waiting for data, of an update": row(lambda s: share(s.pass_seconds(), "reading shards")),
            "padding of updates": row(lambda s: f"{100 * s.padding:.1f} %"),
            "a GPU writes, rollout, MB/s": row(lambda s: f"{written(s) / 1e6:.2f}"),
            "a rank reads, training, MB/s": row(lambda s: f"{read(s) / 1e6:.2f}"),
            "a GPU receives over NVLink, training, GB/s": row(lambda s: f"{gathered(s) / GB:.1f}"),
            "without HSDP, gathering takes": row(lambda s: f"{100 * limits.flat_gather(s):.0f} % of computing"),
            "loading the model at the start, s": row(lambda s: f"{limits.load_seconds(s, s.machines):.0f}"),
            "fullest resource beside the GPUs": row(lambda s: "{}, {:.0%}".format(*limits.first(s)).replace("%", " %")),
            "shared one that would fill up first": row(lambda s: "{}, at {:,} GPUs".format(*limits.full_at(s))),
        },
    )  # fmt: skip


def alone(scene: Scene) -> Scene:
    """The same with every GPU a worker of its own in the rollout."""
    return replace(scene, degrees=(1,))


def share(parts: Mapping[str, float], name: str) -> str:
    """One part of a whole, in per cent."""
    return f"{100 * parts[name] / sum(parts.values()):.2f} %"


def largest_loss(scene: Scene) -> str:
    """What takes most of the GPU time that is not forwards, decoding or updates."""
    useful = ("forwards of the rollout", "decoding", "updates")
    parts = {name: seconds for name, seconds in scene.breakdown().items() if name not in useful}
    name = max(parts, key=lambda one: parts[one])
    return f"{name}, {100 * parts[name] / scene.seconds():.1f} %"


def preset_lines(unit: Units, measured: Measured) -> list[str]:
    """Where the preset's own iteration ends to scale."""
    one = preset_iteration()
    scenes = [Scene(world, unit, one, measured) for world in WORLDS]
    lines = [
        f"{one.prompts} prompts of {one.group} videos in {one.shards} shards. A shard is one worker's, so that more "
        f"than {8 * one.shards} GPUs ({one.shards} workers of 8) find nothing to do in the rollout.",
        "",
    ]
    rows = {
        "rollout, minutes": [f"{scene.rollout_seconds() / 60:.1f}" for scene in scenes],
        "training, minutes": [f"{scene.train_seconds() / 60:.1f}" for scene in scenes],
        "GPU time in forwards, decoding, updates": [f"{100 * scene.efficiency():.1f} %" for scene in scenes],
        "the rest, largest part": [largest_loss(scene) for scene in scenes],
    }
    return lines + table([f"{world} GPUs" for world in WORLDS], rows)


def failure_table(unit: Units, measured: Measured) -> list[str]:
    """What the death of one machine costs, and how often a checkpoint pays."""
    scenes = [Scene(world, unit, large_iteration(), measured) for world in WORLDS]
    rows: dict[str, list[str]] = {}

    def add(name: str, cell: str) -> None:
        rows.setdefault(name, []).append(cell)

    for scene in scenes:
        between = limits.between_failures(scene)
        day = scene.gpus * between
        cost, restart = scene.checkpoint_seconds(), limits.train_restart(scene)
        add("rollout: GPU-hours lost a failure", f"{limits.rollout_loss(scene) / 3600:.2f}")
        add("rollout: share of the day", f"{100 * limits.rollout_loss(scene) / day:.3f} %")
        add("training: seconds to the next update", f"{restart:.0f}")
        add("training: a checkpoint takes, s", f"{cost:.2f}")
        add("training: best interval, Young 1974 / Daly 2006, s",
            f"{limits.young(cost, between):.0f} / {limits.daly(cost, between):.0f}")  # fmt: skip
        add("training: interval with one after every update, s", f"{scene.update_seconds():.0f}")
        add("training: GPU-hours lost a failure then", f"{limits.train_loss(scene) / 3600:.1f}")
        for name, interval in (("then", scene.update_seconds()), ("at Daly's interval", limits.daly(cost, between))):
            add(f"training: share of the day lost {name}",
                f"{100 * limits.lost_share(interval, cost, restart, between):.2f} %")  # fmt: skip
        whole = limits.full_checkpoint_seconds(scene)
        add("all weights instead of LoRA: a checkpoint takes, s / Daly's interval, s",
            f"{whole:.0f} / {limits.daly(whole, between):.0f}")  # fmt: skip
    return table([f"{world} GPUs" for world in WORLDS], rows)


def assumption_lines() -> list[str]:
    """Every assumption with its source."""
    assumed = Assumed()
    lines = ["| assumption | value | unit | source |", "|-|-|-|-|"]
    for one in fields(Assumed):
        value = getattr(assumed, one.name)
        lines.append(f"| {one.name} | {value:.4g} | {one.metadata['unit']} | {one.metadata['source']} |")
    return lines


def counted_lines(units: dict[str, Units]) -> list[str]:
    """What was counted and not assumed."""
    rows: dict[str, list[str]] = {}
    for unit in units.values():
        cells = {
            "FLOP of a forward": f"{unit.forward / 1e15:.2f}e15",
            "FLOP of a transition in an update": f"{unit.trained / 1e15:.2f}e15",
            "FLOP of decoding a video": f"{unit.decode / 1e15:.2f}e15",
            "tokens": f"{unit.tokens:,}",
            "bytes of a state": f"{unit.state:,}",
            "GB of an expert": f"{unit.weights / GB:.1f}",
            "parameters of an adapter": f"{unit.lora:,}",
            "GB alive in an update, on one GPU": f"{unit.working / GB:.0f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return table(list(units), rows)
