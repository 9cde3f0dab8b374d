"""Predicted memory against known sizes of Wan and what really is alive; and the plan shown without a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from rollout import memory
from rollout.generate import rollout
from rollout.policy_lora import add_adapter
from rollout.policy_sizes import (
    Pass,
    _pass,
    decode_bytes,
    expert_size,
    peak_bytes,
    text_parameters,
    vae_parameters,
    working_bytes,
)
from rollout.preview import preview
from shards.errors import UserError
from shards.reader import open_shard
from shards.run import Run
from tests.tiny_models import tiny_transformer, tiny_vae
from tests.training import make_run

GIB = 2**30
COMMON = {
    "attention_head_dim": 128,
    "patch_size": [1, 2, 2],
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16, "out_channels": 16},
    "A14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16},
    "I2V-A14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 36, "out_channels": 16},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}


@pytest.mark.parametrize(
    ("name", "parameters", "bfloat16", "full", "lora"),
    [
        ("1.3B", 1.419e9, 2.6, 21, 44e6),
        ("A14B", 14.288e9, 26.6, 213, 153e6),
        ("I2V-A14B", 14.289e9, 26.6, 213, 153e6),
        ("5B", 5.000e9, 9.3, 75, 81e6),
    ],
)
def test_sizes_of_the_family(name: str, parameters: float, bfloat16: float, full: float, lora: float) -> None:
    size = expert_size({**COMMON, **CONFIGS[name]}, rank=32)
    assert abs(size.parameters - parameters) < 0.6e6
    assert round(memory.weight_bytes(size.parameters, "bfloat16") / GIB, 1) == bfloat16
    assert round(memory.trainer_bytes(size.parameters, full=True) / GIB) == full
    assert abs(size.lora - lora) < 0.6e6
    assert 0 < size.kept < 0.03 * size.parameters


@pytest.mark.parametrize(
    ("name", "shape", "count", "state", "inputs"),
    [
        ("A14B", (16, 21, 60, 104), 32760, 4.0, 12.5),
        ("A14B", (16, 21, 90, 160), 75600, 9.2, 28.8),
        ("1.3B", (16, 21, 60, 104), 32760, 4.0, 2.8),
        ("1.3B", (16, 9, 60, 104), 14040, 1.7, 1.2),
        ("5B", (48, 31, 44, 80), 27280, 10.0, 4.7),
    ],
)
def test_tokens_states_and_block_inputs(name: str, shape: Any, count: int, state: float, inputs: float) -> None:
    size = expert_size({**COMMON, **CONFIGS[name]}, rank=1)
    assert memory.tokens(shape, (1, 2, 2)) == count
    assert round(memory.state_bytes(shape, "bfloat16") / 2**20, 1) == state
    assert round(memory.block_input_bytes(count, size, "bfloat16") / GIB, 1) == inputs


def test_encoder_and_decoder_sizes() -> None:
    umt5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    assert round(text_parameters(umt5) / 1e9, 3) == 5.681
    assert round(vae_parameters({}) / 1e9, 3) == 0.127


@pytest.mark.parametrize(("train", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_the_prediction_is_what_a_real_pass_holds(train: bool, checkpointing: bool) -> None:
    config = {**dict(tiny_transformer(1).config), "num_layers": 4}
    rank = 2 if train else 0
    run = Pass((16, 3, 8, 8), 2, 24, "float32", guided=True, rank=rank, train=train, checkpointing=checkpointing)
    module: Any = WanTransformer3DModel.from_config(config).requires_grad_(False)
    if train:
        add_adapter(module, rank, rank, 0)
    if checkpointing:
        module.enable_gradient_checkpointing()
    real = peak_bytes(lambda: _pass(module, config, run), module)
    assert working_bytes(config, run) == pytest.approx(real, rel=0.1)


def test_checkpointing_needs_less_and_more_tokens_need_more() -> None:
    config = {**dict(tiny_transformer(1).config), "num_layers": 8}
    kept = Pass((16, 3, 8, 8), 1, 24, "bfloat16", guided=False, rank=2, train=True)
    recomputed = replace(kept, checkpointing=True)
    assert working_bytes(config, recomputed) < working_bytes(config, kept) / 2
    larger = working_bytes(config, replace(kept, shape=(16, 3, 16, 16)))
    assert larger == pytest.approx(4 * working_bytes(config, kept), rel=0.35)


def test_decoding_is_predicted_from_three_latent_frames() -> None:
    config = dict(tiny_vae(False).config)
    vae = AutoencoderKLWan.from_config(config).requires_grad_(False)
    latents = torch.zeros(1, 16, 6, 8, 8)
    with torch.no_grad():
        real = peak_bytes(lambda: vae.decode(latents, return_dict=False)[0], vae)
    assert decode_bytes(config, (16, 6, 8, 8)) == pytest.approx(real, rel=0.15)


def test_a_run_is_planned_from_its_configurations(tiny_t2v2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_t2v2, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")  # no weight is read
    run = make_run(tmp_path / "run", folder)
    needs = {need.stage: need for need in memory.plan_memory(run)}
    size = expert_size(dict(tiny_transformer(1).config), rank=2)
    assert needs["rollout"].parts["weights"] == size.parameters * 4
    assert needs["rollout"].device == sum(needs["rollout"].parts.values())
    assert needs["rollout"].host > 2 * size.parameters * 4
    assert needs["train LoRA, checkpointing"].parts["trainer"] == size.lora * 24
    assert needs["train LoRA, checkpointing"].device < needs["train LoRA, no checkpointing"].device
    text = memory.render(run, list(needs.values()))
    (marked,) = [line for line in text.splitlines() if line.startswith("* train")]
    assert marked.startswith("* train LoRA, no checkpointing")


@pytest.fixture
def dry(tiny_t2v2: Path, tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", tiny_t2v2, groups_per_shard=1)


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_the_preview_shows_the_plan_and_writes_nothing(dry: Run) -> None:
    before = everything(dry.path)
    text = preview(dry, dry.iteration(0))
    assert everything(dry.path) == before
    lines = text.splitlines()
    assert lines[0].split() == [
        "step",
        "sigma",
        "t",
        "expert",
        "guidance",
        "law",
        "std",
        "trained",
        "gradient",
        "share",
    ]
    rows = [line.split() for line in lines[1:7]]
    assert [row[0] for row in rows] == list("012345")
    assert {row[3] for row in rows} == {"high_noise", "low_noise"}
    trained = [row for row in rows if row[7] == "yes"]
    assert [row[3] for row in trained].count("high_noise") == 1
    assert [row[3] for row in trained].count("low_noise") == 2
    assert sum(float(row[8]) for row in trained) == pytest.approx(2.0, abs=0.003)  # 1 for each expert
    assert "videos: 6 (2 prompts, 3 each)" in lines
    assert "shards: 2" in lines


def test_the_preview_is_what_the_rollout_does(dry: Run) -> None:
    text = preview(dry, dry.iteration(0))
    stage = dry.iteration(0)
    rollout(dry, stage)
    plan = stage.plan()
    assert plan is not None
    window = ", ".join(map(str, plan["groups"][0]["window"]))
    assert f"steps {window}" in text
    shards = [open_shard(stage, number) for number in stage.shards()]
    stored = [shard.trajectory(key)["latents"] for shard in shards for key in shard.keys]
    assert f"bytes of latents: {sum(latents.nbytes for latents in stored)} " in text


def test_the_preview_refuses_what_the_rollout_would(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tiny_t2v2, guidance_scale_2=None)
    with pytest.raises(UserError, match="guidance_scale_2"):
        preview(run, run.iteration(0))
    run = make_run(tmp_path / "b", tiny_t2v2, frames=6)
    with pytest.raises(UserError, match="not 4k"):
        preview(run, run.iteration(0))
    run = make_run(tmp_path / "c", tiny_t2v2)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline"):
        preview(Run.open(run.path, [f"model.path={tmp_path / 'foreign'}"]), run.iteration(0))
