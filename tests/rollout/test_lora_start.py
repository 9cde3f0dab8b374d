"""A foreign LoRA that is trained: what samples is what replays, what is saved, and what plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from rollout.lora.start import of_one_expert
from rollout.plan import check_stage
from rollout.policy import Policy
from rollout.policy.folder import read_layout
from rollout.policy.plain import open_plain, probe, wear
from rollout.run import rollout
from shards.config import ModelConfig
from shards.errors import UserError
from shards.run import Run
from tests.rollout.test_lora_forms import FORMS
from tests.support import lora_forms as forms
from tests.support import training
from tests.support.lora_forms import answers, load, same
from tests.support.tiny_models import tiny_transformer
from train.replay import prove_iteration
from train.run import train


def make(tmp_path: Path, model: Path, form: str, **settings: Any) -> Run:
    """A run that starts from a LoRA of that form, another one for each expert."""
    for seed, side in enumerate(("high", "low")):
        forms.write(tmp_path / "lora" / f"{side}_noise.safetensors", FORMS[form](tiny_transformer(1), seed))
    return training.make_run(tmp_path / "run", model, settings, model={"lora": str(tmp_path / "lora")})


@pytest.mark.parametrize(
    "form",
    [
        "native, biases",
        "diffusers, mixed ranks",
        *(pytest.param(form, marks=pytest.mark.long) for form in ("musubi", "native, ends")),
    ],
)
def test_it_is_trained_whole_and_stored_whole(form: str, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path, tiny_t2v2, form)
    policy = Policy.of(run.config.model)
    began = {e: {name: value.detach().clone() for name, value in policy.experts.trainable(e)} for e in (0, 1)}
    assert any(".lora_B.policy.bias" in name for name in began[0]) == (form in ("native, biases", "native, ends"))
    training.advise(training.roll(run, 0, policy))
    report = train(run, 0, Policy.of(run.config.model))
    assert report.replay == 0.0
    assert not report.warnings

    folder = run.iteration(0).policy_dir
    policy.experts.become(folder)
    for expert in (0, 1):
        now = dict(policy.experts.trainable(expert))
        assert now.keys() == began[expert].keys()
        assert all(not now[name].equal(value) for name, value in began[expert].items()), "a weight was not trained"
    trained = answers(policy)
    assert same(answers(load(tiny_t2v2, lora=folder)), trained)
    pipe = open_plain(tiny_t2v2, "float32", whole=False)
    files = {e: folder / f"{side}_noise/pytorch_lora_weights.safetensors" for e, side in enumerate(("high", "low"))}
    wear(pipe, files)
    assert same([probe(module, policy.layout) for module in (pipe.transformer, pipe.transformer_2)], trained)

    if form != "native, biases":  # the others only differ in how they are read
        return
    rollout(run, run.iteration(1), Policy.of(run.config.model))
    rollout(run, run.evaluation(1), Policy.of(run.config.model))
    assert [prove_iteration(run, number, Policy.of(run.config.model)).largest for number in (0, 1)] == [0.0, 0.0]
    training.advise(run.iteration(1))
    assert train(run, 1, Policy.of(run.config.model)).replay == 0.0


def test_one_file_starts_the_high_noise_expert_as_in_diffusers(tiny_t2v2: Path, tmp_path: Path) -> None:
    """The other begins with a new adapter, as without `model.lora`; one sentence says so."""
    file = forms.write(tmp_path / "style.safetensors", FORMS["native, biases"](tiny_transformer(1), 3))
    run = training.make_run(tmp_path / "run", tiny_t2v2, model={"lora": str(file)})
    policy, said = Policy.of(run.config.model), list[str]()
    assert same(answers(policy), forms.plain(tiny_t2v2, file))
    for number in (0, 1):
        rollout(run, run.iteration(number), policy, tell=said.append)
        training.advise(run.iteration(number))
        assert train(run, number, Policy.of(run.config.model)).replay == 0.0
    assert [sentence for sentence in said if "model.lora" in sentence] == [
        f"model.lora: {file} is one LoRA; it is loaded into the high-noise expert, as in diffusers, and the "
        "low-noise expert starts without one (to use it on both, name it in model.lora_2 too)"
    ]
    assert {name.split("/")[0] for name in training.weights(run, 1)} == {"high_noise", "low_noise"}
    assert prove_iteration(run, 1, Policy.of(run.config.model)).largest == 0.0


def test_a_lora_of_one_expert_is_reported_unless_the_other_is_none(
    tiny_t2v: Path, tiny_t2v2: Path, tmp_path: Path
) -> None:
    file = str(forms.write(tmp_path / "style.safetensors", FORMS["native"](tiny_transformer(1), 3)))

    def said(model: Path = tiny_t2v2, **settings: str) -> list[str]:
        return of_one_expert(ModelConfig(path=str(model), **settings), read_layout(model))

    high = "is one LoRA; it is loaded into the high-noise expert, as in diffusers, and the low-noise expert"
    assert said(lora=file, base_lora=file) == [
        f"model.lora: {file} {high} starts without one (to use it on both, name it in model.lora_2 too)",
        f"model.base_lora: {file} {high} stays without one (to use it on both, name it in model.base_lora_2 too)",
    ]
    low = f"model.lora_2: {file} is loaded into the low-noise expert, and the high-noise expert starts without one"
    assert said(lora_2=file) == [low]
    assert said(lora=file, lora_2="none") == said(lora=file, lora_2=file) == said(tiny_t2v, lora=file) == said() == []


def test_a_start_of_whole_transformers_in_several_files_is_not_a_lora(tiny_t2v2: Path, tmp_path: Path) -> None:
    policy = Policy.load(tiny_t2v2, device="cpu")
    policy.experts.train_all()
    for expert, side in enumerate(("high_noise", "low_noise")):
        policy.experts.save(tmp_path / "full", expert)
        policy.experts.module(expert).save_pretrained(tmp_path / "full" / side, max_shard_size="20KB")
        (tmp_path / "full" / side / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        shutil.copy(tiny_t2v2 / ("transformer", "transformer_2")[expert] / "config.json", tmp_path / "full" / side)
        assert len([*(tmp_path / "full" / side).glob("*.safetensors")]) > 1
    run = training.make_run(
        tmp_path / "run", tiny_t2v2, {"full": True, "learning_rate": 1e-4}, model={"lora": str(tmp_path / "full")}
    )
    assert check_stage(run, run.iteration(0)) == []
    training.roll(run, 0, Policy.of(run.config.model))


def test_the_configuration_is_stored_with_it(tiny_t2v2: Path, tmp_path: Path) -> None:
    """Without ranks and biases in the metadata nobody could load the file."""
    policy = load(tiny_t2v2, lora=make(tmp_path, tiny_t2v2, "diffusers, mixed ranks").config.model.lora)
    policy.experts.save_lora(tmp_path / "a")
    with safe_open(tmp_path / "a" / "low_noise" / "pytorch_lora_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {config["transformer.r"], *config["transformer.rank_pattern"].values()} == {2, 5}
    assert config["transformer.alpha_pattern"] == config["transformer.rank_pattern"]
    load(tiny_t2v2, lora=tmp_path / "a").experts.save_lora(tmp_path / "b")
    for side in ("high_noise", "low_noise"):
        name = f"{side}/pytorch_lora_weights.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_all_weights_are_not_trained_with_a_lora_on_them(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path, tiny_t2v2, "native, biases", full=True)
    training.advise(training.roll(run, 0, Policy.of(run.config.model)))
    with pytest.raises(UserError) as caught:
        train(run, 0)
    assert caught.value.problem == f"train.full trains all weights, but model.lora = {tmp_path}/lora"
    assert caught.value.hint == "name it in model.base_lora instead, which merges it into the model"
    file = f"{tmp_path}/lora/low_noise.safetensors"
    low = training.make_run(tmp_path / "low", tiny_t2v2, {"full": True}, model={"lora": "none", "lora_2": file})
    training.advise(training.roll(low, 0, Policy.of(low.config.model)))
    with pytest.raises(UserError, match=rf"^train.full trains all weights, but model.lora_2 = {file} \("):
        train(low, 0)
