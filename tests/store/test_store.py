"""Runs and models in a store: a real S3 server on loopback, faults between it and us, machines that come and go."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shards import sidecar
from shards.errors import Damaged, RunFailed, UserError
from shards.files import Buffer, Files, read_json, sha256_file
from shards.reader import open_shard, webdataset_pipeline
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset
from shards.store import copies, objects
from shards.store.fetch import fetched_model
from shards.store.files import MirroredFiles
from shards.store.objects import Entry, Objects
from shards.store.urls import Cache, is_url, shown, url_of, working_copy
from shards.verify.shards import verify
from shards.workers import claims, owners
from tests.support.clock import Clock
from tests.support.s3_server import KEYS, Fault, Proxy, proxied, served
from tests.support.shard_fixtures import (
    advantage_frame,
    committed_stage,
    fill,
    make_plan,
    make_sample,
    plan_of,
    planned_stage,
    score_frame,
)  # fmt: skip
from tests.support.stores import (
    client,
    eager_files,
    files_of,
    forget_clients,
    publish_new,
    publish_replace,
    pull,
)

ROOT = Path(__file__).parents[2]
BUCKET = "s3://bucket"
Machine = Callable[[str], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    """The server behind the proxy, with one bucket, and an environment that leads to it."""
    with served() as port, proxied(port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "2"}.items():
            patch.setenv(name, value)
        patch.setattr(objects, "PAUSES", (0.01, 0.05, 0.1))
        forget_clients()
        client(BUCKET).mkdir("bucket")
        yield proxy
        forget_clients()


@pytest.fixture
def s3(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy with no faults and an empty log, seen from a machine with an empty cache."""
    server.faults.clear()
    server.log.clear()
    machine_of(tmp_path, monkeypatch)("first")
    return server


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Go to another machine: a cache of its own, and no memory of this one."""
    return machine_of(tmp_path, monkeypatch)


def machine_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    def go(name: str) -> None:
        monkeypatch.setenv("RUSHES_CACHE", str(folder / name))

    return go


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A place in the bucket for this test alone."""
    return f"{BUCKET}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


def store() -> Objects:
    """The objects of the server, nothing known about it."""
    return Objects("s3")


class Untold(Objects):
    """A store that tells no checksums, as for objects that were put in several pieces."""

    def entry_of(self, info: dict[str, Any]) -> Entry:
        return dataclasses.replace(super().entry_of(info), checksum=None)


