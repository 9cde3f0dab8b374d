"""The index of a shard: one row per sample, made from the tar alone, and where every byte of it lies."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shards import parquet, tensors
from shards.errors import REPAIR, Damaged
from shards.plan import SAMPLE_KEY, SCHEMA, group_of
from shards.records.samples import SampleValues, check_sample
from shards.records.strict_json import parse_object
from shards.tar import BLOCK, EXTENSIONS, GROUP_NAME, SAMPLE_NAME, Member, members

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
LARGEST_META = 16 * 2**20  # bytes of a sample's record; a prompt of 1 MB fits many times over
OPTIONAL = {"prompt", "target", "seed", "noise_seed", "status", "seconds", "host"}  # columns that may be null
# column -> Arrow type; README.md says what each one means
COLUMNS = {
    "key": "string",
    "iteration": "int64",
    "prompt_id": "int64",
    "group": "string",
    "sample": "int64",
    "prompt": "string",
    "target": "string",
    "seed": "int64",
    "noise_seed": "int64",
    "status": "string",
    "seconds": "double",
    "host": "string",
    "window": "list<int32>",
    "log_prob": "list<float>",
    "bytes": "int64",
    "json_offset": "int64",
    "json_bytes": "int64",
    "json_crc32": "int64",
    "mp4_offset": "int64",
    "mp4_bytes": "int64",
    "mp4_crc32": "int64",
    "traj_offset": "int64",
    "traj_bytes": "int64",
    "traj_header_bytes": "int64",
    "traj_header_crc32": "int64",
    "latents_offset": "int64",
    "latent_bytes": "int64",
    "latent_dtype": "string",
    "latent_shape": "list<int64>",
    "latent_crc32": "list<int64>",
    "states": "list<int32>",
    "text_offset": "int64",
    "text_bytes": "int64",
    "text_crc32": "int64",
}


def sample_row(buffer: memoryview, parts: Sequence[Member], where: str) -> Row:
    """The row of one sample from its three members, all checksums verified. Raises Damaged naming the member."""
    key = parts[0].name.partition(".")[0]
    if [part.name for part in parts] != [f"{key}.{extension}" for extension in EXTENSIONS]:
        raise Damaged(f"{where}: {key} does not have the members {', '.join(EXTENSIONS)} in this order", REPAIR)
    meta, video, trajectory = (buffer[part.offset : part.offset + part.size] for part in parts)
    row = _meta_columns(key, parse_meta(meta, key, f"{where}: {parts[0].name}"))
    for name, part, payload in zip(("json", "mp4"), parts[:2], (meta, video), strict=True):
        row |= {f"{name}_offset": part.offset, f"{name}_bytes": part.size, f"{name}_crc32": zlib.crc32(payload)}
    row |= _trajectory_columns(trajectory, parts[2], f"{where}: {parts[2].name}")
    row["bytes"] = sum(part.size for part in parts)
    return row


def sample_rows(buffer: memoryview, where: str) -> list[Row]:
    """The rows of a tar that holds samples alone, all checksums verified. Raises Damaged."""
    return [sample_row(buffer, parts, where) for parts in _runs(members(buffer, where))]


def group_columns(buffer: memoryview, member: Member, where: str) -> Row:
    """The three columns about a group's tensors, all checksums verified. Raises Damaged."""
    payload = buffer[member.offset : member.offset + member.size]
    entries, _ = tensors.parse(payload, f"{where}: {member.name}")
    tensors.check(payload, entries, f"{where}: {member.name}")
    return {"text_offset": member.offset, "text_bytes": member.size, "text_crc32": zlib.crc32(payload)}


def shifted(row: Row, base: int) -> Row:
    """The row with every offset moved by `base` bytes."""
    return {name: value + base if name.endswith("_offset") else value for name, value in row.items()}


def scan(buffer: memoryview, where: str) -> list[Row]:
    """All rows of a tar, every byte checked. Raises Damaged: duplicate, missing, foreign or misplaced members too."""
    rows: dict[str, Row] = {}
    texts: dict[str, Row] = {}
    for parts in _runs(members(buffer, where)):
        text = GROUP_NAME.fullmatch(parts[0].name)
        name = text[1] if text else parts[0].name.partition(".")[0]
        if name in rows or name in texts:
            raise Damaged(f"{where}: {name} is in the archive twice", REPAIR)
        if text:
            texts[name] = group_columns(buffer, parts[0], where)
        elif texts:
            raise Damaged(f"{where}: {name} stands behind the tensors of the groups", REPAIR)
        else:
            rows[name] = sample_row(buffer, parts, where)
    groups = {row["group"] for row in rows.values()}
    if groups != texts.keys():
        raise Damaged(f"{where}: group tensors do not match the samples: {sorted(groups ^ texts.keys())}", REPAIR)
    return [row | texts[row["group"]] for row in rows.values()]


def parse_meta(payload: memoryview, key: str, where: str) -> SampleValues:
    """The record in a sample's JSON member. Raises Damaged unless it is an object that belongs to `key`."""
    try:
        meta = parse_object(bytes(payload), most=LARGEST_META)
        check_sample(bytes(payload))
    except ValueError as error:
        raise Damaged(f"{where}: damaged record: {error}", REPAIR) from error
    if (meta["key"], meta["schema"]) != (key, SCHEMA):
        raise Damaged(f"{where}: the record is of key {meta['key']!r}, schema {meta['schema']!r}", REPAIR)
    return cast(SampleValues, meta)


