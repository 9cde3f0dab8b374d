"""Traps of the Wan pipelines that were measured once and must stay shut: one test for each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from rollout.policy import Policy
from rollout.policy.folder import load_text
from rollout.schedule import make_schedule
from rollout.step import StepInputs, take_step
from shards.config import ModelConfig, RolloutConfig
from shards.errors import RunFailed, UserError
from shards.records.schedule import Schedule
from shards.run_toml import parse_config, read_preset
from tests.support import training
from tests.support.tiny_models import TEXT_LENGTH


def load(folder: Path, **options: Any) -> Policy:
    return Policy.load(folder, device="cpu", **({"text_length": TEXT_LENGTH} | options))


@pytest.fixture(scope="module")
def policies(tiny_t2v: Path, tiny_t2v2: Path, tiny_i2v2: Path) -> dict[str, Policy]:
    return {"t2v": load(tiny_t2v), "t2v2": load(tiny_t2v2), "i2v2": load(tiny_i2v2)}


def seen_by(module: Any) -> list[tuple[Any, ...]]:
    """Collects the arguments of every forward of a module from now on."""
    calls: list[tuple[Any, ...]] = []
    module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    return calls


def latents(policy: Policy, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *policy.layout.latent_shape(16, 16, 5), generator=torch.Generator().manual_seed(0))


def test_text_has_512_tokens_and_not_the_226_of_encode_prompt(tiny_t2v: Path) -> None:
    for name in ("wan21-1.3b", "wan21-14b", "wan22-a14b", "wan22-i2v", "wan22-ti2v-5b"):
        assert parse_config(read_preset(name), name).model.text_length == 512
    policy = load(tiny_t2v, text_length=ModelConfig().text_length)
    (embeds,) = policy.text.encode(["x" * 400])  # a token a byte, and one at the end
    assert embeds.shape[0] == 401
    assert policy.text.pad(embeds, 2).shape[:2] == (2, 512)
    (cut,) = policy.text.encode(["x" * 600])
    assert cut.shape[0] == 512


@pytest.mark.parametrize(
    ("boundary", "shift", "steps", "once", "twice"),
    [(0.875, 12.0, 40, 0.2424, 0.1260), (0.9, 5.0, 40, 0.1177, 0.0244), (0.875, 12.0, 10, 0.5739, 0.1260)],
)
def test_the_shift_is_applied_once(boundary: float, shift: float, steps: int, once: float, twice: float) -> None:
    """FlowMatchEuler shifts its smallest sigma, cuts the line there, and shifts again; only `euler` may do that."""
    last = {}
    for schedule in ("shifted", "unipc", "euler"):
        config = RolloutConfig(steps=steps, shift=shift, schedule=schedule, guidance_scale_2=3.0)  # type: ignore[arg-type]
        last[schedule] = make_schedule(config, boundary=boundary, scheduler_config={}).sigmas[-2]
    assert (last["shifted"], last["unipc"], last["euler"]) == pytest.approx((once, once, twice), abs=2e-4)


def test_the_first_sigma_of_unipc_does_not_blow_up_the_noise() -> None:
    """UniPC begins at 1 - 1e-6: sqrt(s / (1-s)) alone would be a thousand there."""
    config = RolloutConfig(steps=20, shift=5.0, schedule="unipc", first_step=0, eta=0.7)
    plan = make_schedule(config, boundary=None, scheduler_config={})
    assert 0.99999 < plan.sigmas[0] < 1
    from rollout.schedule import describe

    assert 0.5 < describe(plan, (0,))[0]["std"] < 0.8


def test_the_model_is_given_the_fraction_of_a_timestep(policies: dict[str, Policy]) -> None:
    """A scheduler that casts its timesteps to integers conditions the model on up to 1 less."""
    policy = policies["t2v"]
    plan = make_schedule(RolloutConfig(steps=7, shift=3.0, guidance_scale=1.0), boundary=None, scheduler_config={})
    assert any(t != int(t) for t in plan.timesteps)
    calls = seen_by(policy.experts.module(0))
    prompt = policy.text.pad(policy.text.encode(["a"])[0], 1)
    with torch.no_grad():
        for step in range(plan.steps):
            take_step(policy, plan, step, StepInputs(latents(policy), prompt, prompt), None, torch.float32)
    assert [float(call[1]) for call in calls] == list(plan.timesteps)
    assert {call[1].dtype for call in calls} == {torch.float32}


def test_text_encoders_that_came_out_zero_are_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_t2v, tmp_path / "model")
    policy = load(model)
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    tables = [name for name in weights if name in ("shared.weight", "encoder.embed_tokens.weight")]
    assert tables
    save_file(
        {name: torch.zeros_like(w) if name in tables else w for name, w in weights.items()}, file, {"format": "pt"}
    )
    with pytest.raises(RunFailed, match=r"the token embeddings were not loaded.*upgrade transformers"):
        load_text(policy.layout, "float32", policy.device)
    lost = "encoder.final_layer_norm.weight"
    save_file({name: w for name, w in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"text_encoder: its files have no {lost} "):
        load_text(policy.layout, "float32", policy.device)  # transformers draws it at random


def test_bfloat16_is_loaded_as_diffusers_loads_it_and_never_cast(tiny_t2v2: Path) -> None:
    policy = load(tiny_t2v2, dtype="bfloat16")
    for expert, name in ((0, "transformer"), (1, "transformer_2")):
        plain = WanTransformer3DModel.from_pretrained(tiny_t2v2 / name, torch_dtype=torch.bfloat16)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(policy.experts.module(expert), kind)()), dict(getattr(plain, kind)())
            assert ours.keys() == theirs.keys()
            assert {key: value.dtype for key, value in ours.items()} == {k: v.dtype for k, v in theirs.items()}
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {value.dtype for value in policy.experts.module(0).parameters()} == {torch.float32, torch.bfloat16}
    assert all(buffer.dtype != torch.bfloat16 for buffer in policy.experts.module(0).buffers())  # the rotary table


def test_fresh_adapters_are_fp32_on_a_bfloat16_model(tiny_t2v2: Path) -> None:
    policy = load(tiny_t2v2, dtype="bfloat16")
    policy.experts.add_lora(2, 4.0, 0)
    for expert in policy.layout.expert_ids:
        assert {parameter.dtype for _, parameter in policy.experts.trainable(expert)} == {torch.float32}


def test_guidance_is_that_of_each_expert(policies: dict[str, Policy]) -> None:
    """WanPipeline drops guidance on both experts when that of the first is 1, whatever the second one's is."""
    policy = policies["t2v2"]
    config = RolloutConfig(steps=6, shift=5.0, guidance_scale=1.0, guidance_scale_2=3.0)
    plan = make_schedule(config, boundary=policy.layout.boundary, scheduler_config={})
    prompt, negative = (policy.text.pad(embeds, 1) for embeds in policy.text.encode(["a sign", "bad"]))
    calls = {expert: seen_by(policy.experts.module(expert)) for expert in (0, 1)}
    x = latents(policy)
    with torch.no_grad():
        for step in (0, plan.steps - 2):
            expert, t = plan.experts[step], plan.timesteps[step]
            velocity = policy.velocity(expert, x, t, prompt, negative, plan.guidance[step])
            both = [policy.velocity(expert, x, t, one, None, 1.0) for one in (prompt, negative)]
            expected = both[0] if expert == 0 else both[1] + 3.0 * (both[0] - both[1])
            assert torch.equal(velocity, expected)
    assert (len(calls[0]), len(calls[1])) == (1 + 2, 2 + 2)


