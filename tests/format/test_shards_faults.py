"""Every fault a disk, a network or a person can put into a run: found, named, and never read as data."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import index
from shards.errors import REPAIR, Damaged, RunFailed, UserError
from shards.files import canonical_sha256, sha256_file
from shards.reader import open_shard, webdataset_pipeline
from shards.records.reading import CHECKSUM, sealed
from shards.records.updates import read_updates, update_line
from shards.run import Stage
from shards.sidecar import (
    CONTENT,
    content_sha256,
    read_advantages,
    read_scores,
    scored,
    write_advantages,
    write_scores,
)
from shards.spool import Sample, spooled, write_group, write_samples
from shards.verify.shards import verify
from shards.writer import seal
from tests.support.shard_fixtures import (
    advantage_frame,
    committed_stage,
    fill,
    make_group,
    make_plan,
    make_sample,
    planned_stage,
    score_frame,
)

SCORER, SPEC = "ocr-12345678", "aaaaaaaa"
KEY = "i000000-p000000-s01"
WEIGHTS = "high_noise/pytorch_lora_weights.safetensors"
CHECKPOINT = "trainer/high_noise/update-000002"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: two shards, scored, with advantages and a policy. Never changed; tests work on copies."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    stage = committed_stage(run)
    for shard in stage.shards():
        write_scores(stage, shard, SCORER, score_frame(stage, shard), {"scorer": "ocr"})
        write_advantages(stage, shard, SPEC, advantage_frame(stage, shard), {})
    adapter = stage.policy_dir / WEIGHTS
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    average = stage.policy_dir / "ema" / WEIGHTS
    average.parent.mkdir(parents=True)
    average.write_bytes(b"averaged weights")
    plan = stage.plan()
    assert plan is not None
    identities = [{"base": plan.policy.base, "adapters": {WEIGHTS: sha256_file(one)}} for one in (adapter, average)]
    trained, averaged = ({"fingerprint": canonical_sha256(one), **one} for one in identities)
    del averaged["base"]
    record = {"schema": 1, "iteration": 0, **trained, "average": averaged}
    stage.policy_record_path.write_bytes(sealed(record, "policy.json"))
    checkpoint = stage.policy_dir / CHECKPOINT
    checkpoint.mkdir(parents=True)
    (checkpoint / "part.safetensors").write_bytes(b"state of the trainer")
    part = checkpoint / "part.safetensors"
    commit = {"schema": 1, "update": 2, "ranks": 1, "tensors": {}, "files": {part.name: part.stat().st_size}}
    (checkpoint / "commit.json").write_bytes(sealed(commit | {"sha256": {part.name: sha256_file(part)}}, "commit.json"))
    stage.metrics_path.write_text(update_line(update(1)) + update_line(update(2)))
    rewards = read_advantages(stage, SPEC)["reward"]
    summary = {"schema": 1, "specification": {}, "samples": len(rewards), "mean_reward": rewards.mean()}
    stage.summary_path(SPEC).write_bytes(sealed(summary, "_summary.json"))
    assert verify(run) == []
    return run


def update(number: int, iteration: int = 0) -> dict[str, Any]:
    """The metrics of one update."""
    return {"iteration": iteration, "expert": "high_noise", "update": number, "total_updates": number, "loss": 0.5}


def rewrite(path: Path, **changes: Any) -> None:
    """Change a record as a forger would: its checksum is made anew."""
    rewrite_with(path, json.loads(path.read_text()) | changes)


def rewrite_with(path: Path, record: dict[str, Any]) -> None:
    """A record with the checksum of its content."""
    path.write_bytes(sealed({name: value for name, value in record.items() if name != CHECKSUM}, path))


@pytest.fixture
def stage(pristine: Path, tmp_path: Path) -> Stage:
    """Stage iter-0000 of a copy of the pristine run."""
    shutil.copytree(pristine, tmp_path / "run")
    return Stage(tmp_path / "run", "iter-0000", 0, "rollout")


def faults(stage: Stage) -> str:
    """All that verify says about the run, one fault a line."""
    found = verify(stage.run_path)
    assert all(problem.hint for problem in found)
    return "\n".join(f"{problem.kind} {problem.problem}" for problem in found)


def place(stage: Stage, member: str) -> tuple[int, int]:
    """Offset and size of a member's payload in shard 0, as the standard library finds them."""
    with tarfile.open(stage.shard_path(0)) as tar:
        info = tar.getmember(member)
        return info.offset_data, info.size