def run_python(code: str, *arguments: str, cache: Path) -> subprocess.Popen[str]:
    """A process of its own on another machine."""
    environment = {**os.environ, "RUSHES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


# --- Names -----------------------------------------------------------------------------------------------------------


def test_a_url_has_one_place_in_the_cache_and_back(s3: Proxy) -> None:
    path = working_copy("s3://bucket/runs/a/")
    assert working_copy(Path("s3://bucket/runs/a")) == path  # a Path swallows one slash
    assert url_of(path / "iter-0000" / "plan.json") == "s3://bucket/runs/a/iter-0000/plan.json"
    assert url_of(path / "iter-0000" / "work" / "shard-000000" / "x.tar") is None
    assert url_of(path / "eval" / "iter-0002" / "work") is None
    assert url_of(path / "frames" / "i000000-p000001-s02" / "frame-000.png") is None
    assert url_of("runs/a/run.toml") is None
    assert shown(f"{path}/run.toml: bad") == "s3://bucket/runs/a/run.toml: bad"
    assert shown(f"{path}/frames/i000000-p000001-s02/a.png") == f"{path}/frames/i000000-p000001-s02/a.png"
    assert working_copy("runs/a") == Path("runs/a")
    assert not is_url("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_two_servers_do_not_share_a_working_copy(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    here = working_copy(BUCKET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://other.example:9000")
    assert working_copy(BUCKET) != here
    assert url_of(working_copy(BUCKET) / "x") == f"{BUCKET}/x"


@pytest.mark.parametrize("bad", ["http://a/b", "s3://", "s3://b/../c", "s3://b//c", "s3://b/c?versionId=1", "pipe:/x"])
def test_other_urls_are_refused(bad: str) -> None:
    with pytest.raises(UserError):
        working_copy(bad)


def test_local_paths_import_no_store(tmp_path: Path) -> None:
    committed_stage(tmp_path / "run")
    code = (
        "import sys, atexit, cli\nfrom pathlib import Path\n"
        "atexit.register(lambda: print('LOADED', *[m for m in ('fsspec', 's3fs', 'botocore') if m in sys.modules]))\n"
        "sys.argv = ['rushes', *sys.argv[1:]]\ncli.main()\n"
    )
    for arguments in (["--help"], ["inspect", str(tmp_path / "run")]):
        out, error = run_python(code, *arguments, cache=tmp_path / "cache").communicate()
        assert out.splitlines()[-1] == "LOADED", error
    assert not (tmp_path / "cache").exists()


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_another_machine_reads_members_by_range_and_keeps_them(s3: Proxy, url: str, machine: Machine) -> None:
    here = committed_stage(url)
    expected = {key: _everything(here, 0, key) for key in here.keys(0)}
    machine("second")
    stage = Run(url).iteration(0)
    assert stage.shards() == [0, 1]
    s3.log.clear()
    shard = open_shard(stage, 0)
    for key in stage.keys(0):
        assert _same(_everything(stage, 0, key), expected[key])
    spans = s3.asked("GET", r"shard-000000\.tar")
    assert spans
    assert all(spans), "the tar was asked for without a range"
    assert not stage.shard_path(0).exists()
    s3.log.clear()
    for key in stage.keys(0):
        assert shard.video(key) == expected[key]["video"]
        assert _same(shard.trajectory(key), expected[key]["trajectory"])
    assert s3.asked("GET", r"\.tar") == []


def test_a_pair_of_states_is_one_request_of_its_bytes(s3: Proxy, url: str, machine: Machine) -> None:
    here = committed_stage(url)
    key = here.keys(0)[0]
    wanted = open_shard(here, 0).latents(key, [1, 2, 3])
    machine("second")
    shard = open_shard(Run(url).iteration(0), 0)
    row = shard.row(key)
    first, size = row["latents_offset"], row["latent_bytes"]
    s3.log.clear()
    assert shard.latents(key, [1, 2]).equal(wanted[:2])
    assert s3.asked("GET", r"\.tar") == [f"bytes={first}-{first + 2 * size - 1}"]
    s3.log.clear()
    assert shard.latents(key, [2, 3]).equal(wanted[1:])  # state 2 is kept
    assert s3.asked("GET", r"\.tar") == [f"bytes={first + 2 * size}-{first + 3 * size - 1}"]


def test_a_damaged_piece_in_the_cache_is_fetched_again(s3: Proxy, url: str, machine: Machine, tmp_path: Path) -> None:
    here = committed_stage(url)
    key = here.keys(0)[0]
    video = open_shard(here, 0).video(key)
    machine("second")
    shard = open_shard(Run(url).iteration(0), 0)
    assert shard.video(key) == video
    (piece,) = (tmp_path / "second" / "pieces").rglob("*+*")
    data = bytearray(piece.read_bytes())
    data[700] ^= 1
    piece.write_bytes(data)
    assert shard.video(key) == video
    assert piece.read_bytes() != data


def test_a_bit_flipped_on_the_wire_is_noticed(s3: Proxy, url: str, machine: Machine) -> None:
    here = committed_stage(url)
    key = here.keys(0)[0]
    wanted = open_shard(here, 0).latents(key, [1])
    machine("second")
    shard = open_shard(Run(url).iteration(0), 0)
    s3.faults.append(Fault("flip", "GET", r"\.tar"))
    assert shard.latents(key, [1]).equal(wanted)
    s3.faults.append(Fault("flip", "GET", r"\.tar", times=2))
    with pytest.raises(Damaged, match="crc32"):
        shard.latents(key, [2])


def test_a_tar_that_is_gone_or_other_is_refused(s3: Proxy, url: str, machine: Machine) -> None:
    committed_stage(url)
    machine("second")
    stage = Run(url).iteration(0)
    tar = url_of(stage.shard_path(0))
    assert tar
    store().remove(tar)
    with pytest.raises(Damaged, match="is not there, but its manifest is"):
        open_shard(stage, 0)
    client(tar).pipe_file(tar, b"other")
    with pytest.raises(Damaged, match="has 5 bytes"):
        open_shard(stage, 0)


def test_webdataset_reads_a_run_in_a_store(s3: Proxy, url: str, machine: Machine) -> None:
    here = committed_stage(url)
    keys = [*here.keys(0), *here.keys(1)]
    machine("second")
    assert [sample["__key__"] for sample in webdataset_pipeline(Run(url).iteration(0))] == keys


# --- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["503", "reset", "cut", "short", "slow"])
def test_reads_outlast_faults(s3: Proxy, url: str, machine: Machine, kind: str) -> None:
    here = committed_stage(url, groups=1)
    key = here.keys(0)[0]
    video = open_shard(here, 0).video(key)
    machine("second")
    times = 1 if kind == "slow" else 3
    faults = [Fault(kind, "GET", r"plan\.json", times), Fault(kind, "GET", r"\.parquet", times)]
    s3.faults += [*faults, Fault(kind, "GET", r"shard-000000\.tar", times)]
    shard = open_shard(Run(url).iteration(0), 0)
    assert shard.video(key) == video
    assert [fault.seen for fault in s3.faults] == [times if fault is not faults[0] else 0 for fault in s3.faults]


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
def test_writes_outlast_faults_and_count_once(s3: Proxy, url: str, kind: str) -> None:
    stage = planned_stage(url)
    fill(stage, 0)
    s3.faults += [Fault(kind, "PUT", r"\.tar"), Fault(kind, "PUT", r"\.parquet"), Fault(kind, "PUT", "manifest")]
    from shards.writer import seal

    assert seal(stage, 0, {})  # ours, although the answers were lost
    assert all(fault.seen == 1 for fault in s3.faults)
    assert verify(url) == [] or {one.kind for one in verify(url)} == {"incomplete"}


def test_a_store_that_stays_down_ends_in_one_sentence(s3: Proxy, url: str) -> None:
    committed_stage(url, groups=1)
    s3.faults.append(Fault("503", "GET", "manifest", times=1000))
    (working_copy(url) / "iter-0000/rollout/manifest/shard-000000.json").unlink()
    with pytest.raises(RunFailed, match=r"manifest/shard-000000\.json: .*reduce your request rate") as error:
        pull(url)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, s3: Proxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_clients()
    with pytest.raises(RunFailed, match=r"s3://bucket/x: .*127\.0\.0\.1:9"):
        Run.open("s3://bucket/x")
    forget_clients()


def test_errors_of_a_user_are_one_sentence(s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://nowhere: no such bucket"):
        Run.open("s3://nowhere/run")
    with pytest.raises(UserError, match=rf"{url} is not a run: it has no run\.toml"):
        Run.open(url)
    s3.faults.append(Fault("403", "GET", "bucket"))
    with pytest.raises(UserError, match=r"access denied: .*\(hint: check the rights") as denied:
        Run.open(url)
    assert denied.value.exit_code == 2
    s3.faults.append(Fault("skewed", "GET", "bucket"))
    with pytest.raises(UserError, match=r"the clock of this machine is too far from the store's"):
        Run.open(url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    with pytest.raises(UserError, match=r"no credentials for s3://.*AWS_ACCESS_KEY_ID"):
        Run.open(url)
    forget_clients()


def test_a_missing_package_is_named(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs the package gcsfs, which is not installed .*pip install -U gcsfs"):
        Run.open("gs://bucket/run")


# --- Publishing ------------------------------------------------------------------------------------------------------


def test_the_manifest_comes_last_and_the_spool_stays_here(s3: Proxy, url: str) -> None:
    committed_stage(url, groups=1)
    puts = [path.partition("iter-0000/")[2] for verb, path, _ in s3.log if verb == "PUT" and "iter-0000" in path]
    name = "shard-000000"
    assert puts == [
        "plan.json", f"rollout/{name}.tar", f"rollout/index/{name}.parquet", f"rollout/manifest/{name}.json"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["", "deaf", "501"])
def test_the_first_writer_wins_on_any_server(s3: Proxy, url: str, machine: Machine, kind: str) -> None:
    if kind:
        s3.faults.append(Fault(kind, "PUT", ".*", times=1000))
    path = working_copy(url) / "model.json"
    assert publish_new(path, b"first")
    assert not publish_new(path, b"again")
    machine("second")
    path = working_copy(url) / "model.json"
    assert not publish_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert store().read(f"{url}/model.json", 0, 5) == b"first"
    publish_replace(path, b"third")
    assert store().read(f"{url}/model.json", 0, 5) == b"third"


def test_what_the_store_refuses_is_not_here_either(s3: Proxy, url: str) -> None:
    path = working_copy(url) / "model.json"
    s3.faults.append(Fault("403", "PUT", "model", times=2))
    for publish in (publish_new, publish_replace):
        with pytest.raises(UserError, match="access denied"):
            publish(path, b"first")
        assert os.listdir(path.parent) == []


RACER = """
import sys
from shards.run import Run
from shards.writer import seal
from shards.spool import Sample, write_group, write_samples
from tests.support.shard_fixtures import make_group, make_sample
url, salt = sys.argv[1], float(sys.argv[2])
stage = Run(url).iteration(0)
for shard in range(stage.expected()):
    for group in stage.groups(shard):
        write_group(stage, shard, group, make_group(group))
        for number in range(3):
            sample = make_sample(stage, group, number)
            meta = sample.meta | {"seconds": salt}
            write_samples(stage, shard, Sample(sample.key, meta, sample.video, sample.tensors))
print("ready", flush=True)
sys.stdin.readline()
print(*[int(seal(stage, shard, {"host": str(salt)})) for shard in range(stage.expected())])
"""


def test_two_machines_race_for_the_same_shards(s3: Proxy, url: str, tmp_path: Path, machine: Machine) -> None:
    planned_stage(url, groups=4)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, str(salt)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "RUSHES_CACHE": str(tmp_path / f"racer{salt}")},
        )
        for salt in (1, 2)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    won = [[int(word) for word in racer.communicate("go\n")[0].split()] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert [sum(pair) for pair in zip(*won, strict=True)] == [1, 1, 1, 1]
    machine("judge")
    stage = Run(url).iteration(0)
    for shard in stage.shards():
        salts = {open_shard(stage, shard).meta(key)["seconds"] for key in stage.keys(shard)}
        assert len(salts) == 1, "samples of two machines in one tar"
    assert verify(url) == []


def test_a_tar_whose_machine_died_is_committed_by_the_next(s3: Proxy, url: str, machine: Machine) -> None:
    from shards import spool, writer

    class Dying(MirroredFiles):
        def publish_new(self, path: Path, data: Buffer | Iterable[Buffer]) -> bool:
            if path.suffix == ".parquet":
                raise KeyboardInterrupt
            return super().publish_new(path, data)

    stage = planned_stage(url, groups=1, files=Dying(store(), Cache.current()))
    fill(stage, 0)
    with pytest.raises(KeyboardInterrupt):
        writer.seal(stage, 0, {})
    tar = sha256_file(stage.shard_path(0))
    machine("second")
    stage = Run(url).iteration(0)
    fill(stage, 0)
    key = stage.keys(0)[0]
    path = stage.work_path(0) / f"{key}.tar"
    path.unlink()
    sample = make_sample(stage, stage.groups(0)[0], 0)
    spool.write_samples(stage, 0, spool.Sample(key, sample.meta | {"seconds": 9.0}, sample.video, sample.tensors))
    assert writer.seal(stage, 0, {})
    assert read_json(stage.manifest_path(0))["tar"]["sha256"] == tar
    assert open_shard(stage, 0).meta(key)["seconds"] == 0.5
    assert verify(url) == []


def test_machines_see_each_other(s3: Proxy, url: str, machine: Machine) -> None:
    stage = planned_stage(url, files=eager_files())
    machine("second")
    other = Run(url, files=eager_files()).iteration(0)
    assert other.plan() == plan_of(make_plan())
    fill(other, 1)
    from shards.writer import seal

    assert seal(other, 1, {})
    sidecar.write_scores(other, 1, "ocr-00000000", score_frame(other, 1), {})
    machine("first")
    assert stage.shards() == [1]
    assert not stage.is_committed(0)
    assert sidecar.scored(stage, 1, "ocr-00000000")
    assert not sidecar.scored(stage, 1, "ocr-11111111")
    sidecar.write_advantages(stage, 1, "0a0a0a0a", advantage_frame(stage, 1), {})
    machine("second")
    assert sidecar.specifications(other) == ["0a0a0a0a"]
    before = sidecar.read_advantages(other, "0a0a0a0a", [1])
    machine("first")  # another weight of a reward: the same name, other values
    sidecar.write_advantages(stage, 1, "0a0a0a0a", advantage_frame(stage, 1).assign(weight=0.5), {})
    machine("second")
    pull(url)
    after = sidecar.read_advantages(other, "0a0a0a0a", [1])
    assert set(before["weight"]) == {1.0}
    assert set(after["weight"]) == {0.5}


def test_a_new_run_at_the_same_url_meets_nothing_of_the_old_one(s3: Proxy, url: str, machine: Machine) -> None:
    stage = committed_stage(url)
    fill(planned_stage(url, 1), 0)  # a spool that stays
    machine("second")
    client(url).rm(url, recursive=True)
    planned_stage(url, prompt="a dog")
    machine("first")
    pull(url)
    assert stage.shards() == []
    assert not stage.shard_path(0).exists()
    plan = stage.plan()
    assert plan
    assert plan.groups[0].prompt == "a dog 0"
    assert not Run(url).iteration(1).path.exists()


def test_a_second_pull_fetches_nothing_and_an_edit_is_fetched(s3: Proxy, url: str, machine: Machine) -> None:
    committed_stage(url)
    machine("second")
    pull(url)
    s3.log.clear()
    pull(url)
    assert [path for verb, path, _ in s3.log if verb == "GET" and "list-type" not in path] == []
    (working_copy(url) / "iter-0000" / "rollout" / "index" / "shard-000000.parquet").write_bytes(b"rubbish")
    pull(url)
    assert open_shard(Run(url).iteration(0), 0).keys


def test_files_whose_tag_is_no_checksum_are_fetched_once(s3: Proxy, url: str, machine: Machine) -> None:
    committed_stage(url)
    machine("second")
    files, here = eager_files(objects=Untold("s3")), working_copy(url)
    files.pull(here)
    s3.log.clear()
    files.pull(here)
    assert [path for verb, path, _ in s3.log if verb == "GET" and "list-type" not in path] == []
    path = working_copy(url) / "iter-0000" / "plan.json"
    path.write_bytes(path.read_bytes().replace(b"a cat 0", b"a rat 0"))  # same size, other time
    files.pull(here)
    plan = Run(url).iteration(0).plan()
    assert plan
    assert plan.groups[0].prompt == "a cat 0"


def test_a_folder_is_put_with_its_commit_last_and_only_whole_ones_are_fetched(
    s3: Proxy, url: str, machine: Machine
) -> None:
    folder = Run(url).iteration(0).policy_dir / "trainer" / "high_noise"
    for update in ("update-000001", "update-000002", "update-000003"):
        (folder / update).mkdir(parents=True)
        for name in ("a.safetensors", "commit.json", "z.safetensors"):
            (folder / update / name).write_text(f"{update} {name}")
    files_of(folder).put_folder(folder / "update-000001", last="commit.json")
    assert [path.rpartition("/")[2] for verb, path, _ in s3.log if verb == "PUT"][-1] == "commit.json"
    files_of(folder).put_folder(folder / "update-000002", last="commit.json")
    files_of(folder).put_folder(folder / "update-000003", wanted=lambda name: name != "commit.json")
    files_of(folder).remove(folder, keep=["update-000002", "update-000003"])
    machine("second")
    folder = Run(url).iteration(0).policy_dir / "trainer" / "high_noise"
    files_of(folder).fetch_newest(folder, "commit.json")
    assert [path.name for path in folder.iterdir()] == ["update-000002"]
    (folder / "update-000002" / "z.safetensors").write_text("cut")  # a download that was killed is gone on with
    files_of(folder).fetch_newest(folder, "commit.json")
    assert (folder / "update-000002" / "z.safetensors").read_text() == "update-000002 z.safetensors"
    assert {name.partition("/")[0] for name in store().listing(url_of(folder) or "")} == {
        "update-000002",
        "update-000003",
    }


def test_an_object_that_is_replaced_while_it_is_fetched(s3: Proxy, url: str, tmp_path: Path) -> None:
    """A log grows between the listing and the transfer, a table gets other values of the same length."""
    path, entries = tmp_path / "one", []
    for content in (b"one line", b"one line\ntwo", b"one line\nTWO"):
        client(url).pipe_file(url, content)
        entries.append(store().head(url))
    known = store()
    for entry in entries:
        assert entry
        assert known.get(url, path, entry) == entries[-1]
        assert path.read_bytes() == b"one line\nTWO"
    s3.log.clear()
    s3.faults.append(Fault("flip"))
    known.get(url, path, entries[-1])
    assert len(s3.asked("GET", ".*")) == 2, "its tag is not taken for a checksum any more"


def test_no_memo_speaks_for_a_file_of_another_process(
    s3: Proxy, url: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of a machine bring themselves up to date; the slower one puts what it has over the newer file."""
    monkeypatch.setattr(copies, "AT_ONCE", 1)  # the files come in the order of their names
    publish_replace(f"{url}/iter-0000/plan.json", b"old")
    publish_replace(f"{url}/iter-0000/plan.json", b"new")
    publish_replace(f"{url}/iter-0000/then.json", b"{}")
    machine("second")
    path = working_copy(url) / "iter-0000" / "plan.json"

    class Disturbed(Objects):
        def get(self, url: str, local: Path, entry: Entry) -> Entry:
            if url.endswith("then.json"):
                path.write_bytes(b"old")
            return super().get(url, local, entry)

    eager_files(objects=Disturbed("s3")).pull(working_copy(url))
    assert path.read_bytes() == b"old"
    pull(url)
    assert path.read_bytes() == b"new"


def test_what_was_deleted_in_the_store_is_published_again(s3: Proxy, url: str) -> None:
    """A damaged tar is deleted with its records, as `verify` advises, on a machine that still has the tar."""
    from shards.writer import seal

    stage = committed_stage(url, groups=1)
    for path in (stage.shard_path(0), stage.index_path(0), stage.manifest_path(0)):
        store().remove(url_of(path) or "")
    run = Run(url)
    pull(url)
    assert stage.shards() == []
    fill(stage, 0)
    assert seal(stage, 0, {})
    assert verify(url) == []
    other = client(url)
    other.pipe_file(f"{url}/model.json", b"theirs")
    assert not publish_new(run.path / "model.json", b"ours")  # fetched, for it was not here
    other.pipe_file(f"{url}/model.json", b"others")
    assert not publish_new(run.path / "model.json", b"ours")  # and again, for it is another one now
    assert (run.path / "model.json").read_bytes() == b"others"


def test_a_run_is_made_anew_where_one_was_deleted(s3: Proxy, url: str) -> None:
    settings = [apply_sets(read_preset("words"), [f"rollout.seed={seed}"]) for seed in (1, 2)]
    old, new = (parse_config(values, "preset words") for values in settings)
    Run.create(url, old)
    with pytest.raises(UserError, match="exists already"):
        Run.create(url, new)
    store().remove(f"{url}/run.toml")
    assert Run.create(url, new).config == new
    entry = store().head(f"{url}/run.toml")
    assert entry
    assert b"seed = 2" in store().read(f"{url}/run.toml", 0, entry.size)


def test_what_was_put_is_not_fetched_back(s3: Proxy, url: str) -> None:
    """Weights, which are put in several pieces, have no checksum in the store to be known by."""
    files = eager_files(objects=Untold("s3"))
    folder = working_copy(url) / "iter-0000" / "policy"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    files.put_folder(folder)
    s3.log.clear()
    files.fetch(folder)
    files.put_folder(folder)
    assert [line for line in s3.log if "safetensors" in line[1]] == []
    (folder / "model.safetensors").write_bytes(bytes(999) + b"1")
    files.put_folder(folder)
    assert store().read(f"{url_of(folder)}/model.safetensors", 999, 1000) == b"1"


def test_prompts_and_their_images_at_urls(s3: Proxy, url: str, tmp_path: Path) -> None:
    from PIL import Image

    from rollout.policy.images import open_image
    from rollout.prompts.load import load_prompts

    Image.new("RGB", (16, 16)).save(tmp_path / "first.png")
    files = client(url)
    files.put_file(str(tmp_path / "first.png"), f"{url}/images/first.png")
    rows = ["../images/first.png", f"{url}/images/first.png", str(tmp_path / "first.png"), "gone.png"]
    lines = "".join(json.dumps({"prompt": "a sign", "image": image}) + "\n" for image in rows)
    files.pipe_file(f"{url}/sets/i2v.jsonl", lines.encode())
    images = [prompt.image for prompt in load_prompts(Path(f"{url}/sets/i2v.jsonl"), False)]
    assert images == [f"{url}/images/first.png"] * 2 + [str(tmp_path / "first.png"), f"{url}/sets/gone.png"]
    assert [open_image(image).size for image in images[:3]] == [(16, 16)] * 3
    with pytest.raises(UserError, match=r"sets/gone\.png: no such image"):
        open_image(images[3])
    (tmp_path / "local.jsonl").write_text(lines.splitlines()[1])
    assert load_prompts(tmp_path / "local.jsonl", False)[0].image == f"{url}/images/first.png"
    (tmp_path / "local.jsonl").write_text(json.dumps({"prompt": "a sign", "image": "https://example.org/a.png"}))
    with pytest.raises(UserError, match=r"local\.jsonl, line 1: https:// is not a store"):
        load_prompts(tmp_path / "local.jsonl", False)

    files.pipe_file(f"{url}/prompts.txt", b"a cat\n")
    assert [prompt.text for prompt in load_prompts(f"{url}/prompts.txt", False)] == ["a cat"]
    s3.log.clear()
    load_prompts(f"{url}/prompts.txt", False)
    assert s3.asked("GET", r"prompts\.txt") == []
    files.pipe_file(f"{url}/prompts.txt", b"a dog\n")
    assert [prompt.text for prompt in load_prompts(f"{url}/prompts.txt", False)] == ["a dog"]
    store().remove(f"{url}/prompts.txt")
    with pytest.raises(UserError) as error:
        load_prompts(f"{url}/prompts.txt", False)
    assert shown(error.value.problem) == f"{url}/prompts.txt: no such file"


class Needy:
    """A reward that reads a file and a folder."""

    name = "needy"
    version = "1"
    components = ("size",)

    def __init__(self, head: str, model: str) -> None:
        self.found = Path(head).read_bytes() + (Path(model) / "config.json").read_bytes()

    def __call__(self, videos: object) -> list[Any]:
        return []

    @staticmethod
    def identity(options: dict[str, str]) -> dict[str, str]:
        """Digests of both."""
        paths = {"head": Path(options["head"]), "model": Path(options["model"]) / "config.json"}
        return {name: sha256_file(path) for name, path in paths.items()}


def test_options_of_rewards_at_urls(s3: Proxy, url: str, tmp_path: Path) -> None:
    from score.reward import choose

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"folder")
    (tmp_path / "head.bin").write_bytes(b"file ")
    client(url).put(f"{tmp_path}/model", f"{url}/model", recursive=True)
    client(url).put_file(f"{tmp_path}/head.bin", f"{url}/head.bin")
    target = f"{__name__}:Needy"
    stored = choose(target, {"head": f"{url}/head.bin", "model": f"{url}/model"})
    local = choose(target, {"head": f"{tmp_path}/head.bin", "model": f"{tmp_path}/model"})
    assert stored.directory == local.directory
    assert stored.options["model"] == f"{url}/model"  # the same on every machine
    assert stored.build().found == b"file folder"  # type: ignore[attr-defined]


def test_status_goes_by_the_clock_of_the_store(s3: Proxy, url: str, machine: Machine) -> None:
    """Seen alike from the machine that works and from one that looks, whose copies all came at the same moment."""
    from shards.workers.status import status
    from shards.writer import seal

    minutes = {"plan.json": 0.0, "shard-000000.json": 4.0, "shard-000001.json": 8.0}

    class Clocked(Objects):
        def entry_of(self, info: dict[str, Any]) -> Entry:
            written = 1.7e9 + 60 * minutes.get(info["name"].rpartition("/")[2], 0.0)
            return dataclasses.replace(super().entry_of(info), modified=written)

    def files() -> Files:
        return eager_files(objects=Clocked("s3"))

    publish_new(f"{url}/run.toml", b"schema = 1\n")
    stage = planned_stage(url, files=files(), groups=4)
    for shard in (0, 1):
        fill(stage, shard)
        seal(stage, shard, {})
    fill(stage, 2)
    for name, samples in (("first", 9), ("second", 6)):  # a spool is seen where it lies
        machine(name)
        run = Run.open(url, files=files())
        with claims.claim(run.iteration(0), 3, "rollout") as held:
            assert held
            rollout = next(part for part in status(run, quick=True).parts if part.what == "rollout")
        assert (rollout.done, rollout.claimed, rollout.samples) == (2, 1, samples)
        assert rollout.per_hour == pytest.approx(6 * 60 / 8)
    machine("first")
    planned_stage(url, 1)
    machine("second")
    assert {part.stage for part in status(run, quick=True).parts} == {"iter-0000", "iter-0001"}  # with --watch


# --- Claims ----------------------------------------------------------------------------------------------------------


HOLDER = """
import sys
from shards.workers.claims import claim
from shards.run import Run
with claim(Run(sys.argv[1]).iteration(0), 0, "rollout", 3.0, (1, 4)) as held:
    print(bool(held), flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


def test_claims_are_seen_by_other_machines_and_end_with_them(
    s3: Proxy, url: str, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = planned_stage(url, files=eager_files())
    clock = Clock()
    monkeypatch.setattr(owners, "time", clock)
    with proxied(s3.backend, to_the_end=True) as way:  # no sign of life is still on its way when it is over
        environment = {**os.environ, "RUSHES_CACHE": str(tmp_path / "other"), "AWS_ENDPOINT_URL": way.url}
        command, pipe = [sys.executable, "-c", HOLDER, url], subprocess.PIPE
        holder = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe)
        assert holder.stdout
        assert holder.stdout.readline() == "True\n"
        deadline = time.monotonic() + 120
        state = ""
        while state != "alive" and time.monotonic() < deadline:
            with claims.claim(stage, 0, "rollout", 3.0) as held:
                assert held is None  # it lives, although nobody here can ask its lock
            (found,) = owners.claims_of(stage)
            state = owners.life(found, 3.0)
            time.sleep(0.1)
        assert state == "alive"
        assert found.owner
        assert found.owner.worker == "1/4"
        holder.kill()
        holder.wait()
    for passed in (0.0, 2.75):
        clock.now += passed
        with claims.claim(stage, 0, "rollout", 3.0) as held:
            assert held is None
    clock.now += 0.25
    with claims.claim(stage, 0, "rollout", 3.0) as held:
        assert held
    assert store().listing(f"{url}/iter-0000/claims") == {}


def test_two_machines_cannot_hold_one_claim(s3: Proxy, url: str, machine: Machine) -> None:
    stage = planned_stage(url)
    path = stage.path / "work" / "shard-000000.rollout.claim-0001"
    assert stage.files.claims.begin(path, b"mine\n")
    machine("second")
    stage = Run(url).iteration(0)
    path, shown_claims = stage.path / "work" / path.name, stage.files.claims
    assert not shown_claims.begin(path, b"yours\n")
    with claims.claim(stage, 0, "rollout", 60.0) as held:
        assert held is None
    assert shown_claims.keep(path, b"again\n")
    shown_claims.end(path)
    assert not shown_claims.keep(path, b"again\n")
    assert shown_claims.begin(path, b"mine\n")
    assert shown_claims.begin(path.with_name("shard-000000.rollout.claim-0002"), b"yours\n")  # void, and taken over
    assert not shown_claims.keep(path, b"I slept\n")


def test_a_store_that_refuses_claims_stops_nobody(s3: Proxy, url: str) -> None:
    stage = planned_stage(url)
    s3.faults += [Fault("403", verb, "claims", times=1000) for verb in ("GET", "PUT", "HEAD", "DELETE")]
    with claims.claim(stage, 0, "rollout", 60.0) as held:
        assert held
        assert not held.lost


# --- Verify, models --------------------------------------------------------------------------------------------------


def test_verify_reads_the_store_and_not_the_cache(s3: Proxy, url: str) -> None:
    stage = committed_stage(url)
    assert verify(url) == []
    tar, manifest = (f"{url}/iter-0000/rollout/{name}" for name in ("shard-000000.tar", "manifest/shard-000001.json"))
    data = bytearray(stage.shard_path(0).read_bytes())
    data[5000] ^= 1
    client(tar).pipe_file(tar, bytes(data))
    client(tar).pipe_file(manifest, b"{}")
    problems = [one.problem for one in verify(url)]
    assert any(tar in problem and "sha256" in problem for problem in problems)
    assert any(manifest in problem for problem in problems)
    assert not any(os.environ["RUSHES_CACHE"] in problem for problem in problems)
    assert stage.shard_path(0).read_bytes() != data  # what lies here was not touched
    assert not list(Path(os.environ["RUSHES_CACHE"]).glob("afresh-*"))


FETCHER = """
import sys
from shards.store.fetch import fetched_model
from shards.store.files import MirroredFiles
print(fetched_model(sys.argv[1], lambda name: name.endswith((".json", ".safetensors"))))
"""


def test_a_model_folder_is_fetched_once_by_several_processes(s3: Proxy, url: str, tmp_path: Path) -> None:
    files = {"model_index.json": b"{}", "transformer/a.safetensors": bytes(300_000), "transformer/b.bin": b"pickle"}
    for name, data in files.items():
        client(url).pipe_file(f"{url}/{name}", data)
    s3.log.clear()
    s3.faults.append(Fault("cut", "GET", r"a\.safetensors"))
    processes = [run_python(FETCHER, url, cache=tmp_path / "node") for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    folder = Path(folders.pop())
    assert not folders
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: data for name, data in files.items() if not name.endswith(".bin")}
    assert len(s3.asked("GET", r"a\.safetensors$")) == 2  # one of them was cut
    assert len(s3.asked("GET", r"model_index\.json$")) == 1


def test_a_model_folder_that_is_not_there(s3: Proxy, url: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        fetched_model(url)


def test_we_check_what_the_client_does_not(
    s3: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that were put without a checksum of the client's own, as other tools do."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    forget_clients()
    client(url).pipe_file(url, b"content")
    entry = store().head(url)
    assert entry
    s3.faults += [Fault("short"), Fault("flip")]
    store().get(url, tmp_path / "one", entry)
    assert (tmp_path / "one").read_bytes() == b"content"
    s3.faults.append(Fault("short", times=1000))
    with pytest.raises(RunFailed, match="3 bytes arrived of 7"):
        store().get(url, tmp_path / "two", dataclasses.replace(entry, checksum=None))
    forget_clients()


def test_a_tag_that_is_no_checksum_is_found_out(s3: Proxy, url: str, tmp_path: Path) -> None:
    """As in a bucket that a key encrypts: the tag of every object looks like an md5 and is none."""

    class Encrypted(Objects):
        def entry_of(self, info: dict[str, Any]) -> Entry:
            return dataclasses.replace(super().entry_of(info), version="0" * 32, checksum="md5:" + "0" * 32)

    client(url).pipe_file(url, b"content")
    known = Encrypted("s3")
    entry = known.head(url)
    assert entry
    s3.log.clear()
    known.get(url, tmp_path / "one", entry)
    known.get(url, tmp_path / "two", entry)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"content"
    assert len([1 for verb, _, _ in s3.log if verb == "GET"]) == 3


def _everything(stage: Stage, shard: int, key: str) -> dict[str, Any]:
    with open_shard(stage, shard) as opened:
        group = key.rpartition("-")[0]
        return {
            "meta": opened.meta(key), "video": opened.video(key), "trajectory": opened.trajectory(key),
            "latents": opened.latents(key, [1, 2, 4]), "group": opened.group(group),
        }  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return bool(one.equal(other)) if hasattr(one, "equal") else bool(one == other)
