"""model.base_lora: merged once, beneath policy and reference of every stage, and part of the model's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.lineage import take_policy
from rollout.plan import check_stage
from rollout.policy import Policy
from rollout.policy.folder import load_transformer, read_layout
from rollout.policy.plain import open_plain, probe, settle
from rollout.run import rollout
from shards.errors import RunFailed, UserError
from shards.files import read_json
from shards.run import Run
from tests.rollout.test_lora_forms import ends, head_difference
from tests.support import lora_forms as forms
from tests.support import training
from tests.support.lora_forms import Tensors, answers, load, same
from tests.support.tiny_models import tiny_transformer
from train.replay import prove_iteration
from train.run import train

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in ATTENTION.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def merged(module: Any, tensors: Tensors, scale: float) -> Any:
    """A module with W + scale * alpha/rank * B A, by native names, written for this test."""
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        _, _, block, rest = layer.split(".", 3)
        linear = module.get_submodule(f"blocks.{block}.{BLOCK[rest]}")
        alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(down.shape[0])))
        delta = tensors[f"{layer}.lora_B.weight"].double() @ down.double() * (alpha.double() / down.shape[0])
        linear.weight.data = (linear.weight.double() + scale * delta).to(linear.weight.dtype)
        if f"{layer}.diff_b" in tensors:
            bias = linear.bias.double() + scale * tensors[f"{layer}.diff_b"].double()
            linear.bias.data = bias.to(linear.bias.dtype)
    return module


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of answers, relative to the largest answer."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_merged_in_float64_and_rounded_once(
    dtype: str, scale: float, tiny_t2v: Path, tmp_path: Path
) -> None:
    tensors = forms.native(tiny_transformer(1), 7, bias=True)
    file = forms.write(tmp_path / "a.safetensors", tensors)
    policy = load(tiny_t2v, base_lora=file, base_lora_scale=scale, dtype=dtype)
    plain = load_transformer(read_layout(tiny_t2v), 0, dtype, torch.device("cpu"))
    with torch.no_grad():
        expected = merged(plain, tensors, scale)
    theirs = dict(expected.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in policy.experts.module(0).named_parameters())
    assert {value.dtype for value in theirs.values()} == {
        value.dtype for value in policy.experts.module(0).parameters()
    }
    assert same(answers(policy), [probe(expected, policy.layout)])
    assert not policy.experts.has_lora
    assert not policy.experts.trainable(0)


@pytest.mark.parametrize("case", ["native", "alpha", "biases", "ends", "head", "DoRA"])
def test_merged_it_does_what_diffusers_does_unmerged(case: str, tiny_t2v: Path, tmp_path: Path) -> None:
    """Equal but for the rounding of merged weights; half of it with half the strength."""
    model = tiny_transformer(1)
    if case in ("ends", "head"):
        tensors = (ends if case == "ends" else head_difference)(model, 7)
    else:
        tensors = forms.native(model, 7, alpha=3.0 if case == "alpha" else None, bias=case == "biases")
    if case == "DoRA":
        tensors = forms.diffusers_keys(tensors)
        tensors |= {
            name.replace("lora_A.weight", "lora_magnitude_vector"): 1.5 * torch.ones(32 if "net.0" in name else 24)
            for name in tensors
            if "lora_A" in name
        }
    file = forms.write(tmp_path / "a.safetensors", tensors)
    expected = forms.plain(tiny_t2v, file)
    assert largest(answers(load(tiny_t2v, base_lora=file)), expected) < 3e-6
    assert largest(answers(load(tiny_t2v)), expected) > 0.01
    pipe = open_plain(tiny_t2v, "float32", whole=False)
    pipe.load_lora_weights(str(file), adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    settle(pipe.transformer)
    half = load(tiny_t2v, base_lora=file, base_lora_scale=0.5)
    assert largest(answers(half), [probe(pipe.transformer, half.layout)]) < 3e-6


@pytest.mark.parametrize("layout", ["t2v2", "i2v2"])
def test_experts_get_their_own(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(f"tiny_{layout}")
    shape = tiny_transformer(1, 36 if layout == "i2v2" else 16)
    high, low = (
        forms.write(tmp_path / f"{side}_noise_model.safetensors", forms.native(shape, seed, alpha=2.0))
        for seed, side in enumerate(("high", "low"))
    )
    base, both = answers(load(model)), answers(load(model, base_lora=tmp_path))
    assert largest(both, forms.plain(model, high, low)) < 3e-6
    only_high = answers(load(model, base_lora=high, base_lora_2="none"))
    only_low = answers(load(model, base_lora_2=low))
    assert same(only_high, [both[0], base[1]])
    assert same(only_low, [base[0], both[1]])
    assert not same(both, base)


def test_the_fingerprint_goes_by_content(tiny_t2v2: Path, tmp_path: Path) -> None:
    high, low = (
        forms.write(tmp_path / "one" / f"{side}.safetensors", forms.native(tiny_transformer(1), seed))
        for seed, side in enumerate(("high", "low"))
    )
    (tmp_path / "two").mkdir()
    moved = [path.rename(tmp_path / "two" / f"{path.stem}_noise.safetensors") for path in (high, low)]

    def base(**options: Any) -> str:
        return load(tiny_t2v2, **options).experts.base_fingerprint

    none, both = base(), base(base_lora=tmp_path / "two")
    assert load(tiny_t2v2, base_lora=tmp_path / "two").experts.model_fingerprint == none
    for path, name in zip(moved, ("a.safetensors", "b.safetensors"), strict=True):
        path.rename(tmp_path / name)
    high, low = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert base(base_lora=high, base_lora_2=low) == both  # other names, the same content
    others = {
        base(base_lora=high, base_lora_2=low, base_lora_scale=0.5),
        base(base_lora=low, base_lora_2=high),
        base(base_lora=high, base_lora_2="none"),
        base(base_lora_2=high),
    }
    assert len(others | {none, both}) == 6


def make_run(path: Path, model: Path, train: dict[str, Any] | None = None, **settings: Any) -> Run:
    return training.make_run(path, model, train, model={key: str(value) for key, value in settings.items()})


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with a LoRA for each of two experts."""
    for seed, side in enumerate(("high", "low")):
        forms.write(tmp_path / "few" / f"{side}_noise.safetensors", forms.native(tiny_transformer(1), seed, alpha=2.0))
    return tmp_path / "few"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"full": True, "learning_rate": 1e-4}, marks=pytest.mark.long),
        pytest.param({"objective": "nft"}, marks=pytest.mark.long),
    ],
)
def test_every_stage_has_it_beneath(settings: dict[str, Any], pair: Path, tiny_t2v2: Path, tmp_path: Path) -> None:
    """Rollout, the replay gate, training, the next rollout, an evaluation, and a replay by a process of its own."""
    run = make_run(tmp_path / "run", tiny_t2v2, settings, base_lora=pair)
    policy = Policy.of(run.config.model)
    training.advise(training.roll(run, 0, policy))
    assert (
        read_json(run.path / "model.json")["base"]
        == policy.experts.base_fingerprint
        != policy.experts.model_fingerprint
    )
    report = train(run, 0, Policy.of(run.config.model))
    if "objective" not in settings:
        assert report.replay == 0.0
    training.advise(training.roll(run, 1, policy))
    rollout(run, run.evaluation(1), Policy.of(run.config.model))
    for iteration in (0, 1):
        assert prove_iteration(run, iteration, Policy.of(run.config.model)).largest == 0.0
    without = run.config.model.model_copy(update={"base_lora": ""})
    for stage in (lambda policy: prove_iteration(run, 0, policy), lambda policy: train(run, 1, policy)):
        with pytest.raises(UserError, match=r"model\.base_lora is empty, but this run began with one"):
            stage(Policy.of(without))
    plain = make_run(tmp_path / "plain", tiny_t2v2)
    training.roll(plain, 0, Policy.of(without))
    frames = [training.frame_of(one.iteration(0)).set_index("key") for one in (run, plain)]
    assert (frames[0].index == frames[1].index).all()
    videos = [one.iteration(0).shard_path(0).read_bytes() for one in (run, plain)]
    assert videos[0] != videos[1]