def keys_sha256(keys: Sequence[str]) -> str:
    """sha256 of the sample keys of a shard, one per line, as the manifest records it."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def to_parquet(rows: list[Row], kv: dict[str, str]) -> bytes:
    """The bytes of an index file."""
    import pyarrow

    return parquet.encode(pyarrow.Table.from_pylist(rows, schema=schema()), kv)


def read(path: str | Path, data: bytes | None = None, rows: int | None = None) -> tuple[pyarrow.Table, dict[str, str]]:
    """An index and its metadata; `data` and `rows` as for `parquet.read`. Raises Damaged."""
    table, kv = parquet.read(path, REPAIR, data, rows)
    if table.schema != schema() or kv.get("schema") != str(SCHEMA) or "shard_sha256" not in kv:
        raise Damaged(f"{path}: its columns are not those of an index of schema {SCHEMA}", REPAIR)
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = column.combine_chunks().flatten() if COLUMNS[name].startswith("list") else column
        if (column.null_count and name not in OPTIONAL) or (inner.null_count and inner is not column):
            raise Damaged(f"{path}: {name} is missing for some samples", REPAIR)
    return table, kv


def check_rows(rows: Sequence[Row], size: int, where: str) -> None:
    """Raise Damaged unless every member and state of an index lies in its tar of `size` bytes, as long as it says.

    What is checked here is allocated by readers before they see a byte of the tar.
    """
    for row in rows:
        key, states = row["key"], len(row["states"])
        for name in ("json", "mp4", "traj", "text"):
            start, length = row[f"{name}_offset"], row[f"{name}_bytes"]
            if not (BLOCK <= start <= size and 0 <= length <= size - start):
                raise Damaged(f"{where}: {key} has its {name} outside of the tar", REPAIR)
        if row["json_bytes"] > LARGEST_META or not 8 <= row["traj_header_bytes"] <= row["traj_bytes"]:
            raise Damaged(f"{where}: {key} has a record or a header of an impossible size", REPAIR)
        code = tensors.NAMES.get(row["latent_dtype"])
        one = tensors.SIZES[code] if code else -1
        start = row["latents_offset"] - row["traj_offset"]
        fits = row["latent_bytes"] == math.prod(row["latent_shape"]) * one and min(row["latent_shape"], default=0) >= 0
        within = row["traj_header_bytes"] <= start <= row["traj_bytes"] - states * row["latent_bytes"]
        if not (fits and within and len(row["latent_shape"]) <= 8 and len(row["latent_crc32"]) == states):
            raise Damaged(f"{where}: {key} has latents that do not fit its trajectory", REPAIR)


def schema() -> pyarrow.Schema:
    """The Arrow schema of COLUMNS."""
    import pyarrow

    def arrow(name: str) -> pyarrow.DataType:
        inner = name.removeprefix("list<").removesuffix(">")
        return pyarrow.list_(arrow(inner)) if name.startswith("list<") else pyarrow.type_for_alias(inner)

    return pyarrow.schema([(name, arrow(kind)) for name, kind in COLUMNS.items()])


def _meta_columns(key: str, meta: SampleValues) -> Row:
    match = SAMPLE_KEY.fullmatch(key)
    assert match
    iteration, prompt_id, sample = (int(number) for number in match.groups())
    return {
        "key": key,
        "iteration": iteration,
        "prompt_id": prompt_id,
        "group": group_of(key),
        "sample": sample,
        "prompt": meta.get("prompt"),
        "target": meta.get("target"),
        "seed": meta.get("seed"),
        "noise_seed": (meta.get("noise_seeds") or {}).get("initial"),
        "status": meta.get("status", "ok"),
        "seconds": meta.get("seconds"),
        "host": meta.get("host"),
    }


def _trajectory_columns(payload: memoryview, member: Member, where: str) -> Row:
    entries, header_bytes = tensors.parse(payload, where)
    tensors.check(payload, entries, where)
    latents = entries.get("latents")
    states = _numbers(payload, entries, "states", "I32")
    if latents is None or not latents.shape or len(states) != latents.shape[0]:
        raise Damaged(f"{where}: it must hold latents [M, …] and states int32 [M]", REPAIR)
    return {
        "window": _numbers(payload, entries, "step_index", "I32"),
        "log_prob": _numbers(payload, entries, "log_prob", "F32"),
        "traj_offset": member.offset,
        "traj_bytes": member.size,
        "traj_header_bytes": header_bytes,
        "traj_header_crc32": zlib.crc32(payload[:header_bytes]),
        "latents_offset": member.offset + latents.start,
        "latent_bytes": (latents.stop - latents.start) // max(1, latents.shape[0]),
        "latent_dtype": tensors.TORCH[latents.dtype],
        "latent_shape": list(latents.shape[1:]),
        "latent_crc32": list(latents.crc32),
        "states": states,
    }


def _numbers(payload: memoryview, entries: dict[str, tensors.Entry], name: str, code: str) -> Sequence[float]:
    """A one-dimensional tensor as a list; empty when there is none of that name and type. No torch, no NumPy."""
    entry = entries.get(name)
    if entry is None or entry.dtype != code or len(entry.shape) != 1:
        return []
    return payload[entry.start : entry.stop].cast("f" if code == "F32" else "i").tolist()


def _runs(walk: Iterator[Member]) -> Iterator[list[Member]]:
    """Adjacent members of one sample together; a group member by itself."""
    run: list[Member] = []
    for member in walk:
        match = SAMPLE_NAME.fullmatch(member.name)
        if run and not (match and run[0].name.startswith(f"{match[1]}.")):
            yield run
            run = []
        run.append(member)
    if run:
        yield run