def change(path: Path, edit: Callable[[bytearray], bytes | bytearray | None]) -> None:
    """Rewrite a file with its bytes edited."""
    data = bytearray(path.read_bytes())
    path.write_bytes(edit(data) or data)


def flip(path: Path, offset: int) -> None:
    """Flip one bit."""
    change(path, lambda data: data.__setitem__(offset, data[offset] ^ 0x40))


def vouch(stage: Stage, shard: int = 0) -> None:
    """Make manifest and index agree with whatever tar is there now, as a careful forger would."""
    sha256 = sha256_file(stage.shard_path(shard))
    table, kv = index.read(stage.index_path(shard))
    stage.index_path(shard).write_bytes(index.to_parquet(table.to_pylist(), kv | {"shard_sha256": sha256}))
    index_path = stage.index_path(shard)
    rewrite(
        stage.manifest_path(shard),
        tar={"bytes": stage.shard_path(shard).stat().st_size, "sha256": sha256},
        index={"bytes": index_path.stat().st_size, "sha256": sha256_file(index_path)},
    )


# --- the tar is cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "extra", "named"),
    [
        (f"{KEY}.traj.safetensors", 100, f"cut inside {KEY}.traj.safetensors"),
        (f"{KEY}.mp4", -300, "the end of the archive is missing"),  # inside a header
        (f"{KEY}.mp4", -512, "the end of the archive is missing"),  # at a member boundary
    ],
)
def test_cut_tar(stage: Stage, member: str, extra: int, named: str) -> None:
    os.truncate(stage.shard_path(0), place(stage, member)[0] + extra)
    with pytest.raises(Damaged, match="bytes, committed were"):
        open_shard(stage, 0)
    with pytest.raises(Damaged, match="bytes, committed were"):
        list(webdataset_pipeline(stage))
    assert "shard-000000.tar: has" in faults(stage)
    assert named in faults(stage)
    vouch(stage)
    assert named in faults(stage)


@pytest.mark.parametrize("remaining", [0, 512, -1024, -512, -1])
def test_missing_end_and_empty_file(stage: Stage, remaining: int) -> None:
    change(stage.shard_path(0), lambda data: data[:remaining] if remaining else os.truncate(stage.shard_path(0), 0))
    if not remaining:
        os.truncate(stage.shard_path(0), 0)
    with pytest.raises(Damaged):
        open_shard(stage, 0)
    assert "shard-000000.tar" in faults(stage)


# --- a bit is flipped -----------------------------------------------------------------------------------------------

FLIPS = {
    "tar header name": (f"{KEY}.mp4", -502, "tar header at byte"),
    "tar header size": (f"{KEY}.mp4", -378, "tar header at byte"),
    "tar header checksum": (f"{KEY}.mp4", -512 + 150, "tar header at byte"),
    "record": (f"{KEY}.json", 20, f"{KEY}.json"),
    "tensor": (f"{KEY}.traj.safetensors", -30, f"{KEY}.traj.safetensors: tensor"),
    "safetensors header": (f"{KEY}.traj.safetensors", 12, f"{KEY}.traj.safetensors: damaged tensor header"),
    "safetensors length": (f"{KEY}.traj.safetensors", 6, "its header claims"),
    "text": ("__group__/i000000-p000000.text.safetensors", -1, "text.safetensors: tensor prompt"),
}


@pytest.mark.parametrize(("member", "position", "named"), FLIPS.values(), ids=FLIPS)
def test_flipped_bit_is_located_even_when_hashes_were_adjusted(
    stage: Stage, member: str, position: int, named: str
) -> None:
    offset, size = place(stage, member)
    from_end = -100 < position < 0  # of the payload; lower still is in the tar header before it
    flip(stage.shard_path(0), offset + position + (size if from_end else 0))
    assert "shard-000000.tar: is not what was committed (sha256)" in faults(stage)
    assert named in faults(stage)
    vouch(stage)
    assert named in faults(stage) or "differs from the tar" in faults(stage)
    with pytest.raises(Damaged):
        read_all(stage)