def test_the_reference_has_it_too(pair: Path, tiny_t2v2: Path) -> None:
    policy = load(tiny_t2v2, base_lora=pair)
    beneath = answers(policy)
    policy.experts.add_lora(2, 4.0, 0)
    for _, parameter in policy.experts.trainable(0):
        parameter.data += 0.05
    assert not same(answers(policy)[:1], beneath[:1])
    with policy.experts.reference():
        assert same(answers(policy), beneath)
    policy.experts.become(None)
    policy.experts.train_all()
    for _, parameter in policy.experts.trainable(0):
        parameter.data += 0.05
    with policy.experts.reference():
        assert same(answers(policy), beneath)


def test_a_starting_lora_lies_on_top(pair: Path, tiny_t2v2: Path, tmp_path: Path) -> None:
    start = forms.write(tmp_path / "start.safetensors", forms.native(tiny_transformer(1), 9))
    policy = load(tiny_t2v2, base_lora=pair, lora=start, lora_2=start)
    with policy.experts.reference():
        assert same(answers(policy), answers(load(tiny_t2v2, base_lora=pair)))
    pipe = open_plain(tiny_t2v2, "float32", whole=False)
    pipe.load_lora_weights(str(pair / "high_noise.safetensors"), adapter_name="base")
    pipe.load_lora_weights(str(start), adapter_name="start")
    pipe.set_adapters(["base", "start"])
    settle(pipe.transformer)
    assert largest(answers(policy)[:1], [probe(pipe.transformer, policy.layout)]) < 3e-6


