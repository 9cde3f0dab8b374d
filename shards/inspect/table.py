"""Shards and scores as one table: what `rushes inspect` prints. No torch; a thousand samples in under a second."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from shards import index
from shards.errors import UserError
from shards.files import Files
from shards.locate import Place, locate
from shards.records.kinds import read_summary, read_train_plan
from shards.run import Run, Stage
from shards.sidecar import read_table, scorers, specifications
from shards.text.visible import visible, visible_json

if TYPE_CHECKING:
    import pandas
    import pyarrow

INDEX_COLUMNS = ("key", "iteration", "prompt_id", "group", "sample", "prompt", "target", "seed", "noise_seed")
FIRST_COLUMNS = ("key", "prompt", "reward", "advantage", "status")  # of a terminal
LAST_COLUMNS = ("window", "log_prob", "bytes", "seconds", "host", "shard")
FORMATS = ("table", "csv", "json", "jsonl", "parquet")
NOT_SCORED = "not scored"


def samples(path: str | Path, iteration: int | None = None, files: Files | None = None) -> pandas.DataFrame:
    """One row per committed sample of a run, stage or shard, scores and advantages joined to it.

    Columns: kind, key, iteration, prompt_id, group, sample, prompt, target, seed, noise_seed, reward (the combined one
    where advantages exist, of several the one that was trained on; else that of the only scorer), advantage, weight,
    reason, status ("ok", "not scored", or why not), per scorer NAME.reward, NAME.<component> and NAME.text, window,
    log_prob (lists), bytes, seconds, host, shard.
    What is not there yet is NaN. `files` are those that a run at this path has been opened with. Raises UserError when
    `path` holds nothing to show, Damaged for a broken table.
    """
    import pandas

    place = locate(path, files)
    stages = [stage for stage in place.stages if iteration is None or stage.iteration == iteration]
    if place.tar is not None:
        return _bare(place.tar)
    frames = [_stage_frame(stage, place) for stage in stages if stage.shards()]
    if not frames:
        which = "" if iteration is None else f" in iteration {iteration}"
        raise UserError(f"{path} holds no shard{which}", "`rushes rollout` samples them")
    frame = pandas.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
    last = [name for name in LAST_COLUMNS if name in frame]
    return frame[[name for name in frame if name not in last] + last]


def groups(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One row per group of a table of samples: its size, its rewards (mean, std, min, max), what was dropped."""
    by = frame.groupby(["kind", "iteration", "group"], sort=False)
    reward = by["reward"].agg(["mean", "std", "min", "max"]).add_prefix("reward_")
    first = by[["prompt_id", "prompt", "target"]].first()
    sums = by.agg(
        samples=("key", "size"), missing=("reward", lambda column: column.isna().sum()), bytes=("bytes", "sum")
    )
    used = by["weight"].agg(used=lambda column: int((column > 0).sum()))
    return first.join([sums, used, reward]).reset_index()


def write(frame: pandas.DataFrame, format: str) -> bytes:
    """The table as bytes to print: table (for eyes), csv, json, jsonl or parquet. Raises UserError for another name.

    JSON has every number to its last bit; what is missing (NaN) is null, and an infinite number a string, "Infinity"
    or "-Infinity", because JSON has no other way to write it.
    """
    if format == "parquet":
        sink = io.BytesIO()
        frame.to_parquet(sink, index=False)
        return sink.getvalue()
    if format == "table":
        return (_for_eyes(frame).to_string(index=False) + "\n").encode()
    if format == "csv":
        return frame.to_csv(index=False).encode()
    if format in ("json", "jsonl"):
        rows = [json.dumps(_exact(row), ensure_ascii=False) for row in frame.to_dict("records")]
        text = "[" + ",\n".join(rows) + "]\n" if format == "json" else "".join(f"{row}\n" for row in rows)
        return visible_json(text).encode()
    raise UserError(f"{format!r} is not a format", f"choose from {', '.join(FORMATS)}")


def fitting(frame: pandas.DataFrame, width: int) -> tuple[pandas.DataFrame, list[str]]:
    """The columns that stand side by side in `width` characters, in their order, and the names of the others.

    FIRST_COLUMNS are chosen before others, and the first of all columns always.
    """
    shown = _for_eyes(frame)
    names = [str(name) for name in shown]
    first = [name for name in FIRST_COLUMNS if name in names]
    chosen: set[str] = set()
    room = width + 2
    for name in first + [name for name in names if name not in first]:
        size = 2 + max(map(len, shown[[name]].to_string(index=False).splitlines()), default=0)
        if size > room and chosen:
            break
        chosen.add(name)
        room -= size
    return frame[[name for name in names if name in chosen]], [name for name in names if name not in chosen]


def _stage_frame(stage: Stage, place: Place) -> pandas.DataFrame:
    """All samples of a stage; every table read once, joined by key."""
    shards = stage.shards() if place.shard is None else [place.shard]
    indices, hashes = _indices(stage, shards)
    frame = indices.drop(columns=[name for name in indices if name not in (*INDEX_COLUMNS, *LAST_COLUMNS, "status")])
    frame.insert(0, "kind", stage.kind)
    names = _scorer_names(scorers(stage))
    tables = ((name, _tables(stage.scores_dir / folder, hashes)) for folder, name in names.items())
    scores = {name: table for name, table in tables if table is not None}
    frame = frame.join(_judgement(stage, hashes, scores), on="key")
    frame["status"] = _status(frame.pop("status"), frame["key"], list(scores.values()))
    for name, table in scores.items():
        chosen = table[[column for column in table if column not in ("prompt_id", "sample", "status")]]
        frame = frame.join(chosen.add_prefix(f"{name}."), on="key")
    return frame


