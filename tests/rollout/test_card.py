"""The model card of an export: it names things by name and hash, and its code samples as `rushes eval` does."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from rollout.export.export import export
from rollout.export.model_card_code import Base, public_name
from rollout.policy import Policy
from rollout.step import StepInputs, looks_back, take_step
from shards.files import read_json
from shards.run import Run
from tests.rollout.test_export import trained
from tests.support import lora_forms as forms
from tests.support.tiny_models import tiny_transformer

IMAGE = Image.fromarray((np.arange(16 * 16 * 3) % 251).reshape(16, 16, 3).astype("uint8"))


@pytest.fixture(scope="module")
def runs(tiny_t2v: Path, tiny_t2v2: Path, tiny_i2v2: Path, tiny_ti2v: Path, tmp_path_factory: Any) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("card")
    models = {"t2v": tiny_t2v, "t2v2": tiny_t2v2, "i2v2": tiny_i2v2, "ti2v": tiny_ti2v}
    return {name: trained(folder / name, model) for name, model in models.items()}


def card_of(run: Run, out: Path, **options: Any) -> str:
    export(run, 1, out, **options)
    return (out / "README.md").read_text(encoding="utf-8")


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


@contextmanager
def strictly() -> Iterator[list[str]]:
    """Inside, a warning is an error; what diffusers, transformers and peft log as one is collected."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # between numpy and torch, inside of diffusers, and of a kind that Python does not show
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def evaluated(run: Run, noise: torch.Tensor, image: Any = None) -> torch.Tensor:
    """Final latents of the averaged policy by the steps of `rushes eval`, from that noise."""
    policy = Policy.of(run.config.model)
    policy.experts.become(run.iteration(0).policy_dir / "ema")
    plan, video = Base.of(run, policy.layout).plan, run.config.rollout
    prompt, negative = (
        policy.text.pad(embeds, 1) for embeds in policy.text.encode(["a cat walks", video.negative_prompt])
    )
    condition = None if image is None else policy.vae.encode_image(image, video.height, video.width, video.frames)
    x, before = noise, None
    with torch.no_grad():
        for step in range(plan.steps):
            inputs = StepInputs(x, prompt, negative, condition, before)
            taken = take_step(policy, plan, step, inputs, None, torch.float32)
            x, before = taken.x, taken.clean if looks_back(plan) else None
    return policy.impose(x, condition)


def executed(run: Run, code: str, folder: Path, monkeypatch: Any, **names: Any) -> dict[str, Any]:
    """Run the code of a card beside its files, from given noise and to latents, with warnings as errors."""
    monkeypatch.chdir(folder)
    code = re.sub(r'^base = "[^"./][^"]*"', f'base = "{run.config.model.path}"', code, flags=re.MULTILINE)
    code = code.replace('prompt="…"', 'prompt="a cat walks", latents=noise, output_type="latent"')
    with strictly() as logged:
        exec(code, names)
    assert logged == []
    return names


CASES = [
    ("t2v2", "euler", "shifted"),
    ("t2v2", "dpm-2m", "shifted"),
    pytest.param("t2v2", "euler", "euler", marks=pytest.mark.long),
    pytest.param("t2v", "dpm-2m", "unipc", marks=pytest.mark.long),
    ("i2v2", "euler", "unipc"),
    ("ti2v", "dpm-2m", "euler"),
]