def test_a_batch_does_not_repeat_its_image(
    policies: dict[str, Policy], tiny_i2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is encoded once a group, stored once, and spread over the batch only at the model's door."""
    policy = policies["i2v2"]
    run = training.make_run(tmp_path / "run", tiny_i2v2, image=True, group_size=4, batch_size=3, low_steps=1)
    encoded: list[Any] = []
    original = policy.vae.encode_image
    monkeypatch.setattr(policy.vae, "encode_image", lambda *given: encoded.append(given) or original(*given))
    calls = seen_by(policy.experts.module(0))
    stage = training.roll(run, 0, policy)
    assert len(encoded) == run.config.rollout.prompts_per_iteration
    assert {tuple(call[0].shape[:2]) for call in calls} == {(3, 36), (1, 36)}
    from shards.reader import open_shard

    shard = open_shard(stage, 0)
    condition = shard.group(shard.groups[0])["condition"]
    assert tuple(condition.shape) == (1, 20, *policy.layout.latent_shape(16, 16, 5)[1:])
    three = next(call[0] for call in calls if call[0].shape[0] == 3)
    assert all(torch.equal(three[row, 16:], condition[0]) for row in range(3))


def decoded_latents(vae: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collects what a VAE is given to decode."""
    given: list[torch.Tensor] = []
    original = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, *rest, **more: given.append(z) or original(z, *rest, **more))
    return given


@pytest.mark.parametrize("layout", ["t2v", "ti2v"])
def test_the_vae_is_given_the_very_bits_that_the_pipeline_gives_it(
    layout: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline divides by 1/std; a multiplication by std rounds otherwise, too little for the eye of a uint8."""
    folder = request.getfixturevalue(f"tiny_{layout}")
    policy = load(folder)
    config, size = policy.vae._vae.config, 4 * policy.layout.spatial_scale
    x = torch.randn(1, config.z_dim, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    pipe = WanPipeline.from_pretrained(folder, disable_mmap=True)
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = decoded_latents(policy.vae._vae, monkeypatch), decoded_latents(pipe.vae, monkeypatch)
    policy.vae.decode(x)
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: (x,))  # the pipeline ends with these latents
    pipe(prompt="a", height=size, width=size, num_frames=5, num_inference_steps=1, guidance_scale=1.0,
         max_sequence_length=TEXT_LENGTH)  # fmt: skip
    assert len(ours) == len(theirs) == 1
    assert torch.equal(ours[0], theirs[0])
    if layout == "t2v":  # whose deviations are Wan's own
        std, mean = (torch.tensor(getattr(config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("std", "mean"))
        assert not torch.equal(x * std + mean, theirs[0])  # so another order would be seen


def test_the_boundary_is_compared_on_the_scale_of_timesteps() -> None:
    """0.875 against 0 to 1000 would send every step to the high-noise expert."""
    config = RolloutConfig(steps=10, shift=5.0, guidance_scale_2=3.0)
    plan: Schedule = make_schedule(config, boundary=0.875, scheduler_config={})
    assert plan.experts == (0,) * 5 + (1,) * 5
