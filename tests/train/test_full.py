"""Full training: both experts move, the next rollout replays exactly, a kill costs nothing, KL is to the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.policy import Policy
from rollout.run import rollout
from shards.errors import UserError
from shards.run import Run
from tests.support import training
from train import checkpoint
from train.data import Rollouts
from train.replay import prove
from train.run import train
from train.weights import Masters

FULL = {"full": True, "learning_rate": 1e-4}
EXPERTS = ("high_noise", "low_noise")


def weights(run: Run, iteration: int, folder: str = "") -> dict[str, torch.Tensor]:
    """The published transformers of an iteration."""
    found = {}
    for expert in EXPERTS:
        for path in (run.iteration(iteration).policy_dir / folder / expert).glob("*.safetensors"):
            found |= {f"{expert}/{name}": value for name, value in load_file(path).items()}
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rolled(request: pytest.FixtureRequest, tiny_t2v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Iteration 0 sampled, with advantages, not trained."""
    run = training.make_run(tmp_path_factory.mktemp("full") / "run", tiny_t2v2, FULL, model={"dtype": request.param})
    training.advise(training.roll(run, 0, Policy.of(run.config.model)))
    return run


@pytest.fixture(scope="module")
def policy(rolled: Run) -> Policy:
    return Policy.of(rolled.config.model)


@pytest.fixture(scope="module")
def trained(rolled: Run, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, trained without a disturbance."""
    run = training.fork(rolled, tmp_path_factory.mktemp("full") / "trained")
    report = train(run, 0, policy)
    assert report.replay == 0.0
    assert report.warnings == []
    return run


def test_every_weight_of_both_experts_moves_and_plain_diffusers_loads_them(
    trained: Run, policy: Policy, tiny_t2v2: Path
) -> None:
    from diffusers import WanTransformer3DModel

    folder, after = trained.iteration(0).policy_dir, weights(trained, 0)
    for expert, source in zip(EXPERTS, ("transformer", "transformer_2"), strict=True):
        before = load_file(tiny_t2v2 / source / "diffusion_pytorch_model.safetensors")
        moved = [name for name, value in before.items() if not torch.equal(after[f"{expert}/{name}"].float(), value)]
        assert len(moved) > 0.8 * len(before)  # in bfloat16 a norm of 1.0 needs more than two updates
        assert (folder / expert / "config.json").read_bytes() == (tiny_t2v2 / source / "config.json").read_bytes()
        WanTransformer3DModel.from_pretrained(folder / expert)
    record = json.loads((folder / "policy.json").read_text())
    files = {f"{e}/{name}" for e in EXPERTS for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert set(record["adapters"]) == files
    assert record["fingerprint"] == policy.experts.fingerprint(folder)["fingerprint"]
    assert not training.equal(weights(trained, 0, "ema"), after)


def test_the_next_rollout_replays_to_zero_and_training_goes_on(trained: Run, tmp_path: Path) -> None:
    run, policy = training.fork(trained, tmp_path / "run"), Policy.of(trained.config.model)
    stage = run.iteration(1)
    rollout(run, stage, policy)
    assert policy.experts.is_full
    assert prove(policy, Rollouts.open(stage), samples=10**6, limit=0.0).largest == 0.0
    training.advise(stage)
    report = train(run, 1, Policy.of(run.config.model))
    assert report.replay == 0.0
    lines = [json.loads(line) for line in (stage.policy_dir / "metrics.jsonl").open()]
    assert [line["total_updates"] for line in lines] == [3, 4, 3, 4]
    assert all(line["kl"] > 0 for line in lines)  # against the base model, not against iteration 0
    policy.experts.become(None)
    assert not policy.experts.is_full


def test_kill_and_resume_end_in_the_same_bits(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if unit == "updates" and note.startswith("low_noise"):
            training.kill_self()

    training.killed(lambda: train(run, 0, policy, progress))
    train(run, 0, policy)
    for folder in ("", "ema"):
        assert training.equal(weights(run, 0, folder), weights(trained, 0, folder))


def test_masters_of_another_policy_are_refused(trained: Run, tmp_path: Path) -> None:
    run = training.fork(trained, tmp_path / "run")
    training.advise(training.roll(run, 1, Policy.of(run.config.model)))
    folder = run.iteration(0).policy_dir / "trainer" / "high_noise"
    checkpoint_of_iteration_0 = checkpoint.latest(folder)
    assert checkpoint_of_iteration_0 is not None
    for path in folder.glob("update-*"):
        if path != folder / "update-000001":
            shutil.rmtree(path)
    with pytest.raises(UserError, match=r"update-000001: its weights are not those of the policy"):
        train(run, 1, Policy.of(run.config.model))


def test_lora_and_full_do_not_mix_within_a_run(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(trained, tmp_path / "run", full=False)
    training.advise(training.roll(run, 1, policy))
    with pytest.raises(UserError, match=r"train\.full is off, but .*iter-0000/policy holds all weights"):
        train(run, 1, policy)
    policy.experts.become(None)
    policy.experts.add_lora(2, 4.0, 0)
    policy.experts.save_lora(tmp_path / "lora")
    model = run.config.model.model_copy(update={"lora": str(tmp_path / "lora")})
    other = training.make_run(tmp_path / "other", Path(model.path), FULL, model=model.model_dump())
    started = Policy.of(model)
    training.advise(training.roll(other, 0, started))
    with pytest.raises(UserError, match=r"train\.full trains all weights, but model\.lora = "):
        train(other, 0, started)


def test_masters_go_on_from_what_bfloat16_cannot_hold() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters, stored = Masters({"w": weight}), torch.full((4,), 1.001)
    masters.take({"w": stored}, "there")
    assert torch.equal(masters.parameters["w"], stored)
    assert weight.tolist() == [1.0] * 4
    with pytest.raises(UserError, match="there: its weights are not those of the policy, first w"):
        masters.take({"w": stored + 1.0}, "there")
    masters.close()


def test_masters_add_gradients_up_in_fp32_and_keep_small_updates() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    for _ in range(300):
        (weight * 0.01).sum().backward()
    master = masters.parameters["w"]
    assert weight.grad is None
    assert master.grad is not None
    torch.testing.assert_close(master.grad, torch.full((4,), 3.0), rtol=2e-3, atol=0)  # bfloat16 would stop at 2.5
    with torch.no_grad():
        for _ in range(100):
            master += 1e-4
    masters.publish()
    assert weight.tolist() == [1.0078125] * 4
    masters.close()