def read_all(stage: Stage) -> None:
    """Every member of shard 0 through the reader."""
    with open_shard(stage, 0) as shard:
        for key in shard.keys:
            shard.meta(key)
            shard.video(key)
            shard.trajectory(key)
        shard.group(shard.groups[0])


def test_flipped_bit_in_a_video(stage: Stage) -> None:
    offset, _ = place(stage, f"{KEY}.mp4")
    flip(stage.shard_path(0), offset + 700)
    vouch(stage)
    assert f"{KEY} differs from the tar in mp4_crc32" in faults(stage)
    with open_shard(stage, 0) as shard:
        shard.video("i000000-p000000-s00")
        with pytest.raises(Damaged, match=rf"{KEY}\.mp4 is damaged"):
            shard.video(KEY)


def test_flipped_bit_in_one_latent_names_its_state_and_spares_the_others(stage: Stage) -> None:
    row = open_shard(stage, 0).row(KEY)
    flip(stage.shard_path(0), row["latents_offset"] + 2 * row["latent_bytes"] + 5)
    with open_shard(stage, 0) as shard:
        shard.latents(KEY, [1, 2, 4])
        with pytest.raises(Damaged, match="state 3 is damaged"):
            shard.latents(KEY, [2, 3])
        with pytest.raises(Damaged, match=r"tensor latents\[2\] is damaged"):
            shard.trajectory(KEY)
    with pytest.raises(Damaged, match=rf"{KEY}.*tensor latents\[2\] is damaged"):
        list(webdataset_pipeline(stage))
    assert f"{KEY}.traj.safetensors: tensor latents[2] is damaged" in faults(stage)


def test_flipped_bit_in_padding(stage: Stage) -> None:
    offset, size = place(stage, f"{KEY}.json")
    flip(stage.shard_path(0), offset + size + 3)
    vouch(stage)
    assert f"padding of {KEY}.json is not empty" in faults(stage)


# --- foreign archives -----------------------------------------------------------------------------------------------


