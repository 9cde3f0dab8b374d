"""Export: what plain diffusers loads is the trained policy, bit for bit, and appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers import WanPipeline

from rollout.export.export import export, prove
from rollout.policy import Policy
from rollout.policy.folder import read_layout
from rollout.policy.plain import open_plain, probe, settle, wear
from shards.errors import RunFailed, UserError
from shards.files import publish_new, read_json, to_json
from shards.run import Run
from shards.run_toml import apply_sets
from tests.support.tiny_models import TEXT_LENGTH, build, tiny_transformer
from tests.support.training import kill_self, killed, make_run


def stir(policy: Policy, seed: int) -> None:
    """Move the adapters away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for expert in policy.expert_ids:
        for _, parameter in policy.trainable(expert):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def load(model: Path, **options: Any) -> Policy:
    return Policy.load(model, device="cpu", text_length=TEXT_LENGTH, **options)


def trained(path: Path, model: Path, dtype: str = "float32") -> Run:
    """A run with one published policy, averaged weights beside it, and a summary of its rewards."""
    run = make_run(path, model)
    run.config_path.write_text(run.config_path.read_text().replace('dtype = "float32"', f'dtype = "{dtype}"', 1))
    run = Run.open(path)
    policy = load(model, dtype=dtype)
    publish_new(
        run.path / "model.json", to_json({"schema": 1, "base": policy.base_fingerprint, "path": str(model)}, path)
    )
    stage = run.iteration(0)
    policy.add_lora(2, 6.0, 0)
    for seed, folder in ((1, stage.policy_dir), (2, stage.policy_dir / "ema")):
        stir(policy, seed)
        policy.save_lora(folder)
    record = {"schema": 1, "iteration": 0, **policy.fingerprint(stage.policy_dir)}
    record["average"] = policy.fingerprint(stage.policy_dir / "ema")
    publish_new(stage.policy_dir / "policy.json", to_json(record, path))
    for number, reward in enumerate((0.25, 0.75)):
        summary = {"specification": {"weights": {"ocr": 1.0}}, "mean_reward": reward, "std_reward": 0.5, "samples": 100}
        where = run.evaluation(number).summary_path("0a1b2c3d")
        publish_new(where, to_json(summary, where))
    return run


@pytest.fixture(scope="module")
def runs(tiny_t2v: Path, tiny_t2v2: Path, tiny_i2v2: Path, tiny_ti2v: Path, tmp_path_factory: Any) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("export")
    models = {"t2v": tiny_t2v, "t2v2": tiny_t2v2, "i2v2": tiny_i2v2, "ti2v": tiny_ti2v}
    return {name: trained(folder / name, model) for name, model in models.items()}


def plain_answers(run: Run, folder: Path, fused: bool = False) -> list[torch.Tensor]:
    """What the experts of a plain pipeline answer with the export of `folder`."""
    model = Path(run.config.model.path)
    layout = read_layout(model)
    pipe = open_plain(folder if fused else model, "float32", whole=False)
    if not fused:
        wear(pipe, folder, layout.expert_ids)
    return [probe(module, layout) for module in (pipe.transformer, pipe.transformer_2) if module is not None]


