"""Export: what plain diffusers loads is the trained policy, bit for bit, and appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from rollout.export.export import FORMATS, export
from rollout.export.proof import Exported, prove
from rollout.lineage import take_policy
from rollout.lora.find import WEIGHTS
from rollout.policy import Policy
from rollout.policy.folder import read_layout
from rollout.policy.plain import open_plain, probe, settle, wear
from shards.errors import RunFailed, UserError
from shards.files import publish_new, read_json, to_json
from shards.run import Run
from shards.run_toml import apply_sets
from tests.support import lora_forms as forms
from tests.support.tiny_models import TEXT_LENGTH, build, tiny_transformer
from tests.support.training import kill_self, killed, make_run


def stir(policy: Policy, seed: int) -> None:
    """Move the adapters away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for expert in policy.layout.expert_ids:
        for _, parameter in policy.experts.trainable(expert):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def load(model: Path, **options: Any) -> Policy:
    return Policy.load(model, device="cpu", text_length=TEXT_LENGTH, **options)


def trained(path: Path, model: Path, dtype: str = "float32", alpha: float = 8.0, **settings: str) -> Run:
    """A run with one published policy, averaged weights beside it, and a summary of its rewards."""
    run = make_run(path, model, model={"dtype": dtype, **settings})
    policy = Policy.of(run.config.model)
    stage = run.iteration(0)
    take_policy(run, stage, policy)
    if not policy.experts.has_lora:
        policy.experts.add_lora(2, alpha, 0)
    for seed, folder in ((1, stage.policy_dir), (2, stage.policy_dir / "ema")):
        stir(policy, seed)
        policy.experts.save_lora(folder)
    record = {"schema": 1, "iteration": 0, **policy.experts.fingerprint(stage.policy_dir)}
    record["average"] = policy.experts.fingerprint(stage.policy_dir / "ema")
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


def lora_files(folder: Path) -> list[Path]:
    """The LoRA files of an export, the high-noise one first."""
    return [folder / name for name in read_json(folder / "export.json")["lora"].values()]


def plain_answers(run: Run, folder: Path, fused: bool = False) -> list[torch.Tensor]:
    """What the experts of a plain pipeline answer with the export of `folder`."""
    model = Path(run.config.model.path)
    layout = read_layout(model)
    pipe = open_plain(folder if fused else model, "float32", whole=False)
    if not fused:
        wear(pipe, dict(enumerate(lora_files(folder))))
    return [probe(module, layout) for module in (pipe.transformer, pipe.transformer_2) if module is not None]


def policy_answers(run: Run, average: bool = False) -> list[torch.Tensor]:
    """What the experts of the trained policy answer, loaded as every stage does."""
    policy = Policy.of(run.config.model)
    policy.experts.become(run.iteration(0).policy_dir / ("ema" if average else ""))
    return forms.answers(policy)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", ["t2v", "t2v2", "i2v2", "ti2v"])
def test_an_export_is_the_policy_bit_for_bit(layout: str, format: str, runs: dict[str, Run], tmp_path: Path) -> None:
    """alpha/rank is 4 here, so that to multiply it into the weights changes no bit."""
    run, out = runs[layout], tmp_path / "out"
    report = export(run, 1, out, average=False, format=format)
    assert not report.skipped
    assert report.difference == 0.0
    assert report.checked.endswith("bit for bit, and one call of the whole pipeline")
    expected, found = policy_answers(run), plain_answers(run, out)
    assert forms.same(found, expected)
    for base, answer in zip(forms.answers(load(Path(run.config.model.path))), found, strict=True):
        assert not torch.equal(base, answer)
    names = [path.name for path in lora_files(out)]
    if format == "comfyui":
        two = [f"{layout}_high_noise.safetensors", f"{layout}_low_noise.safetensors"]
        assert names == (two if len(found) == 2 else [f"{layout}.safetensors"])


