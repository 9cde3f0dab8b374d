"""Shards: what is written comes back bit for bit, in our reader and in stock ones, and names nothing it should not."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import committed_tar as source_module
from shards import tensors
from shards.errors import Damaged, RunFailed, UserError
from shards.files import publish_new, publish_replace
from shards.plan import RolloutPlan
from shards.reader import open_shard, webdataset_pipeline
from shards.run import Run
from shards.spool import read_group, read_phase, remove_phase, spooled, write_group, write_phase, write_samples
from shards.tar import header
from shards.verify.shards import verify
from shards.workers.claims import claim
from shards.writer import seal
from tests.support.clock import tick
from tests.support.shard_fixtures import (
    STATES,
    committed_stage,
    fill,
    make_group,
    make_plan,
    make_sample,
    make_video,
    plan_of,
    planned_stage,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3.0e38]
TINY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
# a prompt may hold anything but lone surrogates, which UTF-8 has no bytes for
PROMPTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.sampled_from(["", "a 🐈 with a sign\0", "‏שלום‎ world", "e\u0301\r\n\t\x7f", "'; --", "../../etc/passwd"]),
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of type, shape and bytes, NaN and the sign of zero included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.flatten().view(torch.uint8)) == bytes(b.flatten().view(torch.uint8))
    )


@TINY
@given(data=st.data())
def test_tensors_round_trip_bit_for_bit(data: st.DataObject) -> None:
    wanted = {}
    for name in data.draw(st.sets(st.sampled_from(["latents", "x0_prev", "ψ", "mask"]), min_size=1)):
        dtype = data.draw(st.sampled_from([*DTYPES, torch.uint8, torch.int32, torch.int64, torch.float64]))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
        wanted[name] = torch.empty(shape, dtype=dtype)
        count = wanted[name].numel() * dtype.itemsize
        noise = torch.frombuffer(
            bytearray(data.draw(st.binary(min_size=count, max_size=count)) + b"\0"), dtype=torch.uint8
        )
        wanted[name].view(-1).view(torch.uint8).copy_(noise[:count])
    payload = b"".join(tensors.encode(wanted))
    found = tensors.decode(bytearray(payload), "here")
    stock = safetensors.torch.load(payload)
    assert found.keys() == stock.keys() == wanted.keys()
    entries, _ = tensors.parse(memoryview(payload), "here")
    assert all(entry.start % tensors.SIZES[entry.dtype] == 0 for entry in entries.values())  # aligned for any reader
    for name in wanted:
        assert same_bits(found[name], wanted[name])
        assert same_bits(stock[name], wanted[name])


@TINY
@given(prompt=PROMPTS, dtype=st.sampled_from(DTYPES), special=st.sampled_from(SPECIAL))
def test_shard_round_trips(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, dtype: torch.dtype, special: float
) -> None:
    stage = planned_stage(tmp_path_factory.mktemp("run"), groups=1, group_size=2, prompt=prompt)
    (group,) = stage.groups(0)
    wanted = [make_sample(stage, group, number, dtype=dtype) for number in range(2)]
    wanted[1].tensors["latents"].view(-1)[3] = special
    texts = {name: value.to(dtype) for name, value in make_group(group, dtype=dtype).items()}
    write_group(stage, 0, group, texts)
    for sample in wanted:
        assert write_samples(stage, 0, sample)
    assert seal(stage, 0, {})
    finite = bool(wanted[1].tensors["latents"].isfinite().all())
    assert bool(verify(stage.path)) != finite  # the record says that all is well
    with open_shard(stage, 0) as shard:
        assert shard.keys == [sample.key for sample in wanted]
        assert shard.index["prompt"].tolist() == [f"{prompt} 0"] * 2
        for sample in wanted:
            assert shard.meta(sample.key) == json.loads(json.dumps(sample.meta))
            assert shard.video(sample.key) == sample.video
            found = shard.trajectory(sample.key)
            assert found.keys() == sample.tensors.keys()
            for name, value in sample.tensors.items():
                assert same_bits(found[name], torch.as_tensor(value))
        for name, value in shard.group(group).items():
            assert same_bits(value, texts[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_by_state(tmp_path: Path, dtype: torch.dtype) -> None:
    stage = committed_stage(tmp_path, dtype=dtype)
    with open_shard(stage, 1) as shard:
        key = shard.keys[2]
        stored = shard.trajectory(key)["latents"]
        assert stored.dtype == dtype
        for states in ([1, 2], [3], [4, 1, 2], [2, 2], STATES, []):
            expected = stored[[STATES.index(state) for state in states]]
            assert same_bits(shard.latents(key, states), expected)
        staging = torch.empty(2, *stored.shape[1:], dtype=dtype)
        assert shard.latents(key, [2, 3], out=staging) is staging
        assert same_bits(staging, stored[1:3])
        with pytest.raises(UserError, match=r"has no state \[0\]"):
            shard.latents(key, [0, 1])


def test_numpy_and_torch_write_the_same_bytes(tmp_path: Path) -> None:
    first = committed_stage(tmp_path / "numpy", dtype="float32")
    second = committed_stage(tmp_path / "torch", dtype=torch.float32)
    assert first.shard_path(0).read_bytes() == second.shard_path(0).read_bytes()
    assert first.index_path(0).read_bytes() == second.index_path(0).read_bytes()


def test_non_contiguous_and_attached_tensors_are_stored_as_they_read(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path, groups=1, group_size=1)
    (group,) = stage.groups(0)
    sample = make_sample(stage, group, 0, dtype=torch.bfloat16)
    latents = sample.tensors["latents"].transpose(2, 3).requires_grad_()
    write_samples(
        stage, 0, type(sample)(sample.key, sample.meta, sample.video, dict(sample.tensors) | {"latents": latents})
    )
    write_group(stage, 0, group, make_group(group))
    seal(stage, 0, {})
    assert same_bits(open_shard(stage, 0).trajectory(sample.key)["latents"], latents.detach().contiguous())


def test_prompt_of_a_megabyte(tmp_path: Path) -> None:
    prompt = "猫" * 350_000
    stage = committed_stage(tmp_path, groups=1, group_size=2, prompt=prompt)
    assert len(prompt.encode()) > 2**20
    assert open_shard(stage, 0).index["prompt"][1] == f"{prompt} 0"
    assert not verify(stage.path)


def test_record_over_the_limit_is_refused(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    sample = make_sample(stage, stage.groups(0)[0], 0)
    sample.meta["prompt"] = "x" * 2**24
    with pytest.raises(UserError, match="limit is 16777216"):
        write_samples(stage, 0, sample)
    assert not spooled(stage, 0)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    run, plan = Run(tmp_path), plan_of(make_plan())
    with pytest.raises(UserError, match=r"plan\.json: text is not valid Unicode near '\\ud83d'"):
        run.iteration(0).publish_plan(replace(plan, negative_prompt="half a smile \ud83d"))
    stage = planned_stage(tmp_path)
    sample = make_sample(stage, stage.groups(0)[0], 0)
    sample.meta["prompt"] = "\udc80"
    with pytest.raises(UserError, match="i000000-p000000-s00: text is not valid Unicode"):
        write_samples(stage, 0, sample)
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/x",
        "/abs/x",
        "i000000-p000000-s00.",
        "I000000-p000000-s00",
        "i000000-p000000-s00\n",
        "x" * 300,
        "ключ",
    ],
)
def test_other_names_never_become_members(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError):
        header(f"{key}.json", 1)
    stage = planned_stage(tmp_path)
    good = make_sample(stage, stage.groups(0)[0], 0)
    with pytest.raises(UserError, match="is not a sample of shard 0"):
        write_samples(stage, 0, type(good)(key, good.meta | {"key": key}, good.video, good.tensors))


def test_header_is_that_of_the_standard_library() -> None:
    info = tarfile.TarInfo("i000000-p000000-s00.json")
    info.size, info.mode = 123, 0o444
    ours = header(info.name, info.size)
    assert tarfile.TarInfo.frombuf(ours, "ascii", "strict").get_info() | {"chksum": 0} == info.get_info() | {
        "chksum": 0
    }


def test_two_dtypes_reach_the_index(tmp_path: Path) -> None:
    stage = committed_stage(tmp_path, dtype=torch.bfloat16)
    index = open_shard(stage, 0).index
    assert index["latent_dtype"].unique().tolist() == ["bfloat16"]
    assert index["states"].tolist()[0].tolist() == STATES
    assert index["noise_seed"].tolist() == [7_000_000, 7_000_001, 7_000_002]
    assert index["log_prob"].tolist()[1].tolist() == [-1.125, -1.625]


def test_system_tar_lists_a_shard_and_a_spooled_sample(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path, groups=2, groups_per_shard=2)
    fill(stage, 0)
    key = stage.keys(0)[0]
    members = [f"{key}.json", f"{key}.mp4", f"{key}.traj.safetensors"]
    assert tar_tf(stage.work_path(0) / f"{key}.tar") == members
    seal(stage, 0, {})
    listed = tar_tf(stage.shard_path(0))
    assert listed[:3] == members
    assert listed[-2:] == [f"__group__/{group}.text.safetensors" for group in stage.groups(0)]
    assert len(listed) == 6 * 3 + 2


def tar_tf(path: Path) -> list[str]:
    """Member names as the system's tar sees them; it must not complain."""
    done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_stock_webdataset_reads_videos_only(tmp_path: Path) -> None:
    stage = committed_stage(tmp_path)
    urls = [str(stage.shard_path(shard)) for shard in stage.shards()]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [key for shard in (0, 1) for key in stage.keys(shard)]
    for sample in found:
        assert {name for name in sample if not name.startswith("__")} == {"json", "mp4", "traj.safetensors"}
        with open_shard(stage, int(sample["__key__"][9:15])) as shard:
            loaded = safetensors.torch.load(sample["traj.safetensors"])
            assert same_bits(loaded["latents"], shard.trajectory(sample["__key__"])["latents"])


