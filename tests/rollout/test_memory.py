"""Predicted memory against known sizes of Wan and what really is alive; and the plan shown without a model."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from typer.testing import CliRunner

import cli
from rollout.lora.adapter import add_adapter, merge_at_calls
from rollout.memory import estimate as memory_model
from rollout.memory import needs as memory_needs
from rollout.policy import Policy
from rollout.policy.folder import find_folder, read_layout, tokens
from rollout.policy.sizes import (
    ExpertSize,
    Pass,
    decode_peak,
    expert_size,
    pass_bytes,
    peak_bytes,
    text_parameters,
    vae_parameters,
    working_bytes,
)
from rollout.preview import gradient_shares, preview
from rollout.run import rollout
from shards.errors import UserError
from shards.reader import open_shard
from shards.run import Run
from tests.support import lora_forms
from tests.support.shard_fixtures import make_plan, plan_of
from tests.support.tiny_models import tiny_transformer, tiny_vae
from tests.support.training import make_run

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
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE22 = {
    "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}


@functools.cache
def size_of(name: str) -> ExpertSize:
    """The counted size of a full-size transformer with an adapter of rank 32."""
    return expert_size({**COMMON, **CONFIGS[name]}, rank=32)


def write_configs(folder: Path, name: str, **index: Any) -> Path:
    """A full-size model folder of which only the configurations are there: no weight, no tokenizer."""
    parts = ["tokenizer", "text_encoder", "vae", "scheduler", "transformer"]
    parts += ["transformer_2"] if "boundary_ratio" in index else []
    transformer = {**COMMON, **CONFIGS[name]}
    vae = VAE22 if name == "5B" else {}
    files = {
        "model_index.json": {"_class_name": "WanPipeline", **{part: ["x", "y"] for part in parts}, **index},
        "text_encoder/config.json": UMT5,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": SCHEDULER,
        "transformer/config.json": transformer,
    }
    for path, values in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values), encoding="utf-8")
    return folder


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
    size = size_of(name)
    assert abs(size.parameters - parameters) < 0.6e6
    assert round(memory_model.weight_bytes(size.parameters, "bfloat16") / GIB, 1) == bfloat16
    state = memory_model.full_state(size.parameters, size.kept, "bfloat16", average=False)
    assert round((sum(state.values()) + 4 * size.kept) / GIB) == full  # what is fp32 is its own master
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
    size = size_of(name)
    assert tokens(shape, (1, 2, 2)) == count
    assert round(memory_model.state_bytes(shape, "bfloat16") / 2**20, 1) == state
    assert round(memory_model.block_input_bytes(count, size, "bfloat16") / GIB, 1) == inputs


def test_encoder_and_decoder_sizes() -> None:
    assert round(text_parameters(UMT5) / 1e9, 3) == 5.681
    assert round(vae_parameters({}) / 1e9, 3) == 0.127
    assert round(vae_parameters(VAE22) / 1e9, 3) == 0.705


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": True, "rank": 2},
        {"train": True, "rank": 2, "checkpointing": True, "reference": True},
        {"train": True, "checkpointing": True},
        {"train": True, "rank": 2, "checkpointing": True, "per_token": True},
        {"train": True, "checkpointing": True, "apart": True},
        {"train": True, "rank": 2, "merge_lora": True},
    ],
    ids=[
        "rollout",
        "LoRA",
        "LoRA, checkpointing, KL",
        "all weights",
        "a timestep per token",
        "all weights on ranks",
        "LoRA in the weights",
    ],
)
def test_the_prediction_is_what_a_real_pass_holds(settings: dict[str, Any]) -> None:
    config = {**dict(tiny_transformer(1).config), "num_layers": 9}
    run = Pass((16, 3, 8, 8), 2, 24, "float32", guided=True, **settings)
    module: Any = WanTransformer3DModel.from_config(config).requires_grad_(run.train and not run.rank)
    if run.rank:
        add_adapter(module, run.rank, run.rank, 0)
        merge_at_calls(module, run.merge_lora)
    if run.checkpointing:
        module.enable_gradient_checkpointing()
    assert working_bytes(config, run) == pytest.approx(pass_bytes(module, config, run), rel=0.01)


@pytest.mark.long
def test_a_timestep_per_token_and_the_reference_cost_something() -> None:
    config = dict(tiny_transformer(1).config)
    run = Pass((16, 3, 8, 8), 2, 24, "float32", guided=True, rank=2, train=True)
    plain = working_bytes(config, run)
    assert working_bytes(config, replace(run, per_token=True)) > 1.2 * plain
    saving = replace(run, checkpointing=True)
    assert working_bytes(config, replace(saving, reference=True)) >= working_bytes(config, saving)
    several = {**config, "num_layers": 12}
    forward = working_bytes(several, replace(run, train=False))
    held = working_bytes(several, replace(run, reference=True)) - working_bytes(several, run)
    assert 0 <= held <= forward


def test_checkpointing_needs_less_and_more_tokens_need_more() -> None:
    config = {**dict(tiny_transformer(1).config), "num_layers": 8}
    kept = Pass((16, 3, 8, 8), 1, 24, "bfloat16", guided=False, rank=2, train=True)
    recomputed = replace(kept, checkpointing=True)
    assert working_bytes(config, recomputed) < working_bytes(config, kept) / 2
    larger = working_bytes(config, replace(kept, shape=(16, 3, 16, 16)))
    assert larger == pytest.approx(4 * working_bytes(config, kept), rel=0.35)


@pytest.mark.parametrize("videos", [1, 3])
def test_decoding_is_predicted_from_three_latent_frames(videos: int) -> None:
    config = dict(tiny_vae(False).config)
    vae = AutoencoderKLWan.from_config(config).requires_grad_(False)
    latents = torch.zeros(videos, 16, 6, 8, 8)
    with torch.no_grad():
        real = peak_bytes(lambda: vae.decode(latents, return_dict=False)[0], vae)
    assert decode_peak(config, (16, 6, 8, 8), videos).alive == pytest.approx(real, rel=0.15)


def test_a_run_is_planned_from_its_configurations(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_t2v2)
    needs = {need.stage: need for need in memory_needs.plan_memory(run)}
    size = expert_size(dict(tiny_transformer(1).config), rank=2)
    assert needs["rollout"].parts["weights"] == size.parameters * 4
    assert all(need.device == sum(need.parts.values()) for need in needs.values())
    assert needs["rollout"].host > 2 * size.parameters * 4
    lora = needs["train LoRA, checkpointing"]
    names = ("LoRA", "gradients", "AdamW", "average", "weights of the rollout")
    assert [lora.parts[name] / size.lora for name in names] == [4, 4, 8, 4, 4]
    assert lora.device < needs["train LoRA, no checkpointing"].device
    text = memory_needs.render(run, list(needs.values()))
    (marked,) = [line for line in text.splitlines() if line.startswith("* train")]
    assert marked.startswith("* train LoRA, no checkpointing")


def test_the_trainer_state_is_what_training_holds(tiny_t2v: Path) -> None:
    from train.weights import Masters

    policy = Policy.load(tiny_t2v, dtype="bfloat16", device="cpu")
    size = expert_size(dict(tiny_transformer(1).config), rank=2)
    module = policy.experts.module(0)
    held = sum(value.nbytes for value in module.parameters())
    assert held == memory_model.weight_bytes(size.parameters, "bfloat16", size.kept)
    module.requires_grad_(True)
    masters = Masters(dict(policy.experts.trainable(0)))
    apart = [master for name, master in masters.parameters.items() if master is not masters.weights[name]]
    state = memory_model.full_state(size.parameters, size.kept, "bfloat16", average=True)
    assert state["fp32 masters"] == sum(master.nbytes for master in apart)
    optimizer = torch.optim.AdamW(masters.parameters.values())
    for master in masters.parameters.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    moments = [value[name] for value in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert state["AdamW"] == sum(moment.nbytes for moment in moments)
    assert state["gradients"] == sum(
        master.grad.nbytes for master in masters.parameters.values() if master.grad is not None
    )
    assert state["average"] == 4 * size.parameters


def config_run(path: Path, preset: str, model: Path, *sets: str) -> Path:
    """A run of a preset on a model that is only configurations, made by `rushes init`."""
    prompts = path.parent / "prompts.txt"
    prompts.write_text("".join(f'sign {number} says "FILM"\n' for number in range(16)), encoding="utf-8")
    settings = [f"model.path={model}", f"rollout.prompts={prompts}", f"eval.prompts={prompts}", *sets]
    call("init", path, "--preset", preset, *(part for value in settings for part in ("--set", value)))
    return path


def call(*arguments: object) -> str:
    """Run a command of the real command line in this process; its stdout."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def planned(output: str) -> dict[str, tuple[float, float]]:
    """(device GiB, host GiB) by stage, off the printed table."""
    rows = [line[2:] for line in output.splitlines()[1:8]]
    return {row[:36].strip(): (float(row[36:47]), float(row[47:57])) for row in rows}


