"""The rollout stage: same bytes however it is interrupted, replayed exactly from disk, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rollout import run as rollout_run
from rollout.policy import Policy
from rollout.run import regenerate, rollout
from rollout.sampler import Sampler
from rollout.step import StepInputs, step_log_prob
from shards.config import RunConfig
from shards.errors import RunFailed, UserError
from shards.plan import Chunk
from shards.reader import open_shard
from shards.records.schedule import Schedule
from shards.run import Run, Stage
from shards.run_toml import parse_config
from shards.spool import Sample, spooled
from shards.workers.claims import claim
from tests.support.tiny_models import TEXT_LENGTH

PROMPTS = 'a sign "ONE"\na sign "TWO"\na sign "THREE"\na sign "FOUR"\n'


def config(model: Path, prompts: Path, **rollout_settings: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "prompts": str(prompts),
        "prompts_per_iteration": 2,
        "group_size": 3,
        "height": 32,
        "width": 32,
        "frames": 5,
        "steps": 4,
        "schedule": "unipc",
        "high_steps": 1,
        "low_steps": 1,
        "first_step": 0,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "batch_size": 2,
        "groups_per_shard": 2,
        "negative_prompt": "bad",
    }
    values = {
        "model": {"path": str(model), "device": "cpu", "text_length": TEXT_LENGTH},
        "rollout": settings | rollout_settings,
        "eval": {"prompts": str(prompts), "limit": 3, "steps": 4},
    }
    return parse_config(values, "test")


def make_run(folder: Path, model: Path, **settings: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = settings.pop("prompts", None) or folder / "prompts.txt"
    if not Path(prompts).exists():
        Path(prompts).write_text(PROMPTS)
    return Run.create(folder / "run", config(model, prompts, **settings))


@pytest.fixture(scope="module")
def policy(tiny_t2v2: Path) -> Policy:
    return Policy.load(tiny_t2v2, device="cpu", text_length=TEXT_LENGTH)


@pytest.fixture(scope="module")
def finished(tiny_t2v2: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Stage]:
    """A finished iteration of two groups of three samples in one shard."""
    run = make_run(tmp_path_factory.mktemp("finished"), tiny_t2v2)
    stage = run.iteration(0)
    assert rollout(run, stage, policy).done == 6
    return run, stage


def contents(stage: Stage) -> dict[str, Any]:
    """Everything that sampling made, but for times and places."""
    found: dict[str, Any] = {}
    for number in stage.shards():
        shard = open_shard(stage, number)
        for key in shard.keys:
            meta = {name: value for name, value in shard.meta(key).items() if name not in ("seconds", "host")}
            found[key] = meta, shard.video(key), shard.trajectory(key)
        for group in shard.groups:
            found[group] = shard.group(group)
    return found


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees of values differ in a single bit; an empty list when they do not."""
    if isinstance(one, tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{name}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [found for key in one for found in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, torch.Tensor):
        equal = one.dtype == other.dtype and torch.equal(one, other)
        return [] if equal else [f"{name}: {(one.float() - other.float()).abs().max()}"]
    return [] if one == other else [name]


def sample_parts(sample: Sample) -> tuple[Any, ...]:
    meta = {name: value for name, value in sample.meta.items() if name not in ("seconds", "host")}
    return json.loads(json.dumps(meta)), sample.video, dict(sample.tensors)


def schedule_of(stage: Stage) -> Schedule:
    plan = stage.plan()
    assert plan is not None
    return plan.schedule


def test_a_shard_holds_what_the_format_promises(finished: tuple[Run, Stage]) -> None:
    run, stage = finished
    plan = stage.plan()
    assert plan is not None
    assert [len(shard) for shard in plan.shards] == [2]
    sampler = plan.schedule
    shard = open_shard(stage, 0)
    assert len(shard.keys) == 6
    for key in shard.keys:
        meta, tensors = shard.meta(key), shard.trajectory(key)
        window = list(plan.by_key[meta["group"]].window)
        assert len(window) == 2
        assert {sampler.experts[step] for step in window} == {0, 1}
        states = sorted({n for step in window for n in (step, step + 1)} | {4})
        assert tensors["states"].tolist() == meta["states"] == states
        assert tuple(tensors["latents"].shape) == (len(states), 16, 2, 4, 4)
        assert tensors["step_index"].tolist() == meta["window"] == window
        assert tensors["log_prob"].tolist() == meta["log_prob"]
        assert tensors["sigmas"].tolist() == list(sampler.sigmas)
        assert tensors["experts"].dtype == torch.uint8
        assert meta["chunk"] == [[0, 2], [0, 2], [2, 1]][meta["sample"]]
        assert set(meta["noise_seeds"]) == {"initial", *map(str, window)}
        assert meta["status"] == "ok"
        assert len(set(meta["noise_seeds"].values())) == 3
    first, second = (shard.latents(key, [4]) for key in shard.keys[:2])
    assert not torch.equal(first, second)
    texts = shard.group(shard.groups[0])
    assert tuple(texts["negative"].shape) == (4, 16)
    assert json.loads((run.path / "model.json").read_text())["base"] == plan.policy.base


def test_a_stage_run_twice_does_nothing_and_loads_no_model(
    finished: tuple[Run, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stage = finished
    before = {path: path.stat().st_mtime_ns for path in sorted(run.path.rglob("*")) if path.is_file()}

    def forbidden(config: RunConfig) -> Policy:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(rollout_run.Policy, "of", forbidden)
    report = rollout(run, stage)
    assert (report.done, report.skipped, report.busy) == (0, 6, 0)
    assert before == {path: path.stat().st_mtime_ns for path in sorted(run.path.rglob("*")) if path.is_file()}


def test_replay_through_disk_is_exact_until_a_weight_moves(finished: tuple[Run, Stage], policy: Policy) -> None:
    _, stage = finished
    plan = schedule_of(stage)
    shard = open_shard(stage, 0)
    group = shard.groups[0]
    text = shard.group(group)

    def log_ratios() -> list[float]:
        ratios = []
        for keys in ([f"{group}-s00", f"{group}-s01"], [f"{group}-s02"]):
            prompt, negative = (policy.text.pad(text[name], len(keys)) for name in ("prompt", "negative"))
            for position, step in enumerate(shard.meta(keys[0])["window"]):
                x, x_next = torch.stack([shard.latents(key, [step, step + 1]) for key in keys]).float().unbind(1)
                policy.experts.use(plan.experts[step])
                scored = step_log_prob(policy, plan, step, StepInputs(x, prompt, negative), x_next)
                assert scored.log_prob.requires_grad == bool(policy.experts.trainable(0))
                stored = torch.tensor([shard.meta(key)["log_prob"][position] for key in keys])
                ratios += (scored.log_prob.detach() - stored).tolist()
        return ratios

    policy.experts.become(None)
    assert log_ratios() == [0.0] * 6
    policy.experts.add_lora(rank=2, alpha=4, seed=0)
    assert log_ratios() == [0.0] * 6  # with gradients, and an adapter that is still zero
    for expert in policy.layout.expert_ids:
        for name, parameter in policy.experts.trainable(expert):
            if "lora_B" in name:
                parameter.data += 0.1
    assert all(ratio != 0.0 for ratio in log_ratios())
    policy.experts.become(None)


def test_every_sample_can_be_made_again_from_its_seeds(finished: tuple[Run, Stage], policy: Policy) -> None:
    """Also that the order of the phases does not matter: here a chunk goes through both experts by itself."""
    run, stage = finished
    stored = contents(stage)
    for key in open_shard(stage, 0).keys:
        if key.endswith(("00", "02")):
            assert differences(sample_parts(regenerate(run, stage, key, policy)), stored[key]) == []
    with pytest.raises(UserError, match="is not a sample of"):
        regenerate(run, stage, "i000000-p000099-s00", policy)
    with pytest.raises(UserError, match="its groups have 3 samples"):
        regenerate(run, stage, f"{open_shard(stage, 0).groups[0]}-s03", policy)


class Killed(BaseException):
    """What a kill is to the code that it hits: nothing catches it."""


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_a_killed_stage_goes_on_and_makes_the_same_bytes(
    after: int, finished: tuple[Run, Stage], policy: Policy, tiny_t2v2: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Four chunks, two phases: eight advances. The stage dies in the one after `after`, then the spool loses a file."""
    run = make_run(tmp_path, tiny_t2v2)
    stage = run.iteration(0)
    advance, calls = Sampler.advance, []

    def dying(self: Sampler, chunk: Chunk, *rest: Any) -> None:
        if len(calls) == after:
            raise Killed
        calls.append(chunk)
        advance(self, chunk, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "advance", dying)
        with pytest.raises(Killed):
            rollout(run, stage, policy)
    assert stage.shards() == []
    assert len(spooled(stage, 0)) == {1: 0, 3: 0, 5: 2, 7: 5}[after]
    parts = sorted(stage.work_path(0).glob("*.tar")) or sorted(stage.work_path(0).glob("*.high.safetensors"))
    parts[0].unlink()
    with monkeypatch.context() as patch:
        again: list[Chunk] = []

        def counting(self: Sampler, chunk: Chunk, *rest: Any) -> None:
            again.append(chunk)
            advance(self, chunk, *rest)

        patch.setattr(Sampler, "advance", counting)
        report = rollout(run, stage, policy)
    assert len(again) == {1: 8, 3: 6, 5: 5, 7: 3}[after]  # what was lost, and not more
    assert report.done + report.skipped == 6
    assert differences(contents(stage), contents(finished[1])) == []


def test_workers_share_the_shards(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_t2v2, groups_per_shard=1, prompts_per_iteration=3, group_size=2, frames=1)
    stage = run.iteration(0)
    order: list[str] = []

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        assert (total, unit) == (6, "videos")
        order.append(note.split(",")[0])

    with pytest.raises(UserError, match="worker 2/2 does not exist"):
        rollout(run, stage, policy, worker=(2, 2))
    with claim(stage, 2, "rollout") as held:
        assert held
        report = rollout(run, stage, policy, progress, worker=(1, 2))
    assert (report.done, report.skipped, report.busy) == (4, 0, 1)
    assert list(dict.fromkeys(order)) == ["shard 1", "shard 0"]
    assert stage.shards() == [0, 1]
    report = rollout(run, stage, policy, worker=(0, 2))
    assert (report.done, report.skipped, report.busy) == (2, 4, 0)
    assert stage.shards() == [0, 1, 2]


def test_bfloat16_storage_is_replayed_exactly(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_t2v2, storage_dtype="bfloat16", prompts_per_iteration=1, law="dpm-sde-2m",
                   form="exact", solver="dpm-2m", eta=1.0, first_step=1, same_initial_noise=True)  # fmt: skip
    stage = run.iteration(0)
    rollout(run, stage, policy)
    plan = schedule_of(stage)
    shard = open_shard(stage, 0)
    key = shard.keys[2]
    meta, tensors, text = shard.meta(key), shard.trajectory(key), shard.group(shard.groups[0])
    assert tensors["latents"].dtype == torch.bfloat16
    assert tensors["x0_prev"].dtype == torch.float32
    prompt, negative = (policy.text.pad(text[name], 1) for name in ("prompt", "negative"))
    for position, step in enumerate(meta["window"]):
        pair = shard.latents(key, [step, step + 1]).float()
        before = tensors["x0_prev"][position][None]
        with torch.no_grad():
            inputs = StepInputs(pair[:1], prompt, negative, x0_prev=before)
            scored = step_log_prob(policy, plan, step, inputs, pair[1:])
        assert scored.log_prob.item() == meta["log_prob"][position]
    initial = {shard.meta(key)["noise_seeds"]["initial"] for key in shard.keys}
    assert len(initial) == 1
    assert differences(sample_parts(regenerate(run, stage, key, policy)), contents(stage)[key]) == []


def test_evaluation_is_deterministic_and_takes_the_same_noise_for_every_policy(
    finished: tuple[Run, Stage], policy: Policy
) -> None:
    run, _ = finished
    stage = run.evaluation(0)
    assert rollout(run, stage, policy).done == 3
    plan = stage.plan()
    assert plan is not None
    assert (plan.kind, plan.seed, plan.group_size) == ("eval", 12345, 1)
    assert [group.window for group in plan.groups] == [(), (), ()]
    shard = open_shard(stage, 0)
    for key in shard.keys:
        assert shard.trajectory(key)["states"].tolist() == [4]
        assert shard.trajectory(key)["log_prob"].numel() == 0
        assert list(shard.meta(key)["noise_seeds"]) == ["initial"]
    other = Sampler(policy, replace(plan, iteration=7), "")
    assert other._seed(shard.groups[0], 0, -1) == shard.meta(shard.keys[0])["noise_seeds"]["initial"]


def test_later_iterations_need_and_take_the_trained_policy(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_t2v2, prompts_per_iteration=1, group_size=2, frames=1)
    stage = run.iteration(1)
    with pytest.raises(UserError, match=r"iteration 1 samples with the policy that iteration 0 trains") as error:
        rollout(run, stage, policy)
    assert error.value.hint == f"rushes loop {run.path} --iterations 1"  # it samples what train would miss
    folder = run.iteration(0).policy_dir
    policy.experts.become(None)
    policy.experts.add_lora(rank=2, alpha=4, seed=0)
    for _, parameter in policy.experts.trainable(0):
        parameter.data += 0.05
    policy.experts.save_lora(folder)
    policy.experts.save_lora(folder / "ema")
    identity, average = policy.experts.fingerprint(folder), policy.experts.fingerprint(folder / "ema")
    (folder / "policy.json").write_text(json.dumps({"schema": 1, **identity, "iteration": 0, "average": average}))
    policy.experts.become(None)
    assert rollout(run, stage, policy).done == 2
    assert policy.experts.has_lora
    plan = stage.plan()
    assert plan is not None
    assert plan.policy.fingerprint == identity["fingerprint"]
    tuned = contents(stage)
    assert rollout(run, run.evaluation(1), policy).done == 3
    policy.experts.become(None)
    key = next(key for key in tuned if "-s" in key)
    assert differences(sample_parts(regenerate(run, stage, key, policy)), tuned[key]) == []
    weights = folder / "low_noise" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"policy: its files are not those its policy\.json names"):
        regenerate(run, stage, key, policy)
    policy.experts.become(None)
    averaged = folder / "ema" / "low_noise" / "pytorch_lora_weights.safetensors"
    averaged.write_bytes(averaged.read_bytes()[:-1] + b"\1")
    shutil.rmtree(run.evaluation(1).path)
    with pytest.raises(RunFailed, match=r"policy/ema: its files are not those its policy\.json names"):
        rollout(run, run.evaluation(1), policy)
    shutil.rmtree(folder / "ema")
    with pytest.raises(RunFailed, match=r"policy/ema is missing, but policy\.json names it"):
        rollout(run, run.evaluation(1), policy)
    assert not list(run.evaluation(1).path.rglob("*.tar"))
    policy.experts.become(None)


def test_changed_settings_and_models_are_refused(
    finished: tuple[Run, Stage], policy: Policy, tiny_t2v2: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_t2v2, frames=1)
    plan = finished[1].plan()
    assert plan is not None
    stage = run.iteration(0)
    stage.publish_plan(plan)
    with pytest.raises(UserError, match=r"made with other settings: .*video\.frames"):
        rollout(run, stage, policy)
    other = Policy.load(tiny_t2v, device="cpu", text_length=TEXT_LENGTH)
    with pytest.raises(UserError, match="is not the model this run began with"):
        rollout(run, run.iteration(0), other)


@pytest.mark.parametrize(("layout", "size"), [("tiny_i2v2", 32), ("tiny_ti2v", 64)])
def test_images_become_conditions(layout: str, size: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(layout)
    pixels = (np.arange(size * size * 3) % 251).reshape(size, size, 3).astype("uint8")
    Image.fromarray(pixels).save(tmp_path / "first.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": 'a sign "ONE"', "image": "first.png"}) + "\n")
    run = make_run(tmp_path, model, prompts=prompts, prompts_per_iteration=1, height=size, width=size)
    stage, policy = run.iteration(0), Policy.of(run.config.model)
    rollout(run, stage, policy)
    shard = open_shard(stage, 0)
    text, plan = shard.group(shard.groups[0]), schedule_of(stage)
    assert tuple(text["condition"].shape) == {32: (1, 20, 2, 4, 4), 64: (1, 48, 1, 4, 4)}[size]
    key = shard.keys[2]
    step = shard.meta(key)["window"][0]
    pair = shard.latents(key, [step, step + 1]).float()
    prompt, negative = (policy.text.pad(text[name], 1) for name in ("prompt", "negative"))
    with torch.no_grad():
        inputs = StepInputs(pair[:1], prompt, negative, text["condition"])
        scored = step_log_prob(policy, plan, step, inputs, pair[1:])
    assert scored.log_prob.item() == shard.meta(key)["log_prob"][0]
    assert differences(sample_parts(regenerate(run, stage, key, policy)), contents(stage)[key]) == []
    if size == 64:
        assert torch.equal(shard.latents(key, [4])[:, :, 0], text["condition"][:, :, 0])


def test_a_missing_or_superfluous_image_is_named(tiny_i2v2: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tiny_i2v2)
    with pytest.raises(UserError, match=r"prompt \d \('a sign .*'\) has no image, but the model is image-to-video"):
        rollout(run, run.iteration(0))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": 'a sign "ONE"', "image": "first.png"}) + "\n")
    run = make_run(tmp_path / "b", tiny_t2v, prompts=prompts, prompts_per_iteration=1)
    with pytest.raises(UserError, match="has an image, but the model is text-to-video"):
        rollout(run, run.iteration(0))
