"""Rewards for TensorBoard: one event file in RUN/report/tensorboard, beside those that training writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from shards import report_data
from shards.files import publish_replace
from shards.report_data import Facts
from shards.run import Run

NAME = "events.out.tfevents.0000000000.rushes"  # TensorBoard asks for this beginning


def write_board(run: Run) -> Path:
    """Write mean, spread and components of the rewards and the guards by iteration; returns the folder.

    `tensorboard --logdir RUN` shows them beside the metrics of training. Tags are `training/…` and `held out/…`. The
    file is made again from the tables each time. Raises UserError when the run holds no shard.
    """
    from tensorboard.summary.writer.record_writer import RecordWriter

    facts = report_data.gather(run)
    sink = io.BytesIO()
    writer = RecordWriter(sink)
    writer.write(_event(file_version="brain.Event:2"))
    for tag, iteration, value in scalars(facts):
        when = _time(facts, tag, iteration)
        writer.write(_event(tag=tag, step=iteration, value=value, wall_time=when))
    folder = run.path / "report" / "tensorboard"
    publish_replace(folder / NAME, sink.getvalue())
    return folder


def scalars(facts: Facts) -> list[tuple[str, int, float]]:
    """(tag, iteration, value) of everything that has one value an iteration."""
    columns = ["reward", *report_data.components(facts.samples), *report_data.guards(facts.samples)]
    found = []
    for name, kind in (("training", "rollout"), ("held out", "eval")):
        rows = facts.of(kind)
        curves = {column.replace(".", "/"): report_data.mean_points(rows, column) for column in columns}
        if kind == "rollout":
            curves |= {"spread": report_data.spread_points(rows), "groups_used": report_data.used_points(rows)}
        found += [(f"{name}/{tag}", int(p.x), p.y) for tag, points in curves.items() for p in points]
    return found


def _time(facts: Facts, tag: str, iteration: int) -> float:
    """When the stage was sampled, in seconds since 1970: TensorBoard's other axis."""
    name = f"eval/iter-{iteration:04d}" if tag.startswith("held out") else f"iter-{iteration:04d}"
    stage = facts.stages[name]
    return stage.manifest_path(stage.shards()[-1]).stat().st_mtime


def _event(
    *, tag: str = "", step: int = 0, value: float = 0.0, wall_time: float = 0.0, file_version: str = ""
) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    if file_version:
        event: Any = Event(file_version=file_version)
    else:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        event = Event(step=step, wall_time=wall_time, summary=summary)
    data: bytes = event.SerializeToString()
    return data