@pytest.mark.long
def test_plan_memory_of_a14b_from_configurations_alone(tmp_path: Path) -> None:
    model = write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875)
    output = call("plan-memory", config_run(tmp_path / "run", "wan22-a14b", model))
    needs = planned(output)
    weights = memory_model.weight_bytes(size_of("A14B").parameters, "bfloat16", size_of("A14B").kept) / GIB
    assert needs["encode prompts"][0] == pytest.approx(10.58, abs=0.02)  # UMT5-xxl in bfloat16
    assert weights < needs["rollout"][0] < weights + 6
    assert needs["rollout"][1] > 2 * weights + 10.58
    # 2 bytes of weights and 20 of fp32 state a weight, before any activation
    assert needs["train all weights, checkpointing"][0] > 22 * size_of("A14B").parameters / GIB * 0.99
    assert needs["train all weights, checkpointing"][1] > 5 * weights
    assert needs["train LoRA, checkpointing"][0] < needs["train LoRA, no checkpointing"][0]
    assert "* train LoRA, checkpointing" in output
    assert "block inputs" in output


@pytest.mark.long
def test_kl_and_average_change_the_plan(tmp_path: Path) -> None:
    model = write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875)
    run = config_run(tmp_path / "run", "wan22-a14b", model, "train.full=true", "train.gradient_checkpointing=false")
    name = "train all weights, no checkpointing"
    with_both = {need.stage: need for need in memory_needs.plan_memory(Run.open(run))}[name]
    without = memory_needs.train_need(Run.open(run, ["train.kl_beta=0.0", "train.ema=0"]))
    parameters = size_of("A14B").parameters
    assert with_both.parts["average"] == 4 * parameters
    assert with_both.device - without.device == 4 * parameters
    answers = 2 * 2 * 16 * 16 * memory_model.state_bytes((16, 4, 60, 104), "float32")
    weights = memory_model.weight_bytes(parameters, "bfloat16", size_of("A14B").kept)
    # averages wait in the dtype of the model, both experts'; in a checkpoint's copy they are fp32
    assert with_both.host - without.host == 2 * weights + 4 * parameters + answers
    # two of the base, the other expert, the rollout's, a moment the trained ones; a checkpoint and one of its files
    assert without.host == 5 * weights + 12 * parameters + 2**31


