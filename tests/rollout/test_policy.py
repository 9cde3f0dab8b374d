"""The policy: loaded from any Wan folder, sampled as WanPipeline samples, its LoRA exchanged with plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from rollout.policy import Policy
from rollout.policy.folder import find_folder
from rollout.step import StepInputs, step_log_prob, take_step
from shards.errors import UserError
from shards.records.schedule import Schedule
from tests.support.tiny_models import TEXT_LENGTH

STEPS = 4
SIZES = {"t2v": (32, 32, 9), "t2v2": (32, 32, 9), "i2v2": (32, 32, 9), "ti2v": (64, 64, 5)}
IMAGE = Image.fromarray((np.arange(64 * 64 * 3) % 251).reshape(64, 64, 3).astype("uint8"))


@pytest.fixture(scope="module")
def folders(tiny_t2v: Path, tiny_t2v2: Path, tiny_i2v2: Path, tiny_ti2v: Path) -> dict[str, Path]:
    return {"t2v": tiny_t2v, "t2v2": tiny_t2v2, "i2v2": tiny_i2v2, "ti2v": tiny_ti2v}


def load(folder: Path, **options: Any) -> Policy:
    return Policy.load(folder, device="cpu", text_length=TEXT_LENGTH, **options)


def make_plan(boundary: float | None, law: str = "ode") -> Schedule:
    sigmas = np.linspace(1, 1 / 1000, STEPS + 1)[:-1]
    sigmas = np.append(3 * sigmas / (1 + 2 * sigmas), 0).astype(np.float32)
    timesteps = sigmas[:-1] * np.float32(1000)
    experts = tuple(int(boundary is not None and t < boundary * 1000) for t in timesteps)
    guidance = tuple((4.0, 3.0)[expert] for expert in experts)
    eta = 0.0 if law == "ode" else 0.7
    return Schedule(tuple(sigmas.tolist()), tuple(timesteps.tolist()), experts, guidance, law, "exact", eta, "euler")


def plain(kind: type, folder: Path, plan: Schedule | None = None) -> Any:
    """A plain diffusers pipeline; with a plan its scheduler is Euler on the plan's own sigmas."""
    pipe = kind.from_pretrained(folder, disable_mmap=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()) if part is not None else ():
            tensor.data = tensor.data.clone()  # the alignment of weights moves the last bits of a product
    if plan is not None:
        scheduler = FlowMatchEulerDiscreteScheduler()
        original = scheduler.set_timesteps

        def set_timesteps(steps: int, device: Any = None) -> None:
            original(sigmas=np.linspace(1, 1 / 1000, steps).tolist(), device=device)
            scheduler.sigmas, scheduler.timesteps = torch.tensor(plan.sigmas), torch.tensor(plan.timesteps)

        scheduler.set_timesteps = set_timesteps
        pipe.scheduler = scheduler
        pipe.vae.enable_slicing()
    return pipe


