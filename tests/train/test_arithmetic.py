"""How networks are called: decided by the plan, the same in rollout and training, and refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from rollout.lora.adapter import ADAPTER, InputDtypeLinear, MergedLinear, merge_at_calls
from rollout.plan import stage_plan
from rollout.policy import Policy
from rollout.policy.kernels import attention, compiled
from rollout.policy.kernels.arithmetic import arithmetic_of
from rollout.preview import preview
from rollout.run import regenerate, rollout
from shards.errors import UserError
from shards.plan import Arithmetic
from shards.reader import open_shard
from shards.run import Run
from shards.settings.without_effect import without_effect
from tests.support import lora_forms as forms
from tests.support import training
from tests.support.tiny_models import tiny_transformer
from train.replay import prove_iteration
from train.run import train

ONE = {"prompts_per_iteration": 1}


def bfloat16(folder: Path, path: Path, **settings: Any) -> tuple[Run, Policy]:
    """A run of a model in bfloat16, and that model."""
    model = {"dtype": "bfloat16", **settings.pop("model", {})}
    run = training.make_run(path / "run", folder, model=model, **ONE, **settings)
    return run, Policy.of(run.config.model)


def sampled(run: Run, policy: Policy, iteration: int = 0) -> None:
    training.advise(training.roll(run, iteration, policy))


# --- LoRA in the dtype of the model ----------------------------------------------------------------------------------


def test_adapters_compute_in_bfloat16_over_fp32_weights_and_learn(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a LoRA merged beneath one of two experts."""
    file = forms.write(tmp_path / "base.safetensors", forms.native(tiny_transformer(1), 7))
    run, policy = bfloat16(tiny_t2v2, tmp_path, model={"base_lora": str(file), "base_lora_2": "none"})
    seen, forward = set(), InputDtypeLinear.forward

    def looked_at(layer: InputDtypeLinear, x: torch.Tensor) -> torch.Tensor:
        out = forward(layer, x)
        seen.add((x.dtype, layer.weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(InputDtypeLinear, "forward", looked_at)
    sampled(run, policy)
    assert json.loads(run.iteration(0).plan_path.read_text())["arithmetic"] == {"adapters": "model"}
    assert train(run, 0, policy).replay == 0.0
    sampled(run, policy, 1)
    assert train(run, 1, policy).replay == 0.0
    assert seen == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    trained = training.weights(run, 1)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    lost = [name for name, value in trained.items() if not torch.equal(value, value.bfloat16().float())]
    assert len(lost) == len(trained)  # bfloat16 could hold none of them
    assert prove_iteration(run, 1, policy).largest == 0.0


def test_small_updates_of_the_fp32_weights_add_up(tiny_t2v: Path) -> None:
    """An update too small for bfloat16 changes no bit of an answer, but a hundred of them do, and gradients arrive."""
    policy = Policy.load(str(tiny_t2v), dtype="bfloat16", device="cpu", text_length=training.TEXT_LENGTH)
    policy.experts.add_lora(2, 4.0, 0)
    layer = policy.experts.module(0).blocks[0].ffn.net[2]
    down, up = (part["policy"].weight for part in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        up.fill_(1.0)
        down.fill_(1.0)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = layer(x).detach()
    with torch.no_grad():
        down += 2.0**-10  # bfloat16 has 8 bits: the next number after 1 is 1 + 2^-7
    assert torch.equal(layer(x), before)
    assert float(down.detach().min()) == 1 + 2.0**-10
    with torch.no_grad():
        down += 99 * 2.0**-10
    assert not torch.equal(layer(x), before)
    layer(x).float().sum().backward()
    assert down.grad is not None
    assert up.grad is not None
    assert (down.grad.dtype, up.grad.dtype) == (torch.float32, torch.float32)
    assert bool(down.grad.any())
    assert bool(up.grad.any())


def test_an_iteration_of_an_older_version_is_trained_as_it_was_sampled(tiny_t2v2: Path, tmp_path: Path) -> None:
    """Its plan says nothing of arithmetic: adapters then compute in fp32, in this version too."""
    run, policy = bfloat16(tiny_t2v2, tmp_path)
    sampled(run, policy)
    train(run, 0, policy)
    stage = run.iteration(1)
    stage.publish_plan(
        replace(stage_plan(run, stage, policy.layout, policy.experts.fingerprint(run.iteration(0).policy_dir)),
                arithmetic=Arithmetic())
    )  # fmt: skip
    assert "arithmetic" not in json.loads(stage.plan_path.read_text())
    sampled(run, policy, 1)  # continues what was begun, and refuses nothing
    assert policy.experts.arithmetic == Arithmetic()
    assert train(run, 1, policy).replay == 0.0
    rollout(run, run.iteration(2), policy)
    assert policy.experts.arithmetic == Arithmetic(adapters="model")


# --- The plan --------------------------------------------------------------------------------------------------------


def test_what_is_as_before_is_not_written(rolled: Run, policy: Policy, tiny_t2v2: Path, tmp_path: Path) -> None:
    plan = rolled.iteration(0).plan()
    assert plan is not None
    assert plan.arithmetic == Arithmetic()
    assert "arithmetic" not in plan.to_dict()
    run = training.make_run(tmp_path / "run", tiny_t2v2, model={"attention": "native"}, batch_guidance=True)
    found = stage_plan(run, run.iteration(0), policy.layout, policy.experts.fingerprint(None))
    assert found.to_dict()["arithmetic"] == {"attention": "native", "batch_guidance": True}
    again = type(found).from_json(json.dumps(found.to_dict()).encode(), "plan.json")
    assert again == found


@pytest.mark.parametrize("settings", [
    {"model": {"attention": "_native_math"}}, {"model": {"attention": "native"}, "batch_guidance": True},
    {"decode_batch": 2}, {"model": {"merge_lora": True}},
])  # fmt: skip
def test_training_computes_as_the_plan_says_whatever_run_toml_says_now(
    settings: dict[str, Any], tiny_t2v2: Path, tmp_path: Path
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2, **ONE, **settings)
    sampled(run, Policy.of(run.config.model))
    planned = run.iteration(0).plan()
    assert planned is not None
    names = ["model.attention=auto", "rollout.batch_guidance=false", "rollout.decode_batch=1",
             "model.merge_lora=false"]  # fmt: skip
    changed = Run.open(run.path, names)
    assert "the plan of the stage is made" in without_effect(changed, changed.iteration(0), "train")
    policy = Policy.of(changed.config.model)
    assert train(changed, 0, policy).replay == 0.0
    assert policy.experts.arithmetic == planned.arithmetic != Arithmetic()
    assert prove_iteration(changed, 0, policy).largest == 0.0
    assert regenerate(changed, changed.iteration(0), planned.keys(0)[2], policy).meta["status"] == "ok"
    run.iteration(0).manifest_path(0).unlink()
    with pytest.raises(UserError, match="made with other settings: arithmetic"):
        rollout(changed, changed.iteration(0), policy)


# --- LoRA in the weights ---------------------------------------------------------------------------------------------


def test_lora_in_the_weights_equals_lora_beside_them_within_rounding(tiny_t2v: Path) -> None:
    """Velocities and the gradients of both factors; and bits are equal where the adapter is new, or off."""
    policy = Policy.load(str(tiny_t2v), device="cpu", text_length=training.TEXT_LENGTH)
    experts = policy.experts
    x = torch.randn(3, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(2))
    prompt = policy.text.pad(policy.text.encode(["a sign"])[0], 3)
    experts.add_lora(2, 3.0, 0)  # alpha/rank is 1.5
    ways = [replace(experts.arithmetic, adapters=name) for name in ("float32", "merged", "float32")]

    def answer(way: Arithmetic) -> torch.Tensor:
        experts.compute_as(way)
        return policy.velocity(0, x, 500.0, prompt, None, 1.0)

    assert torch.equal(answer(ways[0]), answer(ways[1]))  # B is zero
    with torch.no_grad():
        for number, (_, value) in enumerate(experts.trainable(0)):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    found = []
    for way in ways:
        velocity = answer(way)
        velocity.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([velocity.detach(), *(value.grad.clone() for _, value in experts.trainable(0))])
        for _, value in experts.trainable(0):
            value.grad = None
    assert all(map(torch.equal, found[0], found[2]))
    assert not torch.equal(found[0][0], found[1][0])
    for beside, merged in zip(*found[:2], strict=True):
        assert float((beside - merged).abs().max() / beside.abs().max()) < 2e-5
    with experts.reference():
        assert torch.equal(answer(ways[1]), answer(ways[0]))
    assert [type(layer) for layer in experts.module(0).modules() if isinstance(layer, MergedLinear)] == []
    experts.compute_as(ways[1])
    merged_layers = [layer for layer in experts.module(0).modules() if isinstance(layer, MergedLinear)]
    assert 2 * len(merged_layers) == len(experts.trainable(0))


@pytest.mark.parametrize("bias", [True, False])
def test_biases_of_a_lora_are_merged_and_dropout_is_left_to_peft(bias: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_bias=bias, lora_dropout=0.5)
    inject_adapter_in_model(settings, module, ADAPTER)
    torch.manual_seed(0)
    for value in module.parameters():
        torch.nn.init.normal_(value)
    x = torch.randn(4, 7, 6)
    module.eval()
    beside = module(x)
    merge_at_calls(module)
    merged = module(x)
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, module[0].base_layer(x), atol=1e-2)
    assert isinstance(module[0], MergedLinear)
    module.train()
    torch.manual_seed(1)
    dropped = module(x)
    merge_at_calls(module, False)
    torch.manual_seed(1)
    assert torch.equal(module(x), dropped)


def test_lora_is_not_merged_into_weights_that_would_swallow_it(tiny_t2v: Path, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"dtype": "bfloat16", "merge_lora": True})
    with pytest.raises(UserError, match=r"model\.merge_lora = true would round LoRA to the bfloat16"):
        arithmetic_of(run.config)
    full = training.make_run(tmp_path / "full", tiny_t2v, model={"merge_lora": True}, train={"full": True})
    assert arithmetic_of(full.config) == Arithmetic()  # there is no LoRA
    policy = Policy.of(full.config.model)
    sampled(full, policy)
    assert without_effect(full, full.iteration(0), "train") == ""


# --- Attention -------------------------------------------------------------------------------------------------------


def test_attention_is_set_for_one_model_and_taken_back(tiny_t2v: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    policy, other = (Policy.load(str(tiny_t2v), device="cpu", text_length=training.TEXT_LENGTH) for _ in range(2))
    active = registry.get_active_backend()
    policy.experts.compute_as(Arithmetic(attention="_native_math"))
    backends = [
        {part.processor._attention_backend for part in one.experts.module(0).modules() if hasattr(part, "processor")}
        for one in (policy, other)
    ]
    assert backends == [{"_native_math"}, {None}]
    assert registry.get_active_backend() == active
    policy.experts.compute_as(Arithmetic())
    assert policy.experts.module(0).blocks[0].attn1.processor._attention_backend is None


@pytest.mark.parametrize(("name", "words"), [
    ("flash3", "is not an attention backend"),
    ("flash", "cannot be used here: Flash Attention backend 'flash' is not usable"),
    ("_native_cudnn", "cannot be used here"),
])  # fmt: skip
def test_attention_that_is_not_there_is_refused_before_anything_is_written(
    name: str, words: str, tiny_t2v: Path, tmp_path: Path
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"attention": name})
    for look in (lambda: preview(run, run.iteration(0)), lambda: rollout(run, run.iteration(0))):
        with pytest.raises(UserError, match=words) as caught:
            look()
        assert "\n" not in caught.value.problem
    assert not run.iteration(0).path.exists()


def test_attention_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels give a result that no gradient goes through, and say nothing: SageAttention, for one."""
    attention.check_attention("native", torch.device("cpu"), torch.float32, 12)
    dispatch = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *inputs: dispatch(*inputs).detach())
    with pytest.raises(UserError, match="has no gradient"):
        attention.check_attention("native", torch.device("cpu"), torch.float32, 12)


def test_ranks_share_tokens_with_one_backend_only(tiny_t2v: Path, tmp_path: Path, policy: Policy) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"attention": "_native_math"}, train={"ulysses": 2})
    with pytest.raises(UserError, match=r"'_native_math' cannot share the tokens of a video, but train.ulysses = 2"):
        stage_plan(run, run.iteration(0), policy.layout)


# --- Both forwards of guidance in one --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tiny_t2v", "tiny_ti2v"])
def test_one_batch_of_guidance_equals_two_within_rounding(layout: str, request: pytest.FixtureRequest) -> None:
    """Measured: equal bits, or 4e-7 of the largest velocity, in fp32 on a CPU."""
    policy = Policy.load(str(request.getfixturevalue(layout)), device="cpu", text_length=training.TEXT_LENGTH)
    policy.experts.add_lora(2, 4.0, 0)
    x = torch.randn(3, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(2))
    prompt, negative = (policy.text.pad(one, 3) for one in policy.text.encode(["a sign", "blurry"]))
    calls = []
    policy.experts.module(0).register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    both = []
    for together in (False, True):
        policy.experts.compute_as(replace(policy.experts.arithmetic, batch_guidance=together))
        both.append(policy.velocity(0, x, 500.0, prompt, negative, 4.0))
    assert calls == [3, 3, 6]
    two, one = both
    assert float((one - two).detach().abs().max() / two.detach().abs().max()) < 2e-6
    one.square().sum().backward()
    assert all(value.grad is not None for _, value in policy.experts.trainable(0))
    policy.velocity(0, x, 500.0, prompt, None, 1.0)
    assert calls[3:] == [3]  # without guidance there is nothing to join


# --- Videos decoded at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tiny_t2v", "tiny_ti2v"])
def test_what_is_decoded_beside_a_video_changes_nothing(layout: str, request: pytest.FixtureRequest) -> None:
    """Only how many there are does: one grey level in a few pixels, where PyTorch takes another kernel."""
    policy = Policy.load(str(request.getfixturevalue(layout)), device="cpu", text_length=training.TEXT_LENGTH)
    x = torch.randn(6, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(4))
    sizes: list[int] = []
    true_decode = policy.vae._vae.decode
    policy.vae._vae.decode = lambda z, **named: sizes.append(len(z)) or true_decode(z, **named)
    alone, together = policy.vae.decode(x), policy.vae.decode(x, 4)
    assert sizes == [1] * 6 + [4, 2]
    apart = np.abs(alone.astype(int) - together)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3
    order = [3, 0, 2, 1]
    assert np.array_equal(policy.vae.decode(x[order], 4), together[order])
    assert np.array_equal(policy.vae.decode(torch.cat([x[:1], 3 * x[3:]]), 4)[0], together[0])


def test_a_sample_is_made_again_as_it_was_decoded(tiny_t2v: Path, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, decode_batch=2)
    policy = Policy.of(run.config.model)
    stage = training.roll(run, 0, policy)
    plan = stage.plan()
    assert plan is not None
    assert plan.to_dict()["arithmetic"] == {"decode_batch": 2}
    with open_shard(stage, 0) as shard:
        key = shard.keys[-1]
        assert regenerate(run, stage, key, policy).video == shard.video(key)


# --- Compiled blocks -------------------------------------------------------------------------------------------------


def test_compiled_blocks_are_planned_replayed_and_taken_back(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a torch.compile that compiles nothing: what is tried here is who is compiled, and when."""
    calls: list[object] = []

    def compiled_by(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == compiled.OPTIONS
        return lambda *arguments, **named: (calls.append(function), function(*arguments, **named))[1]

    monkeypatch.setattr(torch, "compile", compiled_by)
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"compile": "blocks"}, **ONE)
    policy = Policy.of(run.config.model)
    sampled(run, policy)
    blocks = len(policy.experts.module(0).blocks)
    assert len(calls) == blocks * 2 * 2 * run.config.rollout.steps  # two forwards of two chunks a step
    plain = Policy.of(run.config.model)
    calls.clear()
    assert train(Run.open(run.path, ["model.compile=false"]), 0, plain).replay == 0.0
    assert calls
    calls.clear()
    plain.experts.compute_as(Arithmetic())
    plain.experts.forward(0, torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), torch.zeros(1, 4, 16))
    assert not calls


def test_compiling_without_a_compiler_is_refused(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"compile": "blocks"})
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for look in (lambda: preview(run, run.iteration(0)), lambda: rollout(run, run.iteration(0))):
        with pytest.raises(UserError, match=r"model\.compile = blocks needs a C\+\+ compiler"):
            look()
    assert not run.iteration(0).path.exists()


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_what_inductor_makes_of_blocks_is_replayed_exactly(tiny_t2v: Path, tmp_path: Path) -> None:
    """By another process than the one that sampled, as far as its state goes: nothing of the first is left.

    The update's forwards record gradients, and are another graph: their first ratio is 1 within rounding."""
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"compile": "blocks"}, **ONE)
    sampled(run, Policy.of(run.config.model))
    torch._dynamo.reset()
    policy = Policy.of(run.config.model)
    assert train(run, 0, policy).replay == 0.0
    first = json.loads(run.iteration(0).metrics_path.read_text().splitlines()[0])
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    torch._dynamo.reset()
    assert prove_iteration(run, 0, policy).largest == 0.0
