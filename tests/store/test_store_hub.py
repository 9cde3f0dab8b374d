"""Runs and models at hf:// through the real client of the Hugging Face hub, on a hub of our own on loopback."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import HfFileSystem, constants
from peft import LoraConfig, PeftModel

from rollout.policy import Policy
from rollout.run import rollout
from score.run import score
from shards.errors import RunFailed, UserError
from shards.files import publish_replace as write_here
from shards.reader import open_shard
from shards.records.updates import read_updates
from shards.run import Run
from shards.store import objects
from shards.store.fetch import fetched_model
from shards.store.files import of_policy
from shards.store.objects import Objects
from shards.store.urls import url_of, working_copy
from shards.verify.shards import verify
from shards.workers import claims
from shards.writer import seal
from tests.store.test_store import Machine, machine_of
from tests.support import lora_forms as forms
from tests.support.hub_server import Fault, Hub, served
from tests.support.shard_fixtures import committed_stage, fill, planned_stage
from tests.support.store_machines import SETTINGS, assert_same, die_in_second_update, look, take_over
from tests.support.stores import eager_files, files_of, publish_new, publish_replace
from tests.support.tiny_models import tiny_transformer
from tests.support.training import make_run
from train.run import train

ROOT = Path(__file__).parents[2]
REPO = "me/run"
URL = f"hf://{REPO}/runs/a"
pytestmark = pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")  # as the code does
TOKENS = {"hf_writes": "write", "hf_reads": "read"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, seen from a machine with an empty cache and no patience."""
    with served() as running:
        running.create(REPO)
        environment = {"HF_ENDPOINT": running.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": ""}
        for name, value in {**environment, "TRANSFORMERS_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # all were read with the import
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(objects, "PAUSES", (0.01, 0.02, 0.05))
        machine_of(tmp_path, monkeypatch)("first")
        yield running


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Go to another machine: a cache of its own, and no memory of this one."""
    return machine_of(tmp_path, monkeypatch)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, in seconds, but not in earnest: the client pauses a second before it asks again."""
    waited: list[float] = []
    sleep = time.sleep

    def nap(seconds: float) -> None:
        waited.append(seconds)
        sleep(min(seconds, 0.02))

    monkeypatch.setattr(time, "sleep", nap)
    return waited


def store() -> Objects:
    return Objects("hf")


def content(hub: Hub, path: str, repo: str = REPO) -> bytes:
    return hub.at(repo, "main").files[path]


# --- A whole iteration -----------------------------------------------------------------------------------------------


def test_an_iteration_on_two_machines_equals_a_local_run(
    hub: Hub, tiny_t2v2: Path, tmp_path: Path, machine: Machine
) -> None:
    local = make_run(tmp_path / "local", tiny_t2v2, **SETTINGS)
    policy = Policy.of(local.config.model)
    rollout(local, local.iteration(0), policy)
    score(local, local.iteration(0))
    train(local, 0, policy)

    # the model comes from the hub, put there by its own client; the first machine dies in its second update
    hub.create("me/tiny")
    HfFileSystem(skip_instance_cache=True).put(f"{tiny_t2v2}/", "me/tiny/", recursive=True)
    hub.lfs_from, hub.page = 20_000, 5
    model = local.config.model.model_copy(update={"path": "hf://me/tiny"})
    created = Run.create(URL, local.config.model_copy(update={"model": model}))
    policy = Policy.of(created.config.model)
    hub.faults += [Fault(kind, "POST", "/commit/") for kind in ("lost", "409", "reset")]
    rollout(created, created.iteration(0), policy)
    score(created, created.iteration(0))
    assert all(fault.seen == 1 for fault in hub.faults)
    die_in_second_update(created, policy)

    machine("second")
    run = Run.open(URL)
    policy = Policy.of(run.config.model)
    take_over(run, policy)
    ours, theirs = run.iteration(0), local.iteration(0)
    lines = [(line["expert"], line["update"]) for line in read_updates(ours.policy_dir / "metrics.jsonl")]
    assert lines == [(expert, number) for expert in ("high_noise", "low_noise") for number in (1, 2)]
    path = "runs/a/iter-0000/policy/metrics.jsonl"
    assert content(hub, path) == (ours.policy_dir / "metrics.jsonl").read_bytes()
    assert_same(run, local, 0)
    keys = [key for shard in theirs.shards() for key in theirs.keys(shard)]

    # as many as docs/stores.md says, though two machines worked; run.toml and model.json are made once
    assert len(hub.commits(REPO)) == 22 + 2

    machine("third")
    assert look(URL, keys, OMP_NUM_THREADS="1") == ""


def test_a_model_folder_with_many_pages_and_large_files(hub: Hub, machine: Machine) -> None:
    files = {f"transformer/part-{n:02d}.safetensors": os.urandom(3000 + n) for n in range(11)}
    files |= {"model_index.json": b"{}", "vae/config.json": b'{"a": 1}', "transformer/a.bin": b"pickle"}
    hub.create("datasets/me/tiny")
    for name, data in files.items():
        hub.put("datasets/me/tiny", f"models/wan/{name}", data)
    hub.put("datasets/me/tiny", "models/wan-other/model_index.json", b"not this one")
    hub.page, hub.lfs_from = 3, 3005
    hub.faults += [Fault("cut", "GET", "part-07"), Fault("flip", "GET", "part-03"), Fault("flip", "GET", "part-08")]
    url = "hf://datasets/me/tiny/models/wan"
    folder = fetched_model(url, lambda name: not name.endswith(".bin"))
    assert folder
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: data for name, data in files.items() if not name.endswith(".bin")}
    assert all(fault.seen for fault in hub.faults)
    hub.log.clear()
    fetched_model(url)
    assert [path.rpartition("/")[2] for _, path, _ in hub.log if "/resolve/" in path] == ["a.bin"]
    with pytest.raises(UserError, match="no such model folder"):
        fetched_model("hf://datasets/me/tiny/models/none")


def test_a_lora_at_a_url(hub: Hub, tiny_t2v2: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    """A folder with a pair, one file, a PEFT folder, its weights alone; nothing else of the repository is fetched."""
    names = ("high_noise_model.safetensors", "low_noise_model.safetensors")
    pair = [forms.write(tmp_path / name, forms.native(tiny_transformer(1), seed)) for seed, name in enumerate(names)]
    PeftModel(tiny_transformer(1), LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "peft")
    hub.create("me/loras")
    for path in (*pair, *(tmp_path / "peft").glob("adapter_*")):
        hub.put("me/loras", path.relative_to(tmp_path).as_posix(), path.read_bytes())
    hub.put("me/loras", "optimizer.bin", b"pickle")
    url = "hf://me/loras"
    expected = forms.plain(tiny_t2v2, *pair)
    assert forms.same(forms.answers(forms.load(tiny_t2v2, lora=url)), expected)
    assert not (working_copy(url) / "optimizer.bin").exists()
    both = [f"{url}/{name}" for name in names]
    assert forms.same(forms.answers(forms.load(tiny_t2v2, lora=both[0], lora_2=both[1])), expected)
    for place in (f"{url}/peft", f"{url}/peft/adapter_model.safetensors"):
        policy = forms.load(tiny_t2v, lora=place)
        assert policy.experts.fingerprint(None)["adapters"].keys() == {
            "adapter_model.safetensors",
            "adapter_config.json",
        }
    with pytest.raises(UserError, match=r"model\.base_lora: hf://me/loras/none: no such file or folder"):
        forms.load(tiny_t2v, base_lora=f"{url}/none")


def test_files_that_xet_keeps_go_through_the_file_system_of_the_client(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes them by HTTP where Xet is switched off; Xet itself is not here."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.put(REPO, "large.safetensors", bytes(5000))
    hub.lfs_from, hub.xet = 1000, True
    entry = store().head(f"hf://{REPO}/large.safetensors")
    assert entry
    called: list[str] = []
    known = HfFileSystem.get_file
    monkeypatch.setattr(
        HfFileSystem, "get_file", lambda self, *names, **more: called.append(names[0]) or known(self, *names, **more)
    )
    store().get(f"hf://{REPO}/large.safetensors", tmp_path / "one", entry)
    assert (tmp_path / "one").read_bytes() == bytes(5000)
    assert called == [f"{REPO}/large.safetensors"]


def test_no_bar_for_each_of_many_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # as on a terminal
    hub.put(REPO, "one", b"1")
    entry = store().head(f"hf://{REPO}/one")
    assert entry
    store().get(f"hf://{REPO}/one", tmp_path / "one", entry)
    assert capfd.readouterr() == ("", "")


# --- Commits ---------------------------------------------------------------------------------------------------------


def test_commits_are_few_and_in_order(hub: Hub) -> None:
    stage = committed_stage(URL, groups=1)
    with claims.claim(stage, 5, "rollout") as held:
        assert held
        held.require()
    assert [title.rpartition("/")[2] for title in hub.commits(REPO)] == [
        "plan.json", "shard-000000.tar", "shard-000000.parquet", "shard-000000.json"
    ]  # fmt: skip
    policy = stage.policy_dir
    checkpoint = policy / "trainer" / "high_noise" / "update-000001"
    for path in (policy / "metrics.jsonl", *(checkpoint / name for name in ("a.safetensors", "commit.json"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name}\n")
    before = len(hub.commits(REPO))
    files = stage.files
    files.append(policy / "metrics.jsonl", "one more\n")
    write_here(policy / "high_noise" / "w.safetensors", b"weights")
    assert len(hub.commits(REPO)) == before
    hub.faults.append(Fault("403", "POST", "/commit/"))
    with pytest.raises(UserError, match="access denied"):
        files.put_folder(checkpoint, last="commit.json")
    files.put_folder(checkpoint, last="commit.json")
    assert len(hub.commits(REPO)) == before + 1
    assert content(hub, "runs/a/iter-0000/policy/metrics.jsonl") == b"metrics.jsonl\none more\n"
    files.put_folder(policy, wanted=of_policy)
    assert content(hub, "runs/a/iter-0000/policy/high_noise/w.safetensors") == b"weights"
    files.put_folder(policy)
    assert len(hub.commits(REPO)) == before + 2
    hub.faults.append(Fault("lost", "POST", "/commit/"))
    files.remove(checkpoint.parent, keep=[])
    files.remove(checkpoint.parent, keep=[])
    assert len(hub.commits(REPO)) == before + 3
    assert not [name for name in hub.at(REPO, "main").files if "trainer" in name]


def test_what_was_put_is_not_fetched_back(hub: Hub) -> None:
    """The hub tells a checksum of everything, so nothing has to be remembered about it."""
    stage = committed_stage(URL)
    folder = stage.policy_dir
    (folder / "high_noise").mkdir(parents=True)
    (folder / "high_noise" / "w.safetensors").write_bytes(bytes(3000))
    hub.lfs_from = 2000
    files_of(folder).put_folder(folder)
    hub.log.clear()
    stage.files.fetch(working_copy(URL))
    assert hub.asked("GET", "/resolve/") == []


def test_a_readme_at_the_top_of_a_repository(hub: Hub) -> None:
    """As an export has; the client lets the hub look at its header."""
    folder = working_copy(f"hf://{REPO}")
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "empty.json").write_bytes(b"")
    files_of(folder).put_folder(folder)
    assert content(hub, "README.md").startswith(b"---")
    assert content(hub, "empty.json") == b""
    assert hub.asked("POST", "validate-yaml")


def test_a_run_at_the_top_of_a_repository(hub: Hub, machine: Machine) -> None:
    hub.create("datasets/me/top")
    here = committed_stage("hf://datasets/me/top")
    key = here.keys(0)[0]
    video = open_shard(here, 0).video(key)
    machine("second")
    stage = Run("hf://datasets/me/top").iteration(0)
    with open_shard(stage, 0) as shard:
        assert shard.video(key) == video
    spans = hub.asked("GET", r"shard-000000\.tar")
    assert spans
    assert all(spans), "the tar was asked for without a range"
    assert not stage.shard_path(0).exists()
    assert verify("hf://datasets/me/top") == []


# --- Who is first ----------------------------------------------------------------------------------------------------


def test_the_first_writer_wins_whatever_the_client_remembers(hub: Hub, machine: Machine) -> None:
    path = working_copy(URL) / "model.json"
    assert store().listing(URL) == {}
    hub.put(REPO, "runs/a/other.json", b"{}")
    assert list(store().listing(URL)) == ["other.json"]
    hub.put(REPO, "runs/a/model.json", b"theirs")  # after we looked
    assert not publish_new(path, b"ours")
    assert path.read_bytes() == content(hub, "runs/a/model.json") == b"theirs"
    publish_replace(path, b"third")
    machine("second")
    assert not publish_new(working_copy(URL) / "model.json", b"fourth")
    assert (working_copy(URL) / "model.json").read_bytes() == b"third"


def test_a_rival_between_the_look_and_the_commit(hub: Hub) -> None:
    hub.rivals = [(REPO, "runs/a/model.json", b"theirs")]
    assert not publish_new(working_copy(URL) / "model.json", b"ours")
    assert (working_copy(URL) / "model.json").read_bytes() == content(hub, "runs/a/model.json") == b"theirs"
    hub.rivals = [(REPO, "elsewhere.json", b"{}"), (REPO, "elsewhere.json", b"[]")]
    assert publish_new(working_copy(URL) / "run.toml", b"ours")
    assert content(hub, "runs/a/run.toml") == b"ours"
    assert hub.rivals == []
    assert not [name for name in hub.at(REPO, "main").files if "probe" in name]


def test_many_writers_of_the_same_names(hub: Hub, tmp_path: Path) -> None:
    won: dict[str, list[int]] = {f"{URL}/{n}.json": [] for n in range(4)}

    def write(number: int) -> None:
        mine = tmp_path / f"writer-{number}"
        mine.write_bytes(b"%d" % number)
        for name in sorted(won, key=lambda name: hash((name, number))):
            if store().put_new(mine, name, URL):
                won[name].append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(winners) for winners in won.values()] == [1] * 4
    for name, winners in won.items():
        assert content(hub, name.removeprefix(f"hf://{REPO}/")) == b"%d" % winners[0]


def test_machines_see_each_other_at_once(hub: Hub, machine: Machine) -> None:
    stage = planned_stage(URL, files=eager_files("hf"))
    assert stage.shards() == []
    machine("second")
    other = Run(URL).iteration(0)
    fill(other, 1)
    assert seal(other, 1, {})
    machine("first")
    assert stage.shards() == [1]
    for path in (other.shard_path(1), other.index_path(1), other.manifest_path(1)):
        store().remove(url_of(working_copy(URL) / path.relative_to(other.run_path)) or "")
    store().remove(f"{URL}/gone")
    assert stage.shards() == []
    assert store().head(f"{URL}/iter-0000/rollout/shard-000001.tar") is None


def test_claims_are_not_shown_on_the_hub(hub: Hub, machine: Machine) -> None:
    stage = planned_stage(URL)
    before = hub.commits(REPO)
    with claims.claim(stage, 0, "rollout") as held:
        assert held
        machine("second")
        with claims.claim(Run(URL).iteration(0), 0, "rollout") as other:
            assert other
            assert not other.lost
    assert hub.commits(REPO) == before


def test_two_hubs_do_not_share_a_working_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    here = working_copy(URL)
    monkeypatch.setenv("HF_ENDPOINT", "https://other.example")
    assert working_copy(URL) != here
    assert url_of(working_copy(URL) / "x") == f"{URL}/x"


# --- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["503", "429", "reset", "cut", "flip"])
def test_reads_outlast_faults(hub: Hub, machine: Machine, naps: list[float], kind: str) -> None:
    here = committed_stage(URL, groups=1)
    key = here.keys(0)[0]
    video = open_shard(here, 0).video(key)
    machine("second")
    paths = [r"/tree/", r"resolve.*\.json", r"resolve.*\.parquet", r"resolve.*\.tar"]
    hub.faults += [Fault(kind, "GET", path) for path in paths if kind != "flip" or "resolve" in path]
    hub.faults += [Fault(kind, "POST", "/paths-info/")] if kind != "flip" else []
    shard = open_shard(Run(URL).iteration(0), 0)
    assert shard.video(key) == video
    assert all(fault.seen for fault in hub.faults)


@pytest.mark.parametrize("kind", ["500", "503", "409", "429", "reset", "lost"])
def test_writes_outlast_faults_and_count_once(hub: Hub, naps: list[float], kind: str) -> None:
    stage = planned_stage(URL, groups=1)
    fill(stage, 0)
    before = len(hub.commits(REPO))
    hub.faults += [Fault(kind, "POST", path) for path in ("/commit/", "/commit/", "/preupload/") if kind != "409"]
    hub.faults += [Fault(kind, "POST", "/commit/")] if kind == "409" else []
    assert seal(stage, 0, {})  # ours, although answers were lost
    assert all(fault.seen for fault in hub.faults)
    assert len(hub.commits(REPO)) == before + 3
    assert verify(URL) == []


def test_the_hub_says_how_long_to_wait(hub: Hub, naps: list[float]) -> None:
    hub.faults.append(Fault("429", "POST", "/commit/", seconds=120))
    assert publish_new(working_copy(URL) / "model.json", b"ours")
    assert max(naps) >= 120
    naps.clear()
    hub.faults.append(Fault("429", "POST", "/commit/", seconds=3000, times=9))
    with pytest.raises(
        RunFailed, match=r"too many requests for now: .*hourly quotas for action: commit.* later\)"
    ) as end:
        publish_new(working_copy(URL) / "run.toml", b"ours")
    assert "\n" not in str(end.value)
    assert end.value.exit_code == 1
    assert naps == []
    assert not (working_copy(URL) / "run.toml").exists()


def test_a_hub_that_stays_down_ends_in_one_sentence(hub: Hub, naps: list[float]) -> None:
    hub.faults.append(Fault("503", "POST", "paths-info", times=1000))
    with pytest.raises(RunFailed, match=r"hf://me/run/runs/a/plan\.json: .*503.*\(hint: what was published") as error:
        store().head(f"{URL}/plan.json")
    assert "\n" not in str(error.value)
    assert hub.faults[0].seen == len(objects.PAUSES) + 1


def test_nobody_answers(hub: Hub, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"hf://me/run/runs/a: .*refused"):
        Run.open(URL)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("hf://me/none/runs/a", r"hf://me/none: no such repository, .*hf repos create"),
        ("hf://datasets/me/run/runs/a", r"hf://datasets/me/run: no such repository"),
        ("hf://me/run@side/runs/a", r"hf://me/run@side: no such branch"),
        (URL, r"hf://me/run/runs/a is not a run: it has no run\.toml"),
        ("hf://me", r"hf://me.*: not a place in a repository"),
        ("hf://buckets/me/run/runs/a", r"not a place in a repository"),
    ],
)  # fmt: skip
def test_errors_of_a_user_are_one_sentence(hub: Hub, url: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        Run.open(url)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_refused_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens = TOKENS
    path = working_copy(URL) / "model.json"

    def said(token: str, ask: Callable[[], object]) -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError) as error:
            ask()
        assert error.value.exit_code == 2
        return str(error.value)

    for ask in (lambda: store().head(f"{URL}/x"), lambda: store().listing(URL), lambda: publish_new(path, b"ours")):
        assert "access denied: Invalid credentials" in said("hf_stolen", ask)
        assert "no such repository, or it is private" in said("", ask)
    assert "access denied: Forbidden: you must use a write token" in said(
        "hf_reads", lambda: publish_new(path, b"ours")
    )
    assert not path.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    assert publish_new(path, b"ours")


def test_a_repository_that_ignores_our_files(hub: Hub) -> None:
    """The client would leave them out and say that all is well."""
    hub.put(REPO, ".gitignore", b"*.log\n*.tar\n")
    path = working_copy(URL) / "shard-000000.tar"
    with pytest.raises(UserError, match=r"me/run: its \.gitignore keeps runs/a/shard-000000\.tar out .*take the line"):
        publish_new(path, b"ours")
    assert publish_new(path.with_name("model.json"), b"ours")


def test_a_client_that_is_told_to_stay_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"set to stay offline \(hint: unset HF_HUB_OFFLINE\)"):
        Run.open(URL)


def test_a_client_that_is_missing_or_too_old(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "shards.store.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", ModuleType("huggingface_hub"))
    with pytest.raises(UserError, match=r"needs the package huggingface_hub, which is too old .*pip install -U hugg"):
        Run.open(URL)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the package huggingface_hub, which is not installed"):
        Run.open(URL)


def test_a_file_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.put(REPO, "one", b"1")
    entry = store().head(f"hf://{REPO}/one")
    assert entry
    assert store().head(f"{URL}/none") is None
    with pytest.raises(UserError, match=r"runs/a/none: no such object"):
        store().get(f"{URL}/none", tmp_path / "none", entry)
    with pytest.raises(UserError, match=r"runs/a/none: no such object"):
        store().read(f"{URL}/none", 0, 1)
    hub.put(REPO, "one", b"two")
    store().get(f"hf://{REPO}/one", tmp_path / "one", entry)  # replaced since it was looked at
    assert (tmp_path / "one").read_bytes() == b"two"
    assert store().read(f"hf://{REPO}/one", 1, 3) == b"wo"