def sample(policy: Policy, plan: Schedule, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
    prompt, negative = (policy.text.pad(embeds, len(x)) for embeds in policy.text.encode(["a cat walks", "bad"]))
    with torch.no_grad():
        for step in range(plan.steps):
            policy.experts.use(plan.experts[step])
            inputs = StepInputs(x, prompt, negative, condition)
            x = take_step(policy, plan, step, inputs, None, torch.float32).x
    return policy.impose(x, condition)


@pytest.mark.parametrize("case", ["t2v", "t2v2", "i2v2", "ti2v", "ti2v with image"])
def test_the_loop_equals_the_pipeline_bit_for_bit(case: str, folders: dict[str, Path]) -> None:
    layout, image = case.split()[0], case == "i2v2" or "image" in case
    height, width, frames = SIZES[layout]
    policy = load(folders[layout])
    plan = make_plan(policy.layout.boundary)
    assert len(set(plan.experts)) == len(policy.layout.expert_ids)
    pipe = plain(WanImageToVideoPipeline if image else WanPipeline, folders[layout], plan)
    noise = torch.randn(
        2, *policy.layout.latent_shape(height, width, frames), generator=torch.Generator().manual_seed(0)
    )
    options: dict[str, Any] = {
        "prompt": "a cat walks",
        "negative_prompt": "bad",
        "num_videos_per_prompt": 2,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_LENGTH,
    }
    if policy.layout.boundary is not None:
        options["guidance_scale_2"] = 3.0
    condition = None
    if image:
        options["image"] = IMAGE.resize((width, height))
        condition = policy.vae.encode_image(options["image"], height, width, frames)

    ours = sample(policy, plan, noise, condition)

    assert torch.equal(ours, pipe(**options, latents=noise.clone(), output_type="latent").frames)
    video = pipe(**options, latents=noise.clone(), output_type="np").frames
    assert np.array_equal(policy.vae.decode(ours), (video * 255).round().astype(np.uint8))
    assert len(np.unique(policy.vae.decode(ours))) > 10


def test_text_is_encoded_at_its_full_length_and_padded_with_zeros(folders: dict[str, Path]) -> None:
    policy = load(folders["t2v"])
    pipe = plain(WanPipeline, folders["t2v"])
    long = "a sign that says 'hello' in red"  # longer than 24 bytes
    for prompt in (long, "ab", ""):
        with torch.no_grad():
            theirs, _ = pipe.encode_prompt(prompt, None, False, max_sequence_length=TEXT_LENGTH)
        (embeds,) = policy.text.encode([prompt])
        assert embeds.shape[0] == min(len(prompt.encode()) + 1, TEXT_LENGTH)
        assert torch.equal(policy.text.pad(embeds, 1), theirs)


def test_a_fresh_adapter_changes_no_bit_and_is_seeded(folders: dict[str, Path]) -> None:
    policy, again = load(folders["t2v2"]), load(folders["t2v2"])
    x = torch.randn(1, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(1))
    prompt = policy.text.pad(policy.text.encode(["a cat"])[0], 1)
    before = [policy.velocity(e, x, 900.0, prompt, prompt, 3.0) for e in (0, 1)]
    state = torch.random.get_rng_state()
    policy.experts.add_lora(rank=4, alpha=8, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    for expert in (0, 1):
        assert torch.equal(policy.velocity(expert, x, 900.0, prompt, prompt, 3.0), before[expert])
    again.experts.add_lora(rank=4, alpha=8, seed=7)
    for expert in (0, 1):
        pairs = zip(policy.experts.trainable(expert), again.experts.trainable(expert), strict=True)
        assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)
    names = {name.split(".lora_")[0].split(".", 2)[2] for name, _ in policy.experts.trainable(0)}
    attention = {f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert names == attention | {"ffn.net.0.proj", "ffn.net.2"}
    downs = [dict(policy.experts.trainable(e))["blocks.0.attn1.to_q.lora_A.policy.weight"] for e in (0, 1)]
    assert not torch.equal(*downs)


def stir(policy: Policy) -> None:
    """Move the adapters of both experts away from zero, each its own way."""
    generator = torch.Generator().manual_seed(5)
    for expert in policy.layout.expert_ids:
        for _, parameter in policy.experts.trainable(expert):
            parameter.data += 0.05 * (expert + 1) * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("layout", ["t2v", "t2v2"])
def test_saved_adapters_load_into_plain_diffusers(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders[layout])
    policy.experts.add_lora(rank=4, alpha=12, seed=0)
    stir(policy)
    policy.experts.save_lora(tmp_path)
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["high_noise", "low_noise"][: len(policy.layout.expert_ids)]
    )

    plan = make_plan(policy.layout.boundary)
    pipe = plain(WanPipeline, folders[layout], plan)
    pipe.load_lora_weights(str(tmp_path / "high_noise"), adapter_name="high")
    assert pipe.transformer.peft_config["high"].lora_alpha == 12
    options: dict[str, Any] = {"guidance_scale_2": 3.0} if policy.layout.boundary else {}
    if policy.layout.boundary:
        pipe.load_lora_weights(str(tmp_path / "low_noise"), adapter_name="low", load_into_transformer_2=True)
    noise = torch.randn(1, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        prompt="a cat walks",
        negative_prompt="bad",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        max_sequence_length=TEXT_LENGTH,
        latents=noise,
        output_type="latent",
        **options,
    ).frames
    tuned = sample(policy, plan, noise, None)
    assert torch.equal(tuned, theirs)
    assert not torch.equal(tuned, sample(load(folders[layout]), plan, noise, None))
    assert torch.equal(tuned, sample(load(folders[layout], lora=str(tmp_path)), plan, noise, None))


def test_saving_twice_gives_equal_files_and_the_fingerprint_follows(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["t2v2"])
    base = policy.experts.fingerprint(None)
    assert base["adapters"] == {}
    policy.experts.add_lora(rank=2, alpha=4, seed=0)
    policy.experts.save_lora(tmp_path / "a")
    other = load(folders["t2v2"], lora=str(tmp_path / "a"))
    other.experts.save_lora(tmp_path / "b")
    a, b = policy.experts.fingerprint(tmp_path / "a"), policy.experts.fingerprint(tmp_path / "b")
    assert a == b
    assert sorted(a["adapters"]) == [f"{name}/pytorch_lora_weights.safetensors" for name in ("high_noise", "low_noise")]
    assert other.experts.fingerprint(None) == a
    stir(policy)
    policy.experts.save_lora(tmp_path / "c")
    fingerprints = {base["fingerprint"], a["fingerprint"], policy.experts.fingerprint(tmp_path / "c")["fingerprint"]}
    assert len(fingerprints) == 3
    assert policy.experts.fingerprint(tmp_path / "c")["base"] == base["base"]


def test_the_dropout_of_a_foreign_adapter_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["t2v"])
    policy.experts.add_lora(rank=2, alpha=4, seed=0)
    policy.experts.module(0).peft_config["policy"].lora_dropout = 0.5  # type: ignore[index]
    for name, value in policy.experts.trainable(0):
        value.data.fill_(0.1 if ".lora_B." in name else 0.02)
    policy.experts.save_lora(tmp_path)
    policy.experts.load_lora(tmp_path)
    assert 0.5 in {part.p for part in policy.experts.module(0).modules() if isinstance(part, torch.nn.Dropout)}
    x, embeds = torch.ones(1, *policy.layout.latent_shape(32, 32, 9)), torch.ones(1, TEXT_LENGTH, 16)
    with torch.no_grad():
        one, other = (policy.velocity(0, x, 500.0, embeds, None, 1.0) for _ in range(2))
        with policy.experts.reference():
            assert not torch.equal(one, policy.velocity(0, x, 500.0, embeds, None, 1.0))
    assert torch.equal(one, other)