@pytest.mark.parametrize("layout", ["t2v", "t2v2"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_whole_strength_arrives_without_the_metadata(
    layout: str, format: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    """Against adapters made anew in memory, which no file has touched; alpha 8 of rank 2 makes 4 of 1."""
    run = runs[layout]
    export(run, 1, tmp_path / "out", average=False, format=format)
    fresh = load(Path(run.config.model.path))
    fresh.experts.add_lora(2, 8.0, 0)
    stir(fresh, 1)
    expected = forms.answers(fresh)
    assert forms.same(plain_answers(run, tmp_path / "out"), expected)
    bare = [
        forms.write(tmp_path / f"{n}.safetensors", load_file(path))
        for n, path in enumerate(lora_files(tmp_path / "out"))
    ]
    assert forms.same(forms.plain(Path(run.config.model.path), *bare), expected)
    pipe = open_plain(Path(run.config.model.path), "float32", whole=False)
    wear(pipe, dict(enumerate(lora_files(tmp_path / "out"))))
    for name, module in (("high_noise", pipe.transformer), ("low_noise", pipe.transformer_2))[: len(expected)]:
        assert (module.peft_config[name].r, module.peft_config[name].lora_alpha) == (2, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_an_odd_strength_costs_a_rounding(format: str, tiny_t2v2: Path, tmp_path: Path) -> None:
    """alpha 6 of rank 2: the product of each weight with 3 is rounded to fp32 once."""
    run = trained(tmp_path / "run", tiny_t2v2, alpha=6.0)
    report = export(run, 1, tmp_path / "out", average=False, format=format)
    assert report.difference is not None
    assert 0 < report.difference < 1e-5
    assert f"they differ by at most {report.difference:.1e}" in report.checked
    differences = [a - b for a, b in zip(plain_answers(run, tmp_path / "out"), policy_answers(run), strict=True)]
    assert max(float(one.abs().max()) for one in differences) == report.difference


NATIVE = {
    **{f"self_attn.{n}": f"attn1.{o}" for n, o in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
    **{f"cross_attn.{n}": f"attn2.{o}" for n, o in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


@pytest.mark.parametrize("layout", ["t2v2", "i2v2", "ti2v"])
def test_a_reader_of_native_names_gets_the_policy(layout: str, runs: dict[str, Run], tmp_path: Path) -> None:
    """As ComfyUI: W + strength * alpha/rank * up down by official names; alpha is rank where there is none."""
    run, out = runs[layout], tmp_path / "out"
    export(run, 1, out, average=False, format="comfyui")
    base = load(Path(run.config.model.path))
    for expert, path in enumerate(lora_files(out)):
        tensors, weights = load_file(path), dict(base.experts.module(expert).named_parameters())
        assert all(
            re.fullmatch(r"diffusion_model\.blocks\.\d+\.[a-z0-9_.]+\.lora_[AB]\.weight", name) for name in tensors
        )
        assert len(tensors) == 2 * 2 * 10
        for name, down in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            layer = name.removesuffix(".lora_A.weight")
            _, _, block, rest = layer.split(".", 3)
            scale = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down)))) / len(down)
            weights[f"blocks.{block}.{NATIVE[rest]}.weight"].data += scale * tensors[f"{layer}.lora_B.weight"] @ down
    for found, expected in zip(forms.answers(base), policy_answers(run), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert float((found - expected).abs().max()) < 1e-5


def test_a_lora_with_biases_is_exported_with_them(tiny_t2v2: Path, tmp_path: Path) -> None:
    for seed, side in enumerate(("high", "low")):
        tensors = forms.native(tiny_transformer(1), seed, bias=True)
        forms.write(tmp_path / "lora" / f"{side}_noise.safetensors", tensors)
    run = trained(tmp_path / "run", tiny_t2v2, lora=str(tmp_path / "lora"))
    for format in FORMATS:
        export(run, 1, tmp_path / format, average=False, format=format)
        assert forms.same(plain_answers(run, tmp_path / format), policy_answers(run))
    biases = [name for name in load_file(lora_files(tmp_path / "comfyui")[1]) if name.endswith(".diff_b")]
    assert len(biases) == 20
    report = export(run, 1, tmp_path / "fused", average=False, fuse=True)
    assert report.difference is not None
    assert report.difference < 1e-5


def test_averaged_weights_are_the_default(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["t2v2"]
    export(run, 1, tmp_path / "average")
    export(run, 1, tmp_path / "last", average=False)
    average, last = policy_answers(run, average=True), policy_answers(run)
    assert not forms.same(average, last)
    assert forms.same(plain_answers(run, tmp_path / "average"), average)
    assert forms.same(plain_answers(run, tmp_path / "last"), last)


def test_averaged_weights_that_changed_are_not_exported(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["t2v2"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    weights = run.iteration(0).policy_dir / "ema" / "low_noise" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunFailed, match=r"policy/ema: its files are not those its policy\.json names"):
        export(run, 1, tmp_path / "average")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert export(run, 1, tmp_path / "last", average=False).checked
    shutil.rmtree(weights.parents[1])
    with pytest.raises(RunFailed, match=r"policy/ema is missing"):
        export(run, 1, tmp_path / "average")


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_a_model_lora_to_start_from(format: str, runs: dict[str, Run], tmp_path: Path) -> None:
    for layout in ("t2v", "t2v2"):
        run, out = runs[layout], tmp_path / layout
        export(run, 1, out, format=format)
        policy = load(Path(run.config.model.path), lora=str(out))
        answers = [probe(policy.experts.module(expert), policy.layout) for expert in policy.layout.expert_ids]
        assert all(torch.equal(one, other) for one, other in zip(answers, plain_answers(run, out), strict=True))


def test_a_second_export_does_nothing_and_another_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs["t2v"], tmp_path / "out"
    export(run, 1, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = export(run, 1, out)
    assert again.skipped
    assert "nothing to do" in str(again)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for other in ({"average": False}, {"format": "comfyui"}, {"fuse": True}):
        with pytest.raises(UserError, match="exists already and is not this export"):
            export(run, 1, out, **other)
    for wrong, message in (
        ({"format": "a1111"}, r"--format a1111: no such format \(hint: there are: diffusers, comfyui\)"),
        ({"format": "comfyui", "fuse": True}, "--fuse writes a pipeline folder of diffusers, not --format comfyui"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, 1, tmp_path / "other", **wrong)
    with pytest.raises(UserError, match=r"no policy after 2 iterations: iter-0001 is not trained \(hint: .* 2\)$"):
        export(run, 2, tmp_path / "other")
    with pytest.raises(UserError, match="iteration 0 is the model itself"):
        export(run, 0, tmp_path / "other")
    record = out / "export.json"  # as it was written when `iteration` counted from 0
    record.write_text(record.read_text().replace('"iterations":1', '"iteration":0'))
    assert '"iteration":0' in record.read_text()
    assert export(run, 1, out).skipped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_fused_weights_are_a_plain_pipeline(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs["t2v2"], tmp_path / "out"
    report = export(run, 1, out, fuse=True)
    assert report.difference is not None
    assert 0 < report.difference < 1e-5
    pipe = WanPipeline.from_pretrained(out)
    assert pipe.config.boundary_ratio == 0.875
    policy = load(Path(run.config.model.path), lora=str(run.iteration(0).policy_dir / "ema"))
    for expert, answer in enumerate(plain_answers(run, out, fused=True)):
        assert torch.allclose(answer, probe(policy.experts.module(expert), policy.layout), atol=1e-5)
    assert "transformer_2/config.json" in read_json(out / "export.json")["files"]
    assert str(tmp_path) not in (out / "transformer" / "config.json").read_text()
    assert load(out).layout.boundary == 0.875  # and the base of another run


def test_bfloat16_exports_are_proven_too(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_t2v2, "bfloat16")
    assert run.config.model.dtype == "bfloat16"
    export(run, 1, tmp_path / "lora")
    report = export(run, 1, tmp_path / "fused", fuse=True)
    assert report.difference is not None
    assert report.difference > 1e-4


def test_what_differs_from_the_policy_is_not_published(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["t2v2"]
    export(run, 1, tmp_path / "out", average=False)
    policy = load(Path(run.config.model.path), lora=str(tmp_path / "out"))
    answers = dict(enumerate(forms.answers(policy)))
    files = dict(enumerate(lora_files(tmp_path / "out")))
    prove(Exported(tmp_path / "out", policy.layout, "float32", TEXT_LENGTH, files), answers, [])
    export(run, 1, tmp_path / "average")
    other = {**files, 1: lora_files(tmp_path / "average")[1]}  # the right adapter of one expert, another of the other
    with pytest.raises(RunFailed, match="low_noise expert loaded back by plain diffusers differs"):
        prove(Exported(tmp_path / "out", policy.layout, "float32", TEXT_LENGTH, other), answers, [])
    # as training stores it, with its strength in the metadata, half of the readers get another policy
    source = run.iteration(0).policy_dir
    stored = {e: source / side / WEIGHTS for e, side in enumerate(("high_noise", "low_noise"))}
    with pytest.raises(RunFailed, match="without its metadata, the high_noise expert loaded back by plain diffusers"):
        prove(Exported(source, policy.layout, "float32", TEXT_LENGTH, stored), dict(enumerate(policy_answers(run))), [])


def test_a_killed_export_leaves_nothing_to_be_seen(runs: dict[str, Run], tmp_path: Path, monkeypatch: Any) -> None:
    run, out = runs["t2v"], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill_self)
        killed(lambda: export(run, 1, out))
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    export(run, 1, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_lora_of_another_base_is_one_sentence(tiny_t2v: Path, tmp_path: Path) -> None:
    pipe = build("t2v")
    torch.manual_seed(0)
    from diffusers import WanTransformer3DModel

    config = dict(tiny_transformer(1).config) | {"num_attention_heads": 4}
    pipe.register_modules(transformer=WanTransformer3DModel.from_config(config))
    pipe.save_pretrained(tmp_path / "wide")
    wide = load(tmp_path / "wide")
    wide.experts.add_lora(2, 4.0, 0)
    wide.experts.save_lora(tmp_path / "lora")
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
    assert torch.equal(probe(policy.experts.module(0), policy.layout), probe(pipe.transformer, policy.layout))
    assert apply_sets({}, [f"model.lora={tmp_path}"]) == {"model": {"lora": str(tmp_path)}}