def test_pipeline_decodes_and_can_be_iterated_twice(tmp_path: Path) -> None:
    stage = committed_stage(tmp_path, dtype=torch.bfloat16)
    pipeline = webdataset_pipeline(stage, [1])
    for _ in range(2):
        samples = list(pipeline)
        assert [sample["__key__"] for sample in samples] == stage.keys(1)
    assert samples[0]["mp4"].shape == (5, 32, 64, 3)
    assert samples[0]["mp4"].dtype == np.uint8
    assert samples[0]["json"]["target"] == "FILM"
    assert samples[0]["traj.safetensors"]["latents"].dtype == torch.bfloat16


def test_second_writer_loses_and_leaves_nothing(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    sample = make_sample(stage, stage.groups(0)[0], 0)
    assert write_samples(stage, 0, sample)
    first = (stage.work_path(0) / f"{sample.key}.tar").read_bytes()
    other = type(sample)(sample.key, sample.meta | {"seconds": 99.0}, sample.video, sample.tensors)
    assert not write_samples(stage, 0, other)
    assert [path.read_bytes() for path in stage.work_path(0).iterdir()] == [first]


def test_samples_that_wait_in_one_file_make_the_same_shard(tmp_path: Path) -> None:
    """As one file, as two, one by one, and one by one but all of them again in one file, as after an older version."""
    ways = {"one": [4], "two": [1, 3], "four": [1, 1, 1, 1], "again": [1, 1, 4]}
    tars = {}
    for name, counts in ways.items():
        stage = planned_stage(tmp_path / name, groups=2, group_size=2, groups_per_shard=2)
        samples = [make_sample(stage, group, number) for group in stage.groups(0) for number in range(2)]
        for group in stage.groups(0):
            write_group(stage, 0, group, make_group(group))
        place = 0
        for count in counts:
            place = 0 if place + count > 4 else place
            assert write_samples(stage, 0, *samples[place : place + count])
            place += count
        assert spooled(stage, 0) == set(stage.keys(0))
        assert len(list(stage.work_path(0).glob("*.tar"))) == len(counts)
        assert seal(stage, 0, {})
        assert verify(stage.path) == []
        tars[name] = stage.shard_path(0).read_bytes(), stage.index_path(0).read_bytes()
    assert len(set(tars.values())) == 1


def test_samples_in_one_file_are_neighbours_of_one_shard(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path, group_size=4)
    samples = [make_sample(stage, stage.groups(0)[0], number) for number in range(4)]
    for wrong in ([samples[0], samples[2]], [samples[1], samples[0]], [samples[0], samples[0]]):
        with pytest.raises(UserError, match="not neighbours in shard 0"):
            write_samples(stage, 0, *wrong)
    assert spooled(stage, 0) == set()
    assert write_samples(stage, 0, *samples[1:3])
    (path,) = stage.work_path(0).iterdir()
    assert path.name == "i000000-p000000-s01--i000000-p000000-s02.tar"
    assert spooled(stage, 0) == {sample.key for sample in samples[1:3]}


def test_seal_refuses_a_file_whose_samples_are_not_those_of_its_name(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path, group_size=4)
    (group,) = stage.groups(0)
    write_group(stage, 0, group, make_group(group))
    write_samples(stage, 0, *(make_sample(stage, group, number) for number in range(3)))
    (path,) = stage.work_path(0).glob("*.tar")
    path.rename(path.with_name("i000000-p000000-s00--i000000-p000000-s03.tar"))
    with pytest.raises(RunFailed, match=r"s03\.tar: its samples are not those of its name"):
        seal(stage, 0, {})
    assert not stage.shard_path(0).exists()


def test_publishing_reads_nothing_when_the_name_is_taken_and_replaces_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    assert publish_new(path, [b"", b"ab", memoryview(b"cd")])
    assert not publish_new(path, iter(()))
    assert path.read_bytes() == b"abcd"
    publish_replace(path, b"new")
    assert path.read_bytes() == b"new"
    publish_new(tmp_path / "many", (bytes([n % 256]) for n in range(1000)))
    assert (tmp_path / "many").read_bytes() == bytes(n % 256 for n in range(1000))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["file", "many"]


def test_the_first_to_finish_wins_a_race(tmp_path: Path) -> None:
    def slow():
        assert publish_new(tmp_path / "file", b"from the faster one")
        yield b"from the slower one"

    assert not publish_new(tmp_path / "file", slow())
    assert (tmp_path / "file").read_bytes() == b"from the faster one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_source_publishes_nothing(tmp_path: Path) -> None:
    def source():
        yield b"half of it"
        raise RuntimeError("out of memory")

    for publish in (publish_new, publish_replace):
        with pytest.raises(RuntimeError, match="out of memory"):
            publish(tmp_path / "file", source())
    assert not list(tmp_path.iterdir())


def test_seal_refuses_what_is_not_complete(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    (group,) = stage.groups(0)
    write_samples(stage, 0, make_sample(stage, group, 1))
    with pytest.raises(UserError, match=r"not complete: 3 of 4 parts .* i000000-p000000-s00, .*s02, .*text"):
        seal(stage, 0, {})
    assert not stage.shards()
    assert not (stage.path / "rollout").exists() or not list((stage.path / "rollout").rglob("*.*"))


def test_seal_refuses_samples_of_another_plan(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    fill(stage, 0)
    stage.plan_path.unlink()
    stage.publish_plan(plan_of(make_plan(negative_prompt="blurry")))
    with pytest.raises(UserError, match="was sampled for another plan"):
        seal(stage, 0, {})


def test_seal_twice_and_late_samples_are_swept(tmp_path: Path) -> None:
    stage = committed_stage(tmp_path)
    (group,) = stage.groups(0)
    late = make_sample(stage, group, 0)
    assert not write_samples(stage, 0, late)
    assert not stage.work_path(0).exists()
    stage.work_path(0).mkdir(parents=True)
    (stage.work_path(0) / f"{late.key}.tar").write_bytes(b"from a worker that had not seen the manifest")
    before = stage.manifest_path(0).read_bytes()
    assert not seal(stage, 0, {"second": True})
    assert stage.manifest_path(0).read_bytes() == before
    assert not stage.work_path(0).exists()


def test_group_and_phase_files_wait_in_the_spool(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    (group,) = stage.groups(0)
    key = stage.keys(0)[0]
    values = make_group(group, dtype=torch.bfloat16)
    assert read_group(stage, 0, group) is None
    assert write_group(stage, 0, group, values)
    assert not write_group(stage, 0, group, make_group(group))
    found = read_group(stage, 0, group)
    assert found is not None
    assert same_bits(found["prompt"], values["prompt"])
    assert read_phase(stage, 0, key) is None
    assert write_phase(stage, 0, key, {"latents": torch.ones(1, 2)})
    path = stage.work_path(0) / f"{key}.high.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert read_phase(stage, 0, key) is None
    assert write_phase(stage, 0, key, {"latents": torch.ones(1, 2)})
    assert spooled(stage, 0) == set()
    write_samples(stage, 0, make_sample(stage, group, 0))
    assert spooled(stage, 0) == {key}
    assert read_phase(stage, 0, key) is not None  # other samples of its chunk may not be there yet
    for _ in range(2):
        remove_phase(stage, 0, key)
        assert not path.exists()


def test_one_tensor_of_a_trajectory_is_read_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = planned_stage(tmp_path)
    group, keys = stage.groups(0)[0], stage.keys(0)
    write_group(stage, 0, group, make_group(group))
    before = {key: np.random.default_rng(n).standard_normal((2, 300)).astype(np.float32) for n, key in enumerate(keys)}
    for number, key in enumerate(keys):
        sample = make_sample(stage, group, number)
        write_samples(stage, 0, replace(sample, tensors=dict(sample.tensors) | {"x0_prev": before[key]}))
    seal(stage, 0, {})
    read = 0
    true_fill = source_module.LocalTar.fill

    def fill(self: source_module.LocalTar, buffer: memoryview, *rest: Any) -> None:
        nonlocal read
        read += len(buffer)
        true_fill(self, buffer, *rest)

    with open_shard(stage, 0) as shard:
        for key in keys:
            assert torch.equal(shard.tensor(key, "x0_prev"), torch.from_numpy(before[key]))
            assert torch.equal(shard.tensor(key, "latents"), shard.trajectory(key)["latents"])
        with pytest.raises(UserError, match=r"has no tensor 'clean'.*it has .*x0_prev"):
            shard.tensor(keys[0], "clean")
        row = shard.row(keys[1])
        monkeypatch.setattr(source_module.LocalTar, "fill", fill)
        shard.tensor(keys[1], "x0_prev")
        assert read == 512 + row["traj_header_bytes"] + before[keys[1]].nbytes  # the tar header, ours, and the tensor
        data = bytearray(stage.shard_path(0).read_bytes())
        data[data.index(before[keys[1]].tobytes()) + 17] ^= 1
    stage.shard_path(0).chmod(0o644)
    stage.shard_path(0).write_bytes(data)
    with open_shard(stage, 0) as shard:
        with pytest.raises(Damaged, match="tensor x0_prev is damaged"):
            shard.tensor(keys[1], "x0_prev")
        assert shard.tensor(keys[1], "log_prob").numel() == 2


def test_the_text_of_a_group_is_decoded_once_for_all_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = committed_stage(tmp_path, groups_per_shard=2)
    decoded = []
    true_decode = tensors.decode
    monkeypatch.setattr(tensors, "decode", lambda data, where: decoded.append(where) or true_decode(data, where))
    with open_shard(stage, 0) as shard:
        first, second = shard.groups
        found = [shard.group(group)["prompt"] for group in (first, first, second, second, first)]
    assert len(decoded) == 3
    assert torch.equal(found[0], found[4])
    assert not torch.equal(found[0], found[2])


def test_plans_are_written_once_and_differences_are_named(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    assert stage.publish_plan(plan_of(make_plan())) == plan_of(make_plan())
    changed = make_plan(seed=1)
    changed["sampler"] = changed["sampler"] | {"eta": 0.3}
    with pytest.raises(UserError, match=r"other settings: sampler\.eta, seed"):
        stage.publish_plan(plan_of(changed))


def test_stages_and_their_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.iterations() == []
    for number in (3, 0, 11):
        committed_stage(tmp_path, number, groups=1, group_size=1)
    committed_stage(tmp_path, 3, evaluation=True, groups=1, group_size=1)
    assert run.iterations() == [0, 3, 11]
    assert run.evaluations() == [3]
    assert run.evaluation(3).path == tmp_path / "eval" / "iter-0003"
    assert run.evaluation(3).shards() == [0]
    assert run.iteration(5).plan() is None
    assert run.iteration(5).expected() == 0
    with pytest.raises(UserError, match="has no shard 1"):
        run.iteration(3).keys(1)
    with pytest.raises(UserError, match="is not a run"):
        Run.open(tmp_path)


def test_a_plan_is_parsed_once_for_all_shards_and_anew_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, plan = [], plan_of(make_plan(groups=40))
    true_reader = RolloutPlan.from_json
    monkeypatch.setattr(RolloutPlan, "from_json", lambda *given: parsed.append(given[-1]) or true_reader(*given))
    stage = Run(tmp_path).iteration(0)
    assert stage.plan() is None
    stage.publish_plan(plan)
    assert sum(len(stage.keys(shard)) for shard in range(stage.expected())) == 40 * 3
    assert parsed == [stage.plan_path]
    text = stage.plan_path.read_text()
    for seed in (1, 2):  # files of one size: another one in its place, then the same one written over
        other = tmp_path / "other"
        other.write_text(text.replace('"seed":0', f'"seed":{seed}'))
        tick(stage.plan_path)
        os.replace(other, stage.plan_path) if seed == 1 else stage.plan_path.write_bytes(other.read_bytes())
        plan = stage.plan()
        assert plan is not None
        assert plan.seed == seed
    stage.plan_path.unlink()
    assert stage.plan() is None
    assert stage.expected() == 0


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "OPEN", 2)
    stage = committed_stage(tmp_path, groups=12, group_size=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, before[1]))
    try:
        shards = [open_shard(stage, number) for number in stage.shards()]
        # readers of several threads, each of which has its file closed by the others
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda one: one.trajectory(one.keys[0])["latents"], shards * 5))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    wanted = [
        torch.from_numpy(make_sample(stage, group, 0).tensors["latents"]) for one in shards for group in one.groups
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted * 5, strict=True))
    assert len(open_tars(tmp_path)) == 2
    shards[0].close()
    with pytest.raises(ValueError, match="was closed"):
        shards[0].trajectory(shards[0].keys[0])
    # which two were last in the threads is chance; now shards[1] is not open
    assert all(one.trajectory(one.keys[0]) for one in shards[2:4])
    shards[1].path.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: cannot be opened as a plain file"):
        shards[1].trajectory(shards[1].keys[0])
    del shards
    gc.collect()
    assert not open_tars(tmp_path)