def test_ranks_share_weights_and_their_states(tmp_path: Path) -> None:
    run = config_run(tmp_path / "run", "wan22-a14b", write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875))
    model, size = memory_model.read_model(Run.open(run).config), size_of("A14B")
    lora, full = (memory_needs.train_need(Run.open(run, [f"train.full={every}"]), 8) for every in ("false", "true"))
    assert lora.parts["weights"] == model.weights // 8
    states = [full.parts[name] for name in ("weights", "gradients", "AdamW", "average")]
    assert states == [number * size.parameters // 8 for number in (4, 4, 8, 4)]
    layers = [one.parts["gathered layers"] for one in (lora, full)]
    block = memory_model.weight_bytes(size.block, "bfloat16", size.block_kept)
    ends, adapter = model.weights - 40 * block, 4 * model.size.lora // 40
    assert layers == [ends + 2 * (block + adapter) + adapter, ends + 2 * block + block + 4 * size.block]
    # a checkpoint's copy, masters of the other expert, of the rollout and of a moment, the base model of both experts
    shared = (16 + 3 * 4) * size.parameters + 2 * model.weights
    assert full.host > shared / 8 + 2 * model.weights  # and both averages, whole
    together = memory_needs.train_need(Run.open(run, ["train.ulysses=4", "train.replicate=2"]), 8)
    assert together.parts["weights"] == model.weights // 4
    assert together.parts["working"] == pytest.approx(lora.parts["working"] / 4, rel=1e-3)
    assert "first of 8 ranks" in memory_needs.render(Run.open(run), [], 8)


@pytest.mark.parametrize(("sets", "ranks", "problem", "hint"), [
    ([], -1, "--ranks -1: no number of ranks", "for example --ranks 8"),
    (["train.ulysses=3"], 8, "train.ulysses = 3: 8 ranks cannot be divided so",
     "1, 2, 4, 8 would do; torchrun --nproc-per-node N starts N ranks"),
    (["train.ulysses=16"], 0,
     "train.ulysses = 16: does not divide the 40 heads and 6240 tokens of this model and video size",
     "1, 2, 4, 8 would do with 16 ranks"),
    (["rollout.ulysses=3"], 0,
     "rollout.ulysses = 3: does not divide the 40 heads and 6240 tokens of this model and video size",
     "1 would do with 3 ranks"),
])  # fmt: skip
def test_ranks_that_cannot_be(sets: list[str], ranks: int, problem: str, hint: str, tmp_path: Path) -> None:
    run = config_run(tmp_path / "run", "wan22-a14b", write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875))
    with pytest.raises(UserError) as caught:
        call("plan-memory", run, "--ranks", ranks, *(part for value in sets for part in ("--set", value)))
    assert (caught.value.problem, caught.value.hint) == (problem, hint)