def test_the_reference_is_the_base_model_and_leaves_gradients_alone(folders: dict[str, Path]) -> None:
    policy = load(folders["t2v"])
    x = torch.randn(1, *policy.layout.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(1))
    prompt = policy.text.pad(policy.text.encode(["a cat"])[0], 1)
    base = policy.velocity(0, x, 500.0, prompt, prompt, 3.0)
    policy.experts.add_lora(rank=4, alpha=8, seed=0)
    stir(policy)
    tuned = policy.velocity(0, x, 500.0, prompt, prompt, 3.0)
    with torch.no_grad(), policy.experts.reference():
        assert torch.equal(policy.velocity(0, x, 500.0, prompt, prompt, 3.0), base)
    assert not torch.equal(tuned, base)
    tuned.square().mean().backward()  # built before the reference was asked
    assert all(parameter.grad is not None for _, parameter in policy.experts.trainable(0))
    assert all("lora" in name for name, _ in policy.experts.trainable(0))
    policy.experts.become(None)
    assert not policy.experts.has_lora
    assert torch.equal(policy.velocity(0, x, 500.0, prompt, prompt, 3.0), base)


def test_bfloat16_keeps_fp32_parts_and_fp32_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["t2v2"], dtype="bfloat16")
    module = policy.experts.module(0)
    assert module.patch_embedding.weight.dtype == torch.bfloat16
    assert module.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    policy.experts.add_lora(rank=2, alpha=4, seed=0)
    policy.experts.save_lora(tmp_path)
    policy.experts.load_lora(tmp_path)
    assert {parameter.dtype for _, parameter in policy.experts.trainable(1)} == {torch.float32}
    x = torch.randn(1, *policy.layout.latent_shape(32, 32, 5))
    prompt = policy.text.pad(policy.text.encode(["a cat"])[0], 1)
    assert policy.velocity(0, x, 900.0, prompt, prompt, 3.0).dtype == torch.float32


def test_the_given_frame_of_ti2v_does_not_enter_the_log_prob(folders: dict[str, Path]) -> None:
    policy = load(folders["ti2v"])
    plan = make_plan(None, "flow-sde")
    x, x_next = torch.randn(2, 1, *policy.layout.latent_shape(64, 64, 5), generator=torch.Generator().manual_seed(2))
    prompt = policy.text.pad(policy.text.encode(["a cat"])[0], 1)
    condition = policy.vae.encode_image(IMAGE, 64, 64, 5)
    assert tuple(condition.shape) == (1, 48, 1, 4, 4)
    with torch.no_grad():
        scored = step_log_prob(policy, plan, 1, StepInputs(x, prompt, prompt, condition), x_next)
        for tensor in (x, x_next):
            tensor[:, :, 0] += 3
        again = step_log_prob(policy, plan, 1, StepInputs(x, prompt, prompt, condition), x_next)
        without = step_log_prob(policy, plan, 1, StepInputs(x, prompt, prompt), x_next)
    assert torch.equal(scored.log_prob, again.log_prob)
    assert not torch.equal(without.log_prob, again.log_prob)