def open_tars(folder: Path) -> list[str]:
    """The tars under a folder that this process has open."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [name for name in names if name.startswith(str(folder)) and ".tar" in name]


def test_claims_exclude_and_disappear(tmp_path: Path) -> None:
    stage = Run(tmp_path).iteration(0)
    with claim(stage, 0, "rollout") as first, claim(stage, 0, "rollout") as second, claim(stage, 0, "score") as other:
        assert (bool(first), bool(second), bool(other)) == (True, False, True)
    with claim(stage, 0, "rollout") as again:
        assert again
    assert not stage.path.joinpath("work").exists()


def test_a_missing_shard_says_what_to_do(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    with pytest.raises(UserError, match=r"shard 0 of .* is not there"):
        open_shard(stage, 0)
    shard = open_shard(committed_stage(tmp_path / "b"), 0)
    with pytest.raises(UserError, match="has no sample 'x'"):
        shard.video("x")
    with pytest.raises(UserError, match="has no group 'x'"):
        shard.group("x")


def test_nothing_heavy_is_imported_to_write_read_and_verify(tmp_path: Path) -> None:
    committed_stage(tmp_path)
    code = (
        "import sys, shards.writer, shards.reader, shards.sidecar, shards.video\n"
        "import shards.verify.shards, shards.inspect.table\n"
        "names = {'torch', 'pandas', 'pyarrow', 'pydantic', 'diffusers', 'av', 'webdataset', 'numpy'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"assert not shards.verify.shards.verify({str(tmp_path)!r})\n"
        f"assert len(shards.inspect.table.samples({str(tmp_path)!r})) == 6\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_shard_data_is_never_unpickled() -> None:
    """Over the source: no pickle, no torch.load or torch.save, no `.decode()` of a webdataset pipeline."""
    forbidden = re.compile(r"\bpickle\b|torch\.(load|save)\(|webdataset\.(decode|WebDataset)|allow_pickle")
    sources = sorted((Path(__file__).parents[2] / "shards").rglob("*.py"))
    assert forbidden.search("torch.load(path)")
    assert len(sources) > 8
    for source in sources:
        assert not forbidden.search(source.read_text()), source


def test_video_is_deterministic_and_close() -> None:
    from shards.video import decode_mp4, encode_mp4

    video = make_video(3)
    make_video.cache_clear()
    assert make_video(3) == video
    frames = np.zeros((5, 32, 64, 3), np.uint8)
    frames[:, :16], frames[:, 16:, :32], frames[:, 16:, 32:] = (255, 0, 0), (0, 255, 0), (30, 60, 200)
    fast = encode_mp4(frames, 16, crf=12, preset="veryfast")
    assert fast == encode_mp4(frames, 16, crf=12, preset="veryfast") != encode_mp4(frames, 16, crf=12)
    assert abs(decode_mp4(fast).astype(int) - frames).mean() < 8
    again = decode_mp4(encode_mp4(frames, 16, crf=12))
    assert again.shape == frames.shape
    inner = np.abs(again.astype(int) - frames)[:, 4:12, 4:60]
    assert inner.max() <= 3  # the colours of flat areas survive; edges blur in yuv420p
    for wrong in (frames[:, :31], frames[0], frames.astype(float)):
        with pytest.raises(UserError):
            encode_mp4(wrong, 16)
    with pytest.raises(UserError, match="k: the video cannot be decoded"):
        decode_mp4(b"no video", "k")