def test_ti2v_counts_a_timestep_for_every_token(tmp_path: Path) -> None:
    model = write_configs(tmp_path / "model", "5B", expand_timesteps=True)
    run = Run.open(config_run(tmp_path / "run", "wan22-ti2v-5b", model))
    found = memory_model.read_model(run.config)
    assert found.forward().per_token
    count = tokens(found.shape, (1, 2, 2))
    working = working_bytes(found.transformer, found.forward())
    without = working_bytes(found.transformer, replace(found.forward(), per_token=False))
    modulation = count * 6 * 3072 * found.forward().batch * 2  # shift, scale and gate of each half of a block, bf16
    assert working - without >= modulation


def test_the_embedded_model_is_planned_and_previewed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    call("init", run, "--preset", "words")
    output = call("plan-memory", run)
    assert len(planned(output)) == 7
    assert "device MiB" in output  # it is small
    output = call("rollout", run, "--dry-run")
    assert "videos: 128 (8 prompts, 16 each)" in output.splitlines()
    assert sorted(path.name for path in run.iterdir()) == ["run.toml"]


def test_a14b_is_previewed_from_configurations_alone(tmp_path: Path) -> None:
    model = write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875)
    run = config_run(tmp_path / "run", "wan22-a14b", model)
    lines = call("rollout", run, "--dry-run").splitlines()
    rows = [line.split() for line in lines[1:11]]
    assert [row[4] for row in rows] == ["4" if row[3] == "high_noise" else "3" for row in rows]
    assert [row[3] for row in rows].count("high_noise") == 5
    share = next(line for line in lines if line.startswith("share of the gradient"))
    high, low = (float(part.split()[-1]) for part in share.split(":")[1].split(","))
    assert high + low == pytest.approx(1.0, abs=0.002)
    assert 0 < low < 1
    assert "videos: 256 (16 prompts, 16 each)" in lines
    with pytest.raises(UserError, match="tokenizer"):  # a real rollout still wants them
        read_layout(find_folder(str(model)))