def _indices(stage: Stage, shards: list[int]) -> tuple[pandas.DataFrame, dict[int, str]]:
    """The indices of some shards in one frame, and the sha256 of each shard's tar as its index states it."""
    import pyarrow

    tables, hashes = [], {}
    for shard in shards:
        table, kv = index.read(stage.index_path(shard))
        hashes[shard] = kv["shard_sha256"]
        tables.append(table.append_column("shard", pyarrow.array([shard] * len(table), pyarrow.int64())))
    return _to_pandas(pyarrow.concat_tables(tables)), hashes


def _tables(directory: Path, hashes: dict[int, str]) -> pandas.DataFrame | None:
    """The sidecars in a directory that belong to the shards as they are, by key; None when there are none."""
    import pyarrow

    tables = []
    for shard, sha256 in hashes.items():
        path = directory / f"shard-{shard:06d}.parquet"
        if path.exists():
            table, kv = read_table(path)
            tables += [table] if kv.get("shard_sha256") == sha256 else []
    return _to_pandas(pyarrow.concat_tables(tables)).set_index("key") if tables else None


def _judgement(stage: Stage, hashes: dict[int, str], scores: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Reward, advantage, weight and reason by key."""
    import pandas

    columns = ["reward", "advantage", "weight", "reason"]
    specification = specification_meant(stage)
    table = _tables(stage.advantage_dir(specification), hashes) if specification else None
    if table is not None:
        return table[columns]
    only = next(iter(scores.values())) if len(scores) == 1 else None
    frame = pandas.DataFrame(columns=columns, index=pandas.Index([], dtype="str")) if only is None else only[["reward"]]
    return frame.reindex(columns=columns).astype(
        {"reward": float, "advantage": float, "weight": float, "reason": "str"}
    )


def _status(own: pandas.Series[str], keys: pandas.Series[str], tables: list[pandas.DataFrame]) -> pandas.Series[str]:
    """The first status that is not "ok": the sample's own, then each scorer's."""
    status = own.fillna("ok")
    for table in tables:
        found = keys.map(table["status"]).fillna(NOT_SCORED)
        status = status.where(status != "ok", found)
    return status if tables else status.where(status != "ok", NOT_SCORED)


def specification_meant(stage: Stage) -> str | None:
    """Of several specifications the one that was trained on, or that an evaluation has by the run's [score].

    Else the one whose folder was written to last; only what is shown depends on this clock.
    """
    found = specifications(stage)
    if len(found) < 2:
        return found[0] if found else None
    frozen = stage.train_plan_path
    if frozen.exists() and (trained := read_train_plan(frozen).advantage) in found:
        return trained
    meant = [name for name in found if stage.kind == "eval" and _is_of_run(stage, name)]
    return max(meant or found, key=lambda name: stage.advantage_dir(name).stat().st_mtime_ns)


def _is_of_run(stage: Stage, specification: str) -> bool:
    """Whether advantages were made as [score] in run.toml says. False without that file."""
    run, summary = Run(stage.run_path, files=stage.files), stage.summary_path(specification)
    if not run.config_path.exists() or not summary.exists():
        return False
    return read_summary(summary).specification == run.config.score.specification()


def _scorer_names(folders: list[str]) -> dict[str, str]:
    """Folder -> column prefix: the scorer's name, or the whole folder name when one name has several fingerprints."""
    names = [folder.rpartition("-")[0] or folder for folder in folders]
    return {folder: name if names.count(name) == 1 else folder for folder, name in zip(folders, names, strict=True)}


def _bare(path: Path) -> pandas.DataFrame:
    """The samples of a tar that lies outside a run."""
    import pyarrow

    from shards.committed_tar import scan_tar

    frame = _to_pandas(pyarrow.Table.from_pylist(scan_tar(path), schema=index.schema()))
    frame = frame[[*INDEX_COLUMNS, "status", *(name for name in LAST_COLUMNS if name in frame)]]
    frame.insert(0, "kind", "rollout")
    position = len(INDEX_COLUMNS) + 1
    for name, value in (
        ("reason", None),
        ("weight", float("nan")),
        ("advantage", float("nan")),
        ("reward", float("nan")),
    ):
        frame.insert(position, name, value)
    return frame


def _to_pandas(table: pyarrow.Table) -> pandas.DataFrame:
    import pyarrow

    frame = table.to_pandas()
    for field in table.schema:
        if pyarrow.types.is_list(field.type):  # lists, not arrays: they print, compare and turn into JSON
            frame[field.name] = table.column(field.name).to_pylist()
    return frame


def _exact(value: object) -> object:
    """A value as JSON holds it without loss."""
    if isinstance(value, dict):
        return {str(name): _exact(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_exact(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _for_eyes(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Without what is empty or the same for everybody and long; texts cut to what fits a line."""
    one_kind = "kind" not in frame or frame["kind"].nunique() == 1
    hidden = {"host", "noise_seed", "group", "kind"} if one_kind else {"host"}
    shown = frame[[name for name in frame if name not in hidden and not frame[name].isna().all()]]
    return shown.map(_short)


def _short(value: object) -> object:
    if isinstance(value, str):
        line = visible(value.replace("\n", " "))
        return line if len(line) <= 40 else line[:39] + "…"
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return "[" + " ".join(f"{item:.4g}" for item in value) + "]"
    return value