def test_an_exchange_is_noticed(pair: Path, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_t2v2, base_lora=pair)
    take_policy(run, run.iteration(0), Policy.of(run.config.model))
    path = run.path / "model.json"
    hint = f"{path} has the sha256 of its files and its strength; restore them, or start a new run"

    def refused(**changes: Any) -> UserError:
        model = run.config.model.model_copy(update=changes)
        with pytest.raises(UserError) as caught:
            take_policy(run, run.iteration(0), Policy.of(model))
        return caught.value

    other = forms.native(tiny_transformer(1), 5)
    kept = (pair / "low_noise.safetensors").read_bytes()
    forms.write(pair / "low_noise.safetensors", other)
    found = refused()
    assert (found.problem, found.hint) == ("model.base_lora is not what this run began with", hint)
    (pair / "low_noise.safetensors").write_bytes(kept)
    assert refused(base_lora_scale=0.9).problem == "model.base_lora is not what this run began with"
    assert refused(base_lora="").problem == "model.base_lora is empty, but this run began with one"
    path.unlink()
    take_policy(run, run.iteration(0), Policy.of(run.config.model.model_copy(update={"base_lora": ""})))
    assert refused().problem == "model.base_lora is set, but this run began without one"


def test_a_file_that_changes_in_use_ends_the_command(pair: Path, tiny_t2v2: Path) -> None:
    policy = load(tiny_t2v2, base_lora=pair)
    forms.write(pair / "high_noise.safetensors", forms.native(tiny_transformer(1), 5))
    with pytest.raises(RunFailed, match=r"high_noise\.safetensors: changed while it was in use"):
        policy.experts.train_all()


def test_what_cannot_lie_beneath(tiny_t2v: Path, tiny_t2v2: Path, tmp_path: Path) -> None:
    def refused(model: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(model, **options)
        return str(caught.value)

    deeper = forms.renamed(forms.native(tiny_transformer(1), 1), ("blocks.1.", "blocks.4."))
    file = forms.write(tmp_path / "a.safetensors", deeper)
    assert "blocks.4.attn1.to_k.lora_A.weight is [4, 24] there, and here does not exist" in refused(
        tiny_t2v, base_lora=file
    )
    assert refused(tiny_t2v2, base_lora="none", base_lora_2="none").startswith(
        "model.base_lora = 'none', model.base_lo"
    )
    assert refused(tiny_t2v2, lora="none", lora_2="none").startswith("model.lora = 'none', model.lora_2 = 'none' name")
    policy = load(tiny_t2v)
    policy.experts.train_all()
    for expert in policy.layout.expert_ids:
        policy.experts.save(tmp_path / "full", expert)
    found = refused(tiny_t2v, base_lora=tmp_path / "full")
    assert found.startswith(f"model.base_lora: {tmp_path}/full holds whole transformers, not a LoRA")


def test_a_lora_trained_over_another_base_is_refused_by_its_record(pair: Path, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_t2v2, base_lora=pair)
    training.advise(training.roll(run, 0, Policy.of(run.config.model)))
    train(run, 0)
    folder = run.iteration(0).policy_dir
    assert load(tiny_t2v2, lora=folder, base_lora=pair).experts.has_lora
    for options in (
        {"lora": folder},
        {"lora": folder, "base_lora": pair, "base_lora_scale": 0.5},
        {"base_lora": folder},
    ):
        with pytest.raises(UserError, match=r"policy was trained on another base model than .*; name that model in"):
            load(tiny_t2v2, **options)


def test_a_problem_is_told_before_a_weight_is_read(tiny_t2v2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("rollout.policy.experts.load_transformer", forbidden)
    wide = forms.write(tmp_path / "a.safetensors", forms.renamed(forms.native(tiny_transformer(1), 1), (".1.", ".5.")))
    for setting in ("lora", "base_lora"):
        run = make_run(tmp_path / setting, tiny_t2v2, **{setting: wide, f"{setting}_2": wide})
        check_stage(run, run.iteration(0))
        with pytest.raises(UserError, match=r"a\.safetensors: does not fit this model: blocks\.5"):
            Policy.of(run.config.model)