def test_shares_follow_the_scales() -> None:
    sampler = {
        "sigmas": [1.0, 0.875, 0.5, 0.0], "timesteps": [1000.0, 875.0, 500.0], "experts": [0, 0, 1],
        "guidance": [1.0, 1.0, 1.0], "law": "flow-sde", "form": "exact", "eta": 0.7, "solver": "euler",
    }  # fmt: skip
    content = make_plan(groups=1) | {"sampler": sampler}
    for window, shares in (([1], {"high_noise": 1.0, "low_noise": 0.0}), ([], {})):
        content["groups"][0]["window"] = window
        assert gradient_shares(plan_of(content)) == shares


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
    window = ", ".join(map(str, plan.groups[0].window))
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


@pytest.mark.long
def test_a_lora_to_start_from_counts_with_its_own_rank(tmp_path: Path) -> None:
    """Its file is read; the LoRA beneath is merged into the weights and takes no memory."""
    folder = write_configs(tmp_path / "model", "1.3B")
    shapes = {"to_q": (1536, 1536), "ffn.net.2": (1536, 8960)}
    tensors = {}
    for block in range(30):
        for layer, (outputs, inputs) in {"attn1.to_q": shapes["to_q"], "ffn.net.2": shapes["ffn.net.2"]}.items():
            tensors[f"transformer.blocks.{block}.{layer}.lora_A.weight"] = torch.ones(3, inputs)
            tensors[f"transformer.blocks.{block}.{layer}.lora_B.weight"] = torch.ones(outputs, 3)
    file = lora_forms.write(tmp_path / "a.safetensors", tensors)
    numbers = sum(value.numel() for value in tensors.values())
    settings = {"height": 240, "width": 416, "frames": 5}
    fresh = make_run(tmp_path / "fresh", folder, {"lora_rank": 3}, **settings)
    started = make_run(tmp_path / "started", folder, model={"lora": str(file)}, **settings)
    beneath = make_run(tmp_path / "beneath", folder, {"lora_rank": 3}, model={"base_lora": str(file)}, **settings)
    needs = {run.path.name: memory_needs.train_need(run) for run in (fresh, started, beneath)}
    assert needs["beneath"] == needs["fresh"]
    assert needs["started"].parts["LoRA"] == 4 * numbers < needs["fresh"].parts["LoRA"]
    assert needs["started"].parts["working"] == needs["fresh"].parts["working"]  # activations go by the rank
    assert needs["started"].parts["AdamW"] == 8 * numbers


def test_a_new_adapter_beside_a_lora_to_start_from_counts_where_it_is_larger(tiny_t2v2: Path, tmp_path: Path) -> None:
    """One file starts the high-noise expert; the low-noise expert gets an adapter of `train.lora_rank`."""
    file = lora_forms.write(tmp_path / "a.safetensors", lora_forms.native(tiny_transformer(1), 1))
    one, both = {"lora": str(file)}, {"lora": str(file), "lora_2": str(file)}

    def size(rank: int, model: dict[str, str]) -> int:
        run = make_run(tmp_path / f"{rank}-{len(model)}", tiny_t2v2, {"lora_rank": rank}, model=model)
        return memory_needs.train_need(run).parts["LoRA"]

    assert size(1, one) == size(1, both) < size(16, one) == size(16, {})
