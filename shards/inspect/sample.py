"""One sample in full: its record, what every reward said, the text read, its log-probs by step, its frames as PNG."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from shards.errors import UserError
from shards.inspect import table
from shards.locate import locate
from shards.plan import SAMPLE_KEY, group_of
from shards.reader import open_shard
from shards.records.opening import refuse_escape
from shards.records.strict_json import parse_value
from shards.run import EXPERT_NAMES, Stage
from shards.store.files import files_at
from shards.store.urls import shown
from shards.text.visible import visible, visible_json
from shards.video import decode_mp4

if TYPE_CHECKING:
    from shards.records.samples import SampleValues
    from shards.video import Frames

BY_STEP = ("sigmas", "timesteps", "experts", "guidance", "window", "log_prob")  # shown as the table of steps


class StepRow(TypedDict):
    """A row of the table of denoising steps."""

    step: int
    sigma: float
    sigma_next: float
    timestep: float
    expert: str
    guidance: float
    log_prob: float | None


class StoredLatents(TypedDict):
    """How the states of a sample are stored."""

    dtype: str
    shape: list[int]
    states: list[int]


class Described(TypedDict):
    """What `describe` gives."""

    file: str
    record: dict[str, object]
    judgement: dict[str, float | str | None]
    scores: dict[str, dict[str, float | None]]
    text: dict[str, list[object]]
    steps: list[StepRow]
    latents: StoredLatents


def find(path: str | Path, key: str, evaluation: bool = False) -> tuple[Stage, int]:
    """The stage and the shard that hold a sample. Raises UserError when it is not there, and says what is."""
    matched = SAMPLE_KEY.fullmatch(key)
    if not matched:
        raise UserError(f"{key} is not a sample key", "`rushes inspect RUN --columns key` lists the keys")
    place = locate(path)
    if not place.stages:
        raise UserError(f"{path} lies outside of a run", "give the run it belongs to")
    stages = (
        place.stages if len(place.stages) == 1 else [one for one in place.stages if (one.kind == "eval") == evaluation]
    )
    group = group_of(key)
    for stage in stages:
        plan = stage.plan() if stage.iteration == int(matched[1]) else None
        for shard, groups in enumerate(plan.shards if plan else ()):
            if group in groups and key in stage.keys(shard) and stage.is_committed(shard):
                return stage, shard
    where = "the evaluations" if evaluation else "the rollouts"
    raise UserError(f"{path}: {where} hold no sample {key}", "`rushes inspect RUN --columns key` lists what there is")


def describe(path: str | Path, key: str, evaluation: bool = False) -> Described:
    """Everything known about one sample as plain values.

    `record`: the JSON member of the shard without what is listed by step; `judgement`: reward, advantage, weight,
    reason, status; `scores`: scorer -> component -> value; `text`: scorer -> what was read, one item per frame looked
    at; `steps`: one row per denoising step, `log_prob` None where it was deterministic; `latents`: dtype, shape of
    one and the states stored; `file`: the shard. Raises UserError for an unknown key and Damaged for a broken shard.
    """
    stage, shard = find(path, key, evaluation)
    with open_shard(stage, shard) as opened:
        meta = opened.meta(key)
        row = opened.row(key)
        file = shown(str(opened.path))
    frame = table.samples(stage.path, files=stage.files)
    values = {str(name): value for name, value in frame[frame["key"] == key].iloc[0].to_dict().items()}
    scored = {name: value for name, value in values.items() if "." in name}
    scores: dict[str, dict[str, float | None]] = {}
    text: dict[str, list[object]] = {}
    for name, value in scored.items():
        scorer, _, component = name.rpartition(".")
        if component == "text":
            text[scorer] = read_texts(value)
        else:
            scores.setdefault(scorer, {})[component] = _number(value)
    judgement: dict[str, float | str | None] = {
        name: _number(values.get(name)) for name in ("reward", "advantage", "weight")
    }
    judgement |= {name: _text(values.get(name)) for name in ("reason", "status")}
    return {
        "file": file,
        "record": {name: value for name, value in meta.items() if name not in BY_STEP},
        "judgement": judgement,
        "scores": scores,
        "text": text,
        "steps": _steps(meta),
        "latents": {"dtype": row["latent_dtype"], "shape": list(row["latent_shape"]), "states": list(row["states"])},
    }


def read_video(path: str | Path, key: str, evaluation: bool = False) -> bytes:
    """The mp4 file of a sample, as it is stored. Raises as `describe` does."""
    stage, shard = find(path, key, evaluation)
    with open_shard(stage, shard) as opened:
        return opened.video(key)


def read_frames(path: str | Path, key: str, evaluation: bool = False) -> Frames:
    """The frames of a sample, uint8 RGB [T, H, W, 3]. Raises as `describe` does."""
    stage, shard = find(path, key, evaluation)
    plan = stage.plan()
    with open_shard(stage, shard) as opened:
        return decode_mp4(opened.video(key), f"{shown(str(path))}: {key}.mp4", plan.video if plan else None)


def write_frames(path: str | Path, key: str, folder: Path | None = None, evaluation: bool = False) -> list[Path]:
    """Write the frames of a sample as `frame-000.png`, …; returns their paths.

    They go to `folder`, or to RUN/frames/KEY (RUN/frames/eval/KEY for an evaluation). Raises as `describe` does.
    """
    from PIL import Image

    if folder is None:
        stage, _ = find(path, key, evaluation)
        folder = stage.run_path / "frames" / ("eval" if stage.kind == "eval" else "") / key
        refuse_escape(folder, root=stage.run_path)
    files, folder = files_at(folder)
    written = []
    for number, frame in enumerate(read_frames(path, key, evaluation)):
        sink = io.BytesIO()
        Image.fromarray(frame).save(sink, "PNG")
        written.append(folder / f"frame-{number:03d}.png")
        files.publish_replace(written[-1], sink.getvalue())
    return written


def show(path: str | Path, key: str, format: str = "table", evaluation: bool = False) -> str:
    """What `describe` gives, as lines for a terminal, or, with the format `json`, as one JSON object."""
    found = describe(path, key, evaluation)
    return visible_json(json.dumps(found, ensure_ascii=False)) + "\n" if format == "json" else to_text(found)


def to_text(found: Described) -> str:
    """What `describe` gives, laid out for a terminal; control characters in it are escaped."""
    lines = [f"file        {found['file']}"]
    lines += [f"{name:<11} {_plain(value)}" for name, value in found["record"].items()]
    lines += ["", "judgement"]
    lines += [f"  {name:<14} {_plain(value)}" for name, value in found["judgement"].items()]
    for scorer, components in found["scores"].items():
        lines += ["", f"score {scorer}"]
        lines += [f"  {name:<14} {_plain(value)}" for name, value in components.items()]
    for scorer, readings in found["text"].items():
        lines += ["", f"text read by {scorer}, one line a frame looked at"]
        lines += [_reading(number, reading) for number, reading in enumerate(readings)]
    lines += [
        "",
        f"{'step':>4}  {'sigma':>8}  {'to':>8}  {'timestep':>9}  {'expert':<10}  {'guidance':>8}  {'log_prob':>10}",
    ]
    for step in found["steps"]:
        numbers = f"{step['sigma']:8.5f}  {step['sigma_next']:8.5f}  {step['timestep']:9.3f}"
        log_prob = "-" if step["log_prob"] is None else f"{step['log_prob']:.6f}"
        lines.append(f"{step['step']:>4}  {numbers}  {step['expert']:<10}  {step['guidance']:8.3g}  {log_prob:>10}")
    latents = found["latents"]
    lines += ["", f"latents     {latents['dtype']} {latents['shape']}, states {latents['states']}"]
    return visible("\n".join(lines)) + "\n"


def read_texts(value: object) -> list[object]:
    """What a reward has read, as its column `text` keeps it: a list with one item per frame looked at.

    A text that is not such a list is shown as it stands; a value that is not text counts as nothing read.
    """
    try:
        found = parse_value(value, nan=True) if isinstance(value, str) else []
    except ValueError:
        return [value]
    return found if isinstance(found, list) else [value]


def _reading(number: int, reading: object) -> str:
    """A line with what was read: frame, text, confidence; a reward may also have kept the bare text."""
    if not isinstance(reading, dict):
        return f"  {number:<14} {_plain(reading)}"
    confidence = reading.get("confidence")
    sure = f"   confidence {confidence:.2f}" if reading.get("text") and isinstance(confidence, int | float) else ""
    return f"  frame {reading.get('frame', number):<8} {reading.get('text') or '(nothing)'}{sure}"


def _steps(meta: SampleValues) -> list[StepRow]:
    log_probs = dict(zip(meta["window"], meta["log_prob"], strict=True))
    return [
        {
            "step": step,
            "sigma": meta["sigmas"][step],
            "sigma_next": meta["sigmas"][step + 1],
            "timestep": timestep,
            "expert": EXPERT_NAMES[meta["experts"][step]],
            "guidance": meta["guidance"][step],
            "log_prob": log_probs.get(step),
        }
        for step, timestep in enumerate(meta["timesteps"])
    ]


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