@pytest.mark.parametrize("layout", ["t2v", "t2v2", "i2v2", "ti2v"])
def test_an_export_is_the_policy_bit_for_bit(layout: str, runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs[layout]
    report = export(run, 0, tmp_path / "out", average=False)
    assert not report.skipped
    assert "one call of the whole pipeline" in report.checked
    policy = load(Path(run.config.model.path), lora=str(run.iteration(0).policy_dir))
    expected = [probe(policy.module(expert), policy.layout) for expert in policy.expert_ids]
    found = plain_answers(run, tmp_path / "out")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    base = load(Path(run.config.model.path))
    for expert, answer in zip(base.expert_ids, found, strict=True):
        assert not torch.equal(probe(base.module(expert), base.layout), answer)


@pytest.mark.parametrize("layout", ["t2v", "t2v2"])
def test_alpha_and_the_moved_weights_arrive(layout: str, runs: dict[str, Run], tmp_path: Path) -> None:
    """Against adapters made anew in memory, which no file has touched; alpha 6 of rank 2 triples their effect."""
    run = runs[layout]
    export(run, 0, tmp_path / "out", average=False)
    fresh = load(Path(run.config.model.path))
    fresh.add_lora(2, 6.0, 0)
    stir(fresh, 1)
    expected = [probe(fresh.module(expert), fresh.layout) for expert in fresh.expert_ids]
    found = plain_answers(run, tmp_path / "out")
    assert len(found) == len(expected) == len(fresh.expert_ids)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    pipe = open_plain(Path(run.config.model.path), "float32", whole=False)
    wear(pipe, tmp_path / "out", fresh.expert_ids)
    for name, module in (("high_noise", pipe.transformer), ("low_noise", pipe.transformer_2))[: len(expected)]:
        assert (module.peft_config[name].r, module.peft_config[name].lora_alpha) == (2, 6.0)


def test_averaged_weights_are_the_default(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["t2v2"]
    export(run, 0, tmp_path / "average")
    export(run, 0, tmp_path / "last", average=False)
    for name in ("high_noise", "low_noise"):
        file = Path(name) / "pytorch_lora_weights.safetensors"
        assert (tmp_path / "average" / file).read_bytes() == (run.iteration(0).policy_dir / "ema" / file).read_bytes()
        assert (tmp_path / "last" / file).read_bytes() == (run.iteration(0).policy_dir / file).read_bytes()


def test_averaged_weights_that_changed_are_not_exported(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["t2v2"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    weights = run.iteration(0).policy_dir / "ema" / "low_noise" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunFailed, match=r"policy/ema: its files are not those its policy\.json names"):
        export(run, 0, tmp_path / "average")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert export(run, 0, tmp_path / "last", average=False).checked
    shutil.rmtree(weights.parents[1])
    with pytest.raises(RunFailed, match=r"policy/ema is missing"):
        export(run, 0, tmp_path / "average")


def test_an_export_is_a_model_lora_to_start_from(runs: dict[str, Run], tmp_path: Path) -> None:
    for layout in ("t2v", "t2v2"):
        run, out = runs[layout], tmp_path / layout
        export(run, 0, out)
        policy = load(Path(run.config.model.path), lora=str(out))
        answers = [probe(policy.module(expert), policy.layout) for expert in policy.expert_ids]
        assert all(torch.equal(one, other) for one, other in zip(answers, plain_answers(run, out), strict=True))


def test_a_second_export_does_nothing_and_another_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs["t2v"], tmp_path / "out"
    export(run, 0, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = export(run, 0, out)
    assert again.skipped
    assert "nothing to do" in str(again)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UserError, match="exists already and is not this export"):
        export(run, 0, out, average=False)
    with pytest.raises(UserError, match="holds no finished policy"):
        export(run, 1, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_fused_weights_are_a_plain_pipeline(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs["t2v2"], tmp_path / "out"
    report = export(run, 0, out, fuse=True)
    assert report.merge_difference is not None
    assert 0 < report.merge_difference < 1e-5
    pipe = WanPipeline.from_pretrained(out)
    assert pipe.config.boundary_ratio == 0.875
    policy = load(Path(run.config.model.path), lora=str(run.iteration(0).policy_dir / "ema"))
    for expert, answer in enumerate(plain_answers(run, out, fused=True)):
        assert torch.allclose(answer, probe(policy.module(expert), policy.layout), atol=1e-5)
    assert "transformer_2/config.json" in read_json(out / "export.json")["files"]
    assert str(tmp_path) not in (out / "transformer" / "config.json").read_text()
    assert load(out).layout.boundary == 0.875  # and the base of another run


def test_bfloat16_exports_are_proven_too(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_t2v2, "bfloat16")
    assert run.config.model.dtype == "bfloat16"
    export(run, 0, tmp_path / "lora")
    report = export(run, 0, tmp_path / "fused", fuse=True)
    assert report.merge_difference is not None
    assert report.merge_difference > 1e-4


def test_what_differs_from_the_policy_is_not_published(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["t2v2"]
    source = run.iteration(0).policy_dir
    policy = load(Path(run.config.model.path), lora=str(source))
    answers = {expert: probe(policy.module(expert), policy.layout) for expert in policy.expert_ids}
    options: dict[str, Any] = {"dtype": "float32", "text_length": TEXT_LENGTH, "fused": False}
    prove(policy.layout, source, answers, [], **options)
    other = tmp_path / "other"  # the right adapter of one expert, another one of the other
    shutil.copytree(source / "high_noise", other / "high_noise")
    shutil.copytree(source / "ema" / "low_noise", other / "low_noise")
    with pytest.raises(RunFailed, match="low_noise expert loaded back by plain diffusers differs"):
        prove(policy.layout, other, answers, [], **options)


def test_a_killed_export_leaves_nothing_to_be_seen(runs: dict[str, Run], tmp_path: Path, monkeypatch: Any) -> None:
    run, out = runs["t2v"], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill_self)
        killed(lambda: export(run, 0, out))
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    export(run, 0, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_card_says_what_it_is_and_its_code_runs(runs: dict[str, Run], tmp_path: Path, monkeypatch: Any) -> None:
    run, out = runs["t2v2"], tmp_path / "out"
    export(run, 0, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"`{run.config.model.path}`" in card
    assert "`ocr` × 1" in card
    assert "| 0 | - | 0.2500 ± 0.0500 (100 videos) |\n| 1 | - | 0.7500 ± 0.0500 (100 videos) |" in card
    assert "trained with GRPO" in card
    curve = ElementTree.fromstring((out / "reward.svg").read_text(encoding="utf-8"))
    shown = [one.attrib["data-tip"] for one in curve.iter() if "data-tip" in one.attrib]
    assert shown == [
        "evaluation, iterations trained 0: 0.25, 0.2 to 0.3",
        "evaluation, iterations trained 1: 0.75, 0.7 to 0.8",
    ]
    assert "![mean reward by iterations trained](reward.svg)" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), names)
    assert names["video"].shape == (5, 16, 16, 3)
    assert set(names["pipe"].transformer_2.peft_config) == {"low_noise"}


def test_the_card_samples_as_the_evaluation_did(runs: dict[str, Run], tmp_path: Path, monkeypatch: Any) -> None:
    """Its own shift, guidance and negative prompt; another objective by its name; the code runs here too."""
    sets = ["eval.shift=12.0", "eval.guidance_scale=1.5", "eval.guidance_scale_2=2.5", 'train.objective="nft"']
    run = Run.open(runs["t2v2"].path, [*sets, 'rollout.negative_prompt="it\'s bad"', "eval.steps=2"])
    export(run, 0, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags: [lora]\n---\n")
    assert "trained with DiffusionNFT" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "guidance_scale=1.5, guidance_scale_2=2.5" in code
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["pipe"].scheduler.config.flow_shift == 12
    assert 'negative_prompt="it\'s bad"' in code


def test_a_lora_of_another_base_is_one_sentence(tiny_t2v: Path, tmp_path: Path) -> None:
    pipe = build("t2v")
    torch.manual_seed(0)
    from diffusers import WanTransformer3DModel

    config = dict(tiny_transformer(1).config) | {"num_attention_heads": 4}
    pipe.register_modules(transformer=WanTransformer3DModel.from_config(config))
    pipe.save_pretrained(tmp_path / "wide")
    wide = load(tmp_path / "wide")
    wide.add_lora(2, 4.0, 0)
    wide.save_lora(tmp_path / "lora")
    with pytest.raises(UserError) as error:
        load(tiny_t2v, lora=str(tmp_path / "lora"))
    message = str(error.value)
    assert "\n" not in message
    assert "high_noise/pytorch_lora_weights.safetensors" in message
    assert "another model" in message
    assert len(message) < 400


def test_a_foreign_adapter_of_one_expert_and_fewer_layers_loads(tiny_t2v: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = WanPipeline.from_pretrained(tiny_t2v)
    pipe.transformer.add_adapter(
        LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    settle(pipe.transformer)
    policy = load(tiny_t2v, lora=str(tmp_path))
    assert torch.equal(probe(policy.module(0), policy.layout), probe(pipe.transformer, policy.layout))
    assert apply_sets({}, [f"model.lora={tmp_path}"]) == {"model": {"lora": str(tmp_path)}}