def test_layouts_are_read_from_the_folder(folders: dict[str, Path]) -> None:
    facts = {name: load(folder) for name, folder in folders.items()}
    assert [facts[name].layout.boundary for name in SIZES] == [None, 0.875, 0.9, None]
    assert [facts[name].layout.expert_ids for name in SIZES] == [(0,), (0, 1), (0, 1), (0,)]
    assert [facts[name].layout.takes_image for name in SIZES] == ["never", "never", "must", "may"]
    assert facts["ti2v"].layout.latent_shape(64, 96, 9) == (48, 3, 4, 6)
    assert facts["t2v"].layout.latent_shape(64, 96, 9) == (16, 3, 8, 12)
    assert facts["t2v"].layout.scheduler_config["flow_shift"] == 3.0


def test_a_hub_id_is_found_in_the_cache_of_the_hub_client(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--Wan-AI--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folders["t2v"], snapshot)
    (tmp_path / "models--Wan-AI--tiny" / "refs").mkdir()
    (tmp_path / "models--Wan-AI--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_folder("Wan-AI/tiny") == snapshot
    with pytest.raises(UserError, match=r"^Wan-AI/other: no such model folder, and not to be had from the hub: "):
        find_folder("Wan-AI/other")


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        ("t2v", (40, 32, 9), "rollout.height = 40: not a multiple of 16 (hint: the nearest is 32)"),
        ("ti2v", (64, 48, 9), "rollout.width = 48: not a multiple of 32 (hint: the nearest is 64)"),
        ("t2v", (32, 32, 8), "rollout.frames = 8: not 4k+1 (hint: the nearest is 9)"),
        ("t2v", (32, 1600, 5), "32x1600, 5 frames: beyond the model's positions (hint: make it smaller)"),
    ],
)
def test_sizes_the_model_cannot_make(layout: str, size: tuple[int, int, int], message: str, folders: Any) -> None:
    with pytest.raises(UserError) as error:
        load(folders[layout]).layout.check_shape(*size)
    assert str(error.value) == message


def test_foreign_folders_are_refused_word_by_word(folders: dict[str, Path], tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load(path)
        return error.value.problem

    missing = tmp_path / "missing"
    assert message(missing) == f"{missing}: no such model folder"
    assert message(Path("/missing")) == "/missing: no such model folder"  # and no hub is asked for it
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(empty) == f"{empty}/model_index.json: no such file"
    folder = tmp_path / "copy"
    shutil.copytree(folders["t2v2"], folder)
    index = json.loads((folder / "model_index.json").read_text())

    def change(**values: Any) -> Path:
        (folder / "model_index.json").write_text(json.dumps({**index, **values}))
        return folder

    foreign = f"{folder}/model_index.json: a StableDiffusionPipeline, not a Wan pipeline"
    assert message(change(_class_name="StableDiffusionPipeline")) == foreign
    alone = f"{folder}/model_index.json: two experts but no boundary_ratio"
    assert message(change(boundary_ratio=None)) == alone
    assert message(change(vae=[None, None])) == f"{folder}: the part 'vae' is missing"
    assert message(change(image_encoder=["a", "b"])).startswith(f"{folder}: has an image encoder")
    (folder / "model_index.json").write_text("{")
    assert message(folder).startswith(f"{folder}/model_index.json: not readable as JSON")
    change()
    weights = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert message(folder).startswith(f"{weights}: damaged or cut off: ")


def test_foreign_adapters_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load(folders["t2v2"])
    with pytest.raises(UserError, match=r"high_noise/pytorch_lora_weights\.safetensors: no such file"):
        policy.experts.load_lora(tmp_path)
    wide = load(folders["ti2v"])
    wide.experts.add_lora(rank=2, alpha=4, seed=0)
    wide.experts.save_lora(tmp_path)
    with pytest.raises(UserError, match=r"low_noise/pytorch_lora_weights\.safetensors: no such file"):
        policy.experts.load_lora(tmp_path)
    shutil.copytree(tmp_path / "high_noise", tmp_path / "low_noise")
    path = tmp_path / "high_noise" / "pytorch_lora_weights.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read as LoRA weights"):
        policy.experts.load_lora(tmp_path)