@pytest.mark.parametrize(("layout", "solver", "schedule"), CASES)
def test_the_code_samples_as_the_evaluation_does(
    layout: str, solver: str, schedule: str, runs: dict[str, Run], tmp_path: Path, monkeypatch: Any
) -> None:
    """Its own shift, steps, guidance of both experts and negative prompt, from the same noise."""
    sets = ["eval.shift=12.0", "eval.guidance_scale=1.5", "eval.guidance_scale_2=2.5", "eval.steps=5"]
    sets += [f'eval.solver="{solver}"', f'rollout.schedule="{schedule}"', 'rollout.negative_prompt="it\'s bad"']
    if layout == "ti2v":
        sets += ["rollout.height=32", "rollout.width=32"]
    run = Run.open(runs[layout].path, sets)
    code = code_of(card_of(run, tmp_path / "out"))
    assert ("guidance_scale=1.5, guidance_scale_2=2.5" in code) == (layout in ("t2v2", "i2v2"))
    assert 'negative_prompt="it\'s bad"' in code
    assert str(run.config.model.path) not in code
    video = run.config.rollout
    shape = Policy.of(run.config.model).layout.latent_shape(video.height, video.width, video.frames)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))
    image = IMAGE if layout == "i2v2" else None
    names = executed(run, code, tmp_path / "out", monkeypatch, noise=noise.clone(), image=image)
    expected = evaluated(run, noise, image)
    # Not bit for bit: for one row some processors' products depend on where in memory the weights of a file lie.
    rounding = 1e-5 if solver == "euler" else 1e-4
    torch.testing.assert_close(names["video"], expected[0], rtol=rounding, atol=rounding)
    assert (noise - expected).abs().max() > 0.1


