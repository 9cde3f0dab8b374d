"""Rewards and clips for TensorBoard, in one event file beside those that training writes, and for Weights & Biases."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import RunFailed, UserError
from shards.records.opening import refuse_escape
from shards.report import facts as report_facts
from shards.report import tracked_clips
from shards.report.facts import Facts
from shards.run import Run

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

NAME = "events.out.tfevents.0000000000.rushes"  # TensorBoard asks for this beginning
RGB = 3


def write_board(run: Run) -> Path:
    """Write curves and clips by iteration to RUN/report/tensorboard; returns the folder.

    `tensorboard --logdir RUN` shows them beside the metrics of training. Tags are `training/…` and `held out/…`; clips
    are animated GIFs among the images. The file is made again each time. Raises UserError when the run holds no shard.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    facts = report_facts.gather(run)
    sink = io.BytesIO()
    writer = RecordWriter(sink)
    writer.write(_event(file_version="brain.Event:2"))
    for tag, iteration, value in scalars(facts):
        writer.write(_shown(facts, iteration, Summary.Value(tag=tag, simple_value=value)))
    for clip in tracked_clips.clips(facts):
        data, width, height = tracked_clips.gif(clip.video, run.config.rollout.fps)
        image = Summary.Image(width=width, height=height, colorspace=RGB, encoded_image_string=data)
        writer.write(_shown(facts, clip.iteration, Summary.Value(tag=f"{clip.tag} clip", image=image)))
    folder = run.report_dir / "tensorboard"
    refuse_escape(folder / NAME, root=run.path)
    run.files.publish_replace(folder / NAME, sink.getvalue())
    return folder


def send_wandb(run: Run) -> str:
    """Log curves and clips to Weights & Biases as one run named after the folder; returns where it went.

    Its own variables say how: WANDB_MODE=offline, or WANDB_PROJECT, without which the project is `rushes`. Nothing is
    sent unless this is called. The same folder is always the same run there, so a later call continues the last one.
    Raises UserError without the package, RunFailed for what the package itself refuses, as when nobody is logged
    in.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("Weights & Biases is not installed", "pip install wandb, or use --tensorboard") from None
    facts = report_facts.gather(run)
    steps: dict[int, dict[str, object]] = defaultdict(dict)
    for tag, iteration, value in scalars(facts):
        steps[iteration][tag] = value
    for clip in tracked_clips.clips(facts):
        video = wandb.Video(io.BytesIO(clip.video), caption=clip.caption, format="mp4")
        steps[clip.iteration][f"{clip.tag} clip"] = video
    folder = run.report_dir
    refuse_escape(folder, root=run.path)
    folder.mkdir(parents=True, exist_ok=True)
    name, project = run.path.resolve().name, os.environ.get("WANDB_PROJECT") or "rushes"
    try:
        with wandb.init(project=project, id=name, name=name, resume="allow", dir=folder) as session:
            for iteration in sorted(steps):
                session.log(steps[iteration], step=iteration)
            return str(session.url or session.dir)
    except wandb.errors.Error as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise RunFailed(f"Weights & Biases: {text}", "WANDB_MODE=offline keeps it all on this machine") from error


def scalars(facts: Facts) -> list[tuple[str, int, float]]:
    """(tag, iteration, value) of everything that has one value an iteration."""
    columns = ["reward", *report_facts.components(facts.samples), *report_facts.guards(facts.samples)]
    found = []
    for name, kind in (("training", "rollout"), ("held out", "eval")):
        rows = facts.of(kind)
        curves = {column.replace(".", "/"): report_facts.mean_points(rows, column) for column in columns}
        if kind == "rollout":
            curves |= {"spread": report_facts.spread_points(rows), "groups_used": report_facts.used_points(rows)}
        found += [(f"{name}/{tag}", int(p.x), p.y) for tag, points in curves.items() for p in points]
    return found


def _shown(facts: Facts, iteration: int, value: Summary.Value) -> bytes:
    """An event with one value; its time is that of the shards it speaks of, TensorBoard's other axis."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    stage = facts.stage("eval" if value.tag.startswith("held out") else "rollout", iteration)
    when = stage.manifest_path(stage.shards()[-1]).stat().st_mtime
    return _event(step=iteration, wall_time=when, summary=Summary(value=[value]))


def _event(**fields: object) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    data: bytes = Event(**fields).SerializeToString()
    return data