def entry(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A tar member as any other tool would write it."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


FOREIGN = {
    "path upwards": entry("../../etc/x.json"),
    "absolute path": entry("/abs/x.json"),
    "upper case": entry("I000000-P000000-S00.json"),
    "dot in key": entry("w2.2-s0.json"),
    "no extension": entry("i000000-p000000-s09"),
    "hidden": entry(".i000000-p000000-s09.json"),
    "not ASCII": entry("ключ.json"),
    "long": entry("k" * 300 + ".json"),
    "pickle": entry("i000000-p000000-s09.pyd", b"cos\nsystem\n(S'touch PWNED'\ntR."),
    "torch.save": entry("i000000-p000000-s09.pth"),
    "symbolic link": entry("i000000-p000000-s09.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": entry("i000000-p000000-s09.json", b"", type=tarfile.LNKTYPE, linkname=f"{KEY}.json"),
    "clock": entry("i000000-p000000-s09.json", b"{}", mtime=1.5),
}


@pytest.mark.parametrize(("info", "data"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_members_are_refused(stage: Stage, info: tarfile.TarInfo, data: bytes) -> None:
    with tarfile.open(stage.shard_path(0), "a") as tar:
        tar.addfile(info, io.BytesIO(data))
    vouch(stage)
    assert "damaged or foreign tar header" in faults(stage)


def test_name_that_is_not_utf8(stage: Stage) -> None:
    def edit(data: bytearray) -> None:
        data[0] = 0xFF
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))

    change(stage.shard_path(0), edit)
    vouch(stage)
    assert "damaged or foreign tar header at byte 0" in faults(stage)


def rebuilt(stage: Stage, order: Callable[[list[bytes]], list[bytes]]) -> None:
    """Shard 0 with its members put together anew."""
    data = stage.shard_path(0).read_bytes()
    with tarfile.open(stage.shard_path(0)) as tar:
        parts = [data[info.offset : info.offset_data + -(-info.size // 512) * 512] for info in tar]
    stage.shard_path(0).write_bytes(b"".join(order(parts)) + bytes(1024))
    vouch(stage)


ORDERS = {
    "duplicate member": (lambda p: [p[0], *p], "does not have the members"),
    "duplicate sample, adjacent": (lambda p: [*p[:3], *p], "does not have the members"),
    "duplicate sample, apart": (lambda p: [*p[:9], *p[:3], *p[9:]], "is in the archive twice"),
    "missing member": (lambda p: [*p[:1], *p[2:]], "i000000-p000000-s00 does not have the members"),
    "missing sample": (lambda p: p[3:], "its samples are not those of plan.json"),
    "samples swapped": (lambda p: [*p[3:6], *p[:3], *p[6:]], "its samples are not those of plan.json"),
    "members swapped": (lambda p: [p[1], p[0], *p[2:]], "does not have the members"),
    "group missing": (lambda p: p[:9], "group tensors do not match the samples"),
    "group first": (lambda p: [p[9], *p[:9]], "stands behind the tensors of the groups"),
    "two archives": (lambda p: [*p, bytes(1024), *p], "something follows the end of the archive"),
}


@pytest.mark.parametrize(("order", "named"), ORDERS.values(), ids=ORDERS)
def test_members_out_of_order(stage: Stage, order: Callable[[list[bytes]], list[bytes]], named: str) -> None:
    rebuilt(stage, order)
    assert named in faults(stage)
    assert named in "".join(problem.problem for problem in verify(stage.shard_path(0)))


def test_shard_that_is_a_link(stage: Stage) -> None:
    path = stage.shard_path(0)
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))
    with pytest.raises(Damaged, match="cannot be opened as a plain file"):
        open_shard(stage, 0)
    assert "cannot be opened as a plain file" in faults(stage)
    assert "cannot be opened as a plain file" in verify(path)[0].problem


# --- files that do not belong together --------------------------------------------------------------------------------


def test_same_shard_under_another_number(stage: Stage) -> None:
    for path in (stage.shard_path, stage.index_path, stage.manifest_path):
        shutil.copy(path(0), path(1))
    with pytest.raises(Damaged, match="record of shard 0 of"):
        open_shard(stage, 1)
    assert "manifest/shard-000001.json: this is the record of" in faults(stage)
    rewrite(stage.manifest_path(1), shard=1)
    assert "shard-000001.tar: its samples are not those of plan.json" in faults(stage)


def test_index_of_another_run(stage: Stage, tmp_path: Path) -> None:
    other = committed_stage(tmp_path / "other", prompt="a dog")
    shutil.copy(other.index_path(0), stage.index_path(0))
    with pytest.raises(Damaged, match="not the one that was committed"):
        open_shard(stage, 0)
    assert "shard-000000.parquet: the index is not the one that was committed" in faults(stage)
    size = stage.index_path(0).stat().st_size
    rewrite(stage.manifest_path(0), index={"bytes": size, "sha256": sha256_file(stage.index_path(0))})
    with pytest.raises(Damaged, match="belongs to another tar"):
        open_shard(stage, 0)
    assert "belongs to another tar" in faults(stage)


def test_tar_of_another_run(stage: Stage, tmp_path: Path) -> None:
    other = committed_stage(tmp_path / "other", prompt="a dog")
    shutil.copy(other.shard_path(0), stage.shard_path(0))
    vouch(stage)
    assert "sampled with another plan_sha256" in faults(stage)
    assert "differs from the tar in prompt" in faults(stage)


def test_index_that_lies(stage: Stage) -> None:
    table, kv = index.read(stage.index_path(0))
    rows = table.to_pylist()
    rows[1]["log_prob"][0] = 0.0
    stage.index_path(0).write_bytes(index.to_parquet(rows, kv))
    vouch(stage)
    assert f"{KEY} differs from the tar in log_prob" in faults(stage)
    for name, told in (("traj_offset", "latents that do not fit"), ("mp4_offset", "is not where the index says")):
        other = [rows[0], rows[1] | {name: rows[1][name] + 512}, *rows[2:]]
        stage.index_path(0).write_bytes(index.to_parquet(other, kv))
        vouch(stage)
        with pytest.raises(Damaged, match=told):
            open_shard(stage, 0).video(KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\xff"])
def test_damaged_manifest_and_plan(stage: Stage, text: str) -> None:
    stage.manifest_path(0).write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match=r"shard-000000\.json") as caught:
        open_shard(stage, 0)
    assert caught.value.hint == REPAIR  # not every shard has a copy
    assert "shard-000000.json" in faults(stage)
    stage.plan_path.write_bytes(text.encode("latin-1"))
    assert "plan.json" in faults(stage)


def test_other_version(stage: Stage) -> None:
    stage.plan_path.write_text(json.dumps(make_plan() | {"schema": 2}))
    with pytest.raises(UserError, match="has schema 2; this version reads 1"):
        stage.plan()
    assert "has schema 2" in faults(stage)


def test_plan_that_was_edited(stage: Stage) -> None:
    stage.plan_path.write_text(json.dumps(make_plan(seed=9)))
    assert "committed for another plan.json" in faults(stage)
    twice = make_plan()
    twice["shards"][1] = twice["shards"][0]
    stage.plan_path.write_text(json.dumps(twice))
    assert "its shards do not hold each of its groups once" in faults(stage)
    stage.plan_path.unlink()
    assert "plan.json is missing" in faults(stage)


def test_mixed_policies(stage: Stage) -> None:
    policy = json.loads(stage.manifest_path(1).read_text())["policy"]
    rewrite(stage.manifest_path(1), policy=policy | {"fingerprint": "0" * 64})
    assert "shards 0, 1 were sampled by different policies" in faults(stage)
    assert "shard-000001.json: policy is not as in plan.json" in faults(stage)


@pytest.mark.parametrize("folder", ["", "ema/"])
def test_half_updated_policy(stage: Stage, folder: str) -> None:
    adapter = stage.policy_dir / f"{folder}{WEIGHTS}"
    adapter.write_bytes(b"other weights")
    assert f"policy/{folder}{WEIGHTS} is not what" in faults(stage)
    adapter.unlink()
    assert f"policy/{folder}{WEIGHTS} is missing" in faults(stage)


@pytest.mark.parametrize("text", ["{", "[]", '{"adapters": 3}', '{"average": 3}'])
def test_a_damaged_record_of_the_policy(stage: Stage, text: str) -> None:
    (stage.policy_dir / "policy.json").write_text(text)
    assert "policy.json is damaged" in faults(stage)


def test_a_damaged_checkpoint(stage: Stage) -> None:
    """Before the policy is there, training goes on from the one before; after that the next iteration needs it."""
    part, commit = (stage.policy_dir / CHECKPOINT / name for name in ("part.safetensors", "commit.json"))
    flip(part, 3)
    assert f"{CHECKPOINT}/part.safetensors is damaged" in faults(stage)
    assert "the next iteration makes a new optimizer" in verify(stage.run_path)[0].hint
    part.unlink()
    assert f"{CHECKPOINT}/part.safetensors is damaged" in faults(stage)
    (stage.policy_dir / "policy.json").unlink()
    assert "from the checkpoint before" in verify(stage.run_path)[0].hint
    for text in ("{", '{"files": {}}', '{"sha256": 3}'):
        commit.write_text(text)
        assert f"{CHECKPOINT}/commit.json is damaged" in faults(stage)
    commit.unlink()  # as training does when it drops an old one
    assert faults(stage) == ""


def test_what_an_expert_that_is_trained_alone_leaves(stage: Stage) -> None:
    """Its record and its log, until the policy is there."""
    stage.policy_record_path.unlink()
    path, log = stage.expert_record_path("high_noise"), stage.expert_metrics_path("high_noise")
    sums = [sha256_file(stage.policy_dir / f"{folder}{WEIGHTS}") for folder in ("", "ema/")]
    record: dict[str, Any] = {"schema": 1, "iteration": 0, "expert": "high_noise", "train_plan": "0" * 64}
    record |= {"adapters": {WEIGHTS: sums[0]}, "average": {WEIGHTS: sums[1]}, "unmoved": [], "replay": 0.0}
    path.write_bytes(sealed(record, path))
    stage.metrics_path.rename(log)
    assert faults(stage) == ""
    log.write_text("{\n" + update_line(update(2)))
    assert "metrics.high_noise.jsonl: line 1 is damaged" in faults(stage)
    path.write_bytes(sealed(record | {"expert": "low_noise"}, path))
    assert "high_noise.json: it is of low_noise of iteration 0" in faults(stage)
    (stage.policy_dir / "ema" / WEIGHTS).write_bytes(b"other weights")
    assert f"policy/ema/{WEIGHTS} is not what" in faults(stage)
    path.write_bytes(sealed(record, path).replace(b"0.0", b"0.1"))
    assert "high_noise.json is damaged" in faults(stage)


@pytest.mark.parametrize("line", [b"{", b'{"a": "\xff"'])
def test_a_line_of_the_log_that_is_no_json(stage: Stage, line: bytes) -> None:
    first, second = (update_line(update(number)).encode() for number in (1, 2))
    stage.metrics_path.write_bytes(first + line + b"\n" + second)
    assert "metrics.jsonl: line 2 is damaged" in faults(stage)
    assert read_updates(stage.metrics_path) == [update(1)]


def test_the_source_of_a_reward_is_the_one_that_its_tables_name(stage: Stage) -> None:
    path = stage.scores_dir / SCORER / "_source.py"
    path.write_text("class Mine: ...\n")
    assert faults(stage) == ""  # tables of older versions name none
    for shard in stage.shards():
        write_scores(stage, shard, SCORER, score_frame(stage, shard), {"source_sha256": sha256_file(path)})
    assert faults(stage) == ""
    flip(path, 3)
    assert "_source.py: is not the source that shard-000000.parquet names" in faults(stage)


def test_a_summary_that_is_not_of_its_tables(stage: Stage) -> None:
    path = stage.summary_path(SPEC)
    genuine = json.loads(path.read_text())
    for name, value in (("samples", genuine["samples"] + 1), ("mean_reward", None), ("mean_reward", 0.125)):
        rewrite_with(path, genuine | {name: value})
        assert f"summary.json: {name} is not that of the tables" in faults(stage)
    rewrite(path, samples=0)
    assert "summary.json: samples and mean_reward are not those of the tables" in faults(stage)
    path.write_text(json.dumps(genuine | {"samples": 0}))
    assert "summary.json is damaged: its content is not what was written" in faults(stage)
    path.write_text("{")
    assert "summary.json is damaged" in faults(stage)
    flip(stage.advantage_path(SPEC, 0), 40)  # a table that cannot be read is told as such
    rewrite_with(path, genuine)
    assert "summary.json" not in faults(stage)
    assert "shard-000000.parquet: the table is damaged" in faults(stage)


def test_a_record_of_another_base_model(stage: Stage) -> None:
    plan = stage.plan()
    assert plan is not None
    path = stage.run_path / "model.json"
    path.write_bytes(sealed({"schema": 1, "base": plan.policy.base, "path": "wan"}, path))
    assert "model.json" not in faults(stage)
    rewrite(path, base="0" * 64)
    assert "model.json: its model is not that of" in faults(stage)
    path.write_text("{")
    assert "model.json is damaged" in faults(stage)


def test_a_fault_is_told_once(stage: Stage) -> None:
    stage.shard_path(0).unlink()
    assert len(faults(stage).splitlines()) == 1


def test_training_input_that_changed(stage: Stage) -> None:
    plan = stage.train_plan_path
    plan.parent.mkdir()
    sha256 = sha256_file(stage.shard_path(1))
    frozen = {"schema": 1, "iteration": 0, "plan_sha256": stage.plan_sha256(), "policy": "f" * 64}
    frozen |= {"shards": {"1": sha256}, "advantage": SPEC, "order_seed": 0, "train": {}}
    rewrite_with(plan, frozen)
    assert faults(stage) == ""
    rewrite(plan, shards={"0": sha256})
    assert "train/plan.json: shard 0 is not the one that was frozen" in faults(stage)
    rewrite(plan, shards={"9": sha256})
    assert "shard 9 of" in faults(stage)
    for name, value in {"iteration": 1, "order_seed": 5, "policy": "0" * 64, "plan_sha256": "0" * 64}.items():
        rewrite_with(plan, frozen | {name: value})
        assert f"train/plan.json: {name} is not that of" in faults(stage)


# --- tables beside the shards -----------------------------------------------------------------------------------------


def test_missing_sidecar_is_work_to_do(stage: Stage) -> None:
    stage.score_path(SCORER, 1).unlink()
    assert faults(stage).startswith("incomplete ")
    assert f"{SCORER}/shard-000001.parquet is missing: shard 1" in faults(stage)
    assert not scored(stage, 1, SCORER)
    assert scored(stage, 0, SCORER)
    with pytest.raises(Damaged, match=r"shard-000001\.parquet: the file does not exist"):
        read_scores(stage, SCORER)
    assert len(read_scores(stage, SCORER, [0])) == 3


def test_sidecar_of_another_shard(stage: Stage) -> None:
    shutil.copy(stage.score_path(SCORER, 0), stage.score_path(SCORER, 1))
    assert "shard-000001.parquet: made for another shard 1 (sha256)" in faults(stage)
    assert not scored(stage, 1, SCORER)
    with pytest.raises(Damaged, match="made for another shard"):
        read_scores(stage, SCORER)


def forged(stage: Stage, path: Path, edit: Callable[[list[dict]], list[dict]]) -> None:
    """A sidecar with its rows edited, metadata intact."""
    import pyarrow

    from shards import parquet

    table, kv = parquet.read(path, "")
    table = pyarrow.Table.from_pylist(edit(table.to_pylist()), schema=table.schema)
    path.write_bytes(parquet.encode_sealed(table, kv | {CONTENT: content_sha256(table)}))


ROWS = {
    "wrong row count": (lambda rows: rows[:-1], "2 rows for 3 samples; missing i000000-p000000-s02"),
    "extra key": (lambda rows: [*rows, rows[0] | {"key": "i000000-p000000-s07"}], "extra i000000-p000000-s07"),
    "duplicate": (lambda rows: [*rows[:2], rows[0]], "missing i000000-p000000-s02"),
    "other order": (lambda rows: rows[::-1], "other order"),
}


@pytest.mark.parametrize(("edit", "named"), ROWS.values(), ids=ROWS)
def test_sidecar_rows_that_do_not_match(stage: Stage, edit: Callable[[list[dict]], list[dict]], named: str) -> None:
    for path in (stage.score_path(SCORER, 0), stage.advantage_path(SPEC, 0)):
        forged(stage, path, edit)
        assert f"{path}: does not match the shard: " in faults(stage)
        assert named in faults(stage)
    with pytest.raises(Damaged, match=named.split(";")[0]):
        read_scores(stage, SCORER)


def test_advantage_that_is_missing(stage: Stage) -> None:
    forged(stage, stage.advantage_path(SPEC, 0), lambda rows: [row | {"advantage": float("nan")} for row in rows])
    assert "advantage is missing for some samples" in faults(stage)


def test_damaged_sidecar(stage: Stage) -> None:
    path = stage.score_path(SCORER, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "shard-000000.parquet: the table is damaged" in faults(stage)
    assert not scored(stage, 0, SCORER)
    original = read_scores(stage, SCORER, [1])
    path = stage.score_path(SCORER, 1)
    whole = path.read_bytes()
    found = 0
    for position in range(4, len(whole), 13):
        path.write_bytes(whole)
        flip(path, position)
        try:
            assert read_scores(stage, SCORER, [1]).equals(original)  # a bit that holds no value, as in statistics
        except Damaged:
            found += 1
    assert found > len(whole) // 13 // 3


def test_strays_in_a_folder_of_tables(stage: Stage) -> None:
    shutil.copy(stage.score_path(SCORER, 0), stage.score_path(SCORER, 7))
    (stage.advantage_dir(SPEC) / "notes.json").write_text("{}")
    assert "shard-000007.parquet: belongs to no committed shard" in faults(stage)
    assert "notes.json: belongs to no committed shard" in faults(stage)
    assert "summary.json" not in faults(stage)


def test_columns_that_differ_in_one_folder(stage: Stage) -> None:
    import pyarrow

    from shards import parquet

    table, kv = parquet.read(stage.score_path(SCORER, 1), "")
    table = table.append_column("more", pyarrow.array([1.0] * len(table)))
    stage.score_path(SCORER, 1).write_bytes(parquet.encode_sealed(table, kv | {CONTENT: content_sha256(table)}))
    assert "shard-000001.parquet: its columns differ" in faults(stage)
    with pytest.raises(Damaged, match=r"its columns are not those of shard-000000\.parquet"):
        read_scores(stage, SCORER)


# --- work in progress and what killed writers leave -------------------------------------------------------------------


def test_a_run_in_progress_is_not_damaged(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    fill(stage, 0)
    assert {problem.kind for problem in verify(tmp_path)} == {"incomplete"}
    seal(stage, 0, {})
    stage.manifest_path(0).unlink()
    assert "no manifest commits it" in faults(stage)
    assert not stage.shards()


def test_leftovers_of_dead_writers_are_reported_and_swept(tmp_path: Path) -> None:
    import fcntl

    stage = planned_stage(tmp_path)
    fill(stage, 0)
    folders = [stage.path / "rollout", stage.path / "rollout" / "index", stage.work_path(0)]
    for folder in folders:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / ".tmp-host-1-abc-shard-000000.tar").write_bytes(b"half")
    living = stage.path / "rollout" / ".tmp-host-2-abc-shard-000001.tar"
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert faults(stage).count("left by a killed writer") == 3
        assert seal(stage, 0, {})
        assert list(tmp_path.rglob(".tmp-*")) == [living]
        assert "left by" not in faults(stage)


def test_spool_of_a_committed_shard_is_reported(stage: Stage) -> None:
    stage.work_path(0).mkdir(parents=True)
    (stage.work_path(0) / f"{KEY}.tar").write_bytes(b"late")
    assert "leftover " in faults(stage)
    assert "the spool of a committed shard is still there" in faults(stage)


def test_damaged_spool_is_not_sealed(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    fill(stage, 0)
    path = stage.work_path(0) / f"{KEY}.tar"
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[:700], b"", whole.replace(b"a cat", b"a cow", 1)[:-1] + b"x"):
        path.write_bytes(damage)
        with pytest.raises(RunFailed, match=f"{KEY}"):
            seal(stage, 0, {})
    assert not list((stage.path / "rollout").glob("*.tar"))
    assert not list(tmp_path.rglob(".tmp-*"))
    path.write_bytes(whole)
    assert seal(stage, 0, {})


def test_uncommitted_tar_of_other_content_is_not_vouched_for(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    fill(stage, 0)
    stage.shard_path(0).parent.mkdir(parents=True)
    stage.shard_path(0).write_bytes(b"something else")
    with pytest.raises(RunFailed, match="no manifest vouches for it"):
        seal(stage, 0, {})
    assert not stage.shards()


# --- a full disk ------------------------------------------------------------------------------------------------------


def big_sample(stage: Stage, number: int) -> Sample:
    """A sample of about 400 kB."""
    sample = make_sample(stage, stage.groups(0)[0], number)
    return Sample(
        sample.key, sample.meta, sample.video, dict(sample.tensors) | {"x0_prev": np.zeros(100_000, np.float32)}
    )


def check_full(stage: Stage, exhaust: Callable[[], None], relieve: Callable[[], None]) -> None:
    """Samples, then the seal, then scores meet a full disk; each time nothing is left and the next try works."""
    (group,) = stage.groups(0)
    write_group(stage, 0, group, make_group(group))
    for number in range(3):
        if number == 2:
            exhaust()
            with pytest.raises(RunFailed, match=r"s02\.tar: disk full"):
                write_samples(stage, 0, big_sample(stage, 2))
            assert spooled(stage, 0) == set(stage.keys(0)[:2])
            relieve()
        assert write_samples(stage, 0, big_sample(stage, number))
    exhaust()
    with pytest.raises(RunFailed, match=r"shard-000000\.tar: disk full"):
        seal(stage, 0, {})
    assert not stage.shards()
    assert not list(stage.run_path.rglob(".tmp-*"))
    assert not stage.shard_path(0).exists()
    relieve()
    assert seal(stage, 0, {})
    assert verify(stage.shard_path(0)) == []


def test_file_size_limit_stands_for_a_full_disk(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path, groups=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ, so writes fail with EFBIG
    try:
        check_full(
            stage,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    ballast = disk / "ballast"

    def exhaust() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    try:
        check_full(planned_stage(disk / "run", groups=1), exhaust, ballast.unlink)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    (stage.path / "work").write_bytes(b"a file where a folder should be")
    with pytest.raises(RunFailed, match="cannot be written: "):
        write_samples(stage, 0, make_sample(stage, stage.groups(0)[0], 0))


def test_verify_says_what_it_cannot_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is neither a run, nor a stage, nor a shard"):
        verify(tmp_path)
    code = f"import shards.verify.shards, sys; shards.verify.shards.verify({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "UserError" in done.stderr