def test_the_code_of_every_export_runs_as_it_stands(runs: dict[str, Run], tmp_path: Path, monkeypatch: Any) -> None:
    run = Run.open(runs["t2v2"].path, ["eval.steps=2"])
    noise = torch.randn(1, *Policy.of(run.config.model).layout.latent_shape(16, 16, 5))
    found = []
    for name, options in {"lora": {}, "native": {"format": "comfyui"}, "fused": {"fuse": True}}.items():
        code = code_of(card_of(run, tmp_path / name, **options))
        names = executed(run, code, tmp_path / name, monkeypatch, noise=noise.clone())
        found.append(names["video"])
        assert hasattr(names["pipe"].transformer_2, "peft_config") == (name != "fused")
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_the_vae_in_fp32(tiny_t2v: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = Run.open(trained(tmp_path / "run", tiny_t2v, "bfloat16").path, ["eval.steps=2"])
    noise = torch.randn(1, *Policy.of(run.config.model).layout.latent_shape(16, 16, 5))
    code = code_of(card_of(run, tmp_path / "out"))
    pipe = executed(run, code, tmp_path / "out", monkeypatch, noise=noise)["pipe"]
    assert (pipe.vae.dtype, pipe.transformer.proj_out.weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("second", ["", pytest.param("none", marks=pytest.mark.long)])
def test_a_lora_beneath_is_named_and_fused(second: str, tiny_t2v2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for seed, side in enumerate(("high", "low")):
        tensors = forms.native(tiny_transformer(1), seed, alpha=2.0)
        forms.write(tmp_path / "few" / f"{side}_noise.safetensors", tensors)
    first = tmp_path / "few" / "high_noise.safetensors" if second else tmp_path / "few"
    settings = {"base_lora": str(first), "base_lora_2": second}
    run = Run.open(trained(tmp_path / "run", tiny_t2v2, **settings).path, ["eval.steps=3"])
    report = export(run, 1, tmp_path / "out")
    assert re.search(
        r"with the base LoRA fused by diffusers, as in the code below, .* by at most \d\.\de-0[5-9]", report.checked
    )
    record = read_json(tmp_path / "out" / "export.json")
    assert record["base"] != record["model"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    sha256 = record["base_lora"]["files"]["high_noise"]["weights"]
    assert f"- Base LoRA, **needed beneath it**: `high_noise.safetensors` (high_noise, sha256 `{sha256[:16]}`)" in card
    assert ("`low_noise.safetensors`" in card) == (not second)
    assert str(tmp_path) not in card
    for path in (tmp_path / "few").iterdir():
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    noise = torch.randn(1, *Policy.of(run.config.model).layout.latent_shape(16, 16, 5))
    names = executed(run, code_of(card), tmp_path / "out", monkeypatch, noise=noise.clone())
    torch.testing.assert_close(names["video"], evaluated(run, noise)[0], rtol=1e-4, atol=1e-4)

    fused = card_of(run, tmp_path / "fused", fuse=True)
    assert "- Base LoRA, merged in: `high_noise.safetensors`" in fused
    names = executed(run, code_of(fused), tmp_path / "fused", monkeypatch, noise=noise.clone())
    torch.testing.assert_close(names["video"], evaluated(run, noise)[0], rtol=1e-4, atol=1e-4)
    comfyui = card_of(run, tmp_path / "comfyui", format="comfyui")
    assert "Before it, load the base LoRA (`high_noise.safetensors`" in comfyui


def test_a_lora_beneath_that_diffusers_does_not_read_is_said(tiny_t2v: Path, tmp_path: Path) -> None:
    tensors = forms.renamed(forms.native(tiny_transformer(1), 1), (".weight", ".default.weight"))
    file = forms.write(tmp_path / "few.safetensors", tensors)
    card = card_of(trained(tmp_path / "run", tiny_t2v, base_lora=str(file)), tmp_path / "out")
    assert "# fuse few.safetensors here: diffusers does not read it as it is; `rushes export --fuse` merges it" in card


def test_the_card_says_what_it_is(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs["t2v2"], tmp_path / "out"
    card = card_of(run, out)
    record = read_json(out / "export.json")
    assert f"- Base model: `t2v2`, fingerprint `{record['model'][:16]}`" in card
    assert run.config.model.path not in card
    assert str(tmp_path) not in card
    assert "`ocr` × 1" in card
    assert "| 0 | - | 0.2500 ± 0.0500 (100 videos) |\n| 1 | - | 0.7500 ± 0.0500 (100 videos) |" in card
    assert "trained with GRPO by rushes, in the format of plain diffusers" in card
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags: [lora]\n---\n")
    curve = ElementTree.fromstring((out / "reward.svg").read_text(encoding="utf-8"))
    shown = [one.attrib["data-tip"] for one in curve.iter() if "data-tip" in one.attrib]
    assert shown == [
        "evaluation, iterations trained 0: 0.25, 0.2 to 0.3",
        "evaluation, iterations trained 1: 0.75, 0.7 to 0.8",
    ]
    assert "![mean reward by iterations trained](reward.svg)" in card
    nft = Run.open(run.path, ['train.objective="nft"'])
    assert "trained with DiffusionNFT" in card_of(nft, tmp_path / "nft")


def test_the_card_for_comfyui(runs: dict[str, Run], tmp_path: Path) -> None:
    run = Run.open(runs["t2v2"].path, ["eval.steps=20", "eval.shift=5.0", "rollout.guidance_scale_2=3.5"])
    card = card_of(run, tmp_path / "out", format="comfyui")
    assert "with the keys of ComfyUI" in card
    assert (
        "- `t2v2_high_noise.safetensors` behind the high-noise model\n"
        "- `t2v2_low_noise.safetensors` behind the low-noise model\n" in card
    )
    assert (
        "Nearest to the evaluation are the sampler `euler` with the scheduler `simple`, 20 steps (the first 9 with the "
        "high-noise model and cfg 2, the others with the low-noise model and cfg 3.5), and shift 5 (`ModelSamplingSD3`)"
        in card
    )
    one = card_of(runs["t2v"], tmp_path / "one", format="comfyui")
    assert "- `t2v.safetensors`\n" in one
    assert "4 steps (cfg 2), and shift 3" in one


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("hf://Wan-AI/Wan2.2-T2V-A14B-Diffusers@main/sub", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("/home/me/models/Wan2.2-T2V-A14B-Diffusers/", "Wan2.2-T2V-A14B-Diffusers"),
        ("~/.cache/huggingface/hub/models--Wan-AI--Wan2.2/snapshots/0123", "Wan-AI/Wan2.2"),
        ("s3://bucket/private/models/wan", "wan"),
        ("words", "words"),
    ],
)
def test_the_public_name_of_a_model(path: str, name: str) -> None:
    assert public_name(path) == name
