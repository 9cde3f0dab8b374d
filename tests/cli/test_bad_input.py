"""Bad input is told in one sentence, word by word, before anything is sampled or written below the iteration."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.policy import Policy
from rollout.ranks.device import find_device
from rollout.run import rollout
from shards.errors import UserError
from shards.run import Run
from tests.support import training


def refused(run: Run, policy: Policy | None = None) -> tuple[str, str]:
    """Roll out what must be refused; nothing may lie in the run directory afterwards but what `init` wrote."""
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UserError) as caught:
        rollout(run, run.iteration(0), policy)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(run.path.rglob("*")) == before
    return caught.value.problem, caught.value.hint


@pytest.fixture(scope="module")
def policies(tiny_t2v: Path, tiny_t2v2: Path, tiny_i2v2: Path, tiny_ti2v: Path) -> dict[str, Policy]:
    folders = {"t2v": tiny_t2v, "t2v2": tiny_t2v2, "i2v2": tiny_i2v2, "ti2v": tiny_ti2v}
    return {name: Policy.load(path, device="cpu", text_length=training.TEXT_LENGTH) for name, path in folders.items()}


@pytest.mark.parametrize(("layout", "settings", "problem", "hint"), [
    ("t2v2", {"guidance_scale_2": None},
     "the model has two experts, but rollout.guidance_scale_2 is not set",
     "guidance is part of the policy: give the low-noise expert its own, e.g. rollout.guidance_scale_2=3.0 "
     "(Wan2.2 T2V-A14B: 4.0 high, 3.0 low)"),
    ("t2v2", {"low_steps": 0},
     "rollout.low_steps=0 never trains the low_noise expert",
     "set rollout.low_steps to 1 or more, or rollout.allow_untrained_expert=true if that is wanted"),
    ("t2v2", {"steps": 3, "shift": 60.0},
     "none of the 3 steps runs the low_noise expert (it changes at timestep 875)",
     "take more rollout.steps or another rollout.shift, or set rollout.allow_untrained_expert=true"),
    ("t2v2", {"steps": 4, "shift": 20.0},
     "rollout.low_steps=2, but only 0 steps of the low_noise expert can be stochastic "
     "(from rollout.first_step=1 to the last but one of 4)",
     "lower rollout.first_step, take more rollout.steps or another rollout.shift"),
    ("t2v2", {"last_step": 1},
     "rollout.low_steps=2, but only 0 steps of the low_noise expert can be stochastic "
     "(from rollout.first_step=1 to rollout.last_step=1)",
     "widen rollout.first_step to rollout.last_step, take more rollout.steps or another rollout.shift"),
    ("t2v", {"batch_tokens": 1},
     "rollout.batch_tokens = 1, but one video has 2 tokens (16x16, 5 frames)",
     "take rollout.batch_tokens >= 2, or a smaller or shorter video"),
    ("t2v", {"frames": 8}, "rollout.frames = 8: not 4k+1", "the nearest is 9"),
    ("t2v", {"height": 40}, "rollout.height = 40: not a multiple of 16", "the nearest is 32"),
    ("t2v", {"width": 20}, "rollout.width = 20: not a multiple of 16", "the nearest is 16"),
    ("t2v", {"eta": 1e-8},
     "rollout.eta = 1e-08: step 4 adds noise of 5.8e-09, which latents stored as float32 cannot hold",
     "take a larger rollout.eta"),
    ("t2v", {"eta": 1e-12, "form": "exact"},
     "rollout.eta = 1e-12: step 1 adds noise of 0, which latents stored as float32 cannot hold",
     "take a larger rollout.eta"),
    ("t2v", {"eta": 0.005, "law": "dance-sde", "storage_dtype": "bfloat16"},
     "rollout.eta = 0.005: step 1 adds noise of 0.0014, which latents stored as bfloat16 cannot hold",
     "take a larger rollout.eta, or rollout.storage_dtype=float32"),
    ("ti2v", {"height": 32, "width": 48}, "rollout.width = 48: not a multiple of 32", "the nearest is 64"),
])  # fmt: skip
def test_a_shape_or_schedule_the_model_cannot_take(
    layout: str, settings: dict[str, Any], problem: str, hint: str, policies: dict[str, Policy], tmp_path: Path
) -> None:
    policy = policies[layout]
    run = training.make_run(tmp_path / "run", policy.layout.folder, **settings)
    assert refused(run, policy) == (problem, hint)


@pytest.mark.parametrize(("part", "change", "problem", "hint"), [
    ("text_encoder", "folder", "{model}: the part 'text_encoder' is missing",
     "save the whole pipeline with save_pretrained"),
    ("vae", "folder", "{model}: the part 'vae' is missing", "save the whole pipeline with save_pretrained"),
    ("text_encoder", "weights", "{model}/text_encoder: holds no weights",
     "copy or fetch the whole model folder; weights are safetensors, never pickled"),
    ("vae", "weights", "{model}/vae: holds no weights",
     "copy or fetch the whole model folder; weights are safetensors, never pickled"),
    ("transformer_2", "one of two",
     "{model}/transformer_2/second.safetensors: no such file, but x.safetensors.index.json names it",
     "copy or fetch the whole model folder; weights are safetensors, never pickled"),
    ("text_encoder", "cut off",
     "{model}/text_encoder/model.safetensors: damaged or cut off: Error while deserializing header: "
     "incomplete metadata, file not fully covered", "copy or fetch this file again"),
    ("transformer", "another weight",
     "{model}/transformer: a WanTransformer3DModel has no face_adapter.weight",
     "files and config.json do not belong together; copy or fetch the whole model folder"),
    ("vae", "a weight",
     "{model}/vae: its files have no decoder.conv_in.bias",
     "files and config.json do not belong together; copy or fetch the whole model folder"),
])  # fmt: skip
def test_a_part_of_the_model_that_is_missing(
    part: str, change: str, problem: str, hint: str, tiny_t2v2: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_t2v2, tmp_path / "model")
    if change == "folder":
        shutil.rmtree(model / part)
    if change == "weights":
        next((model / part).glob("*.safetensors")).unlink()
    if change == "one of two":
        (model / part / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "second.safetensors"}}))
    if change == "cut off":
        path = model / part / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    if "weight" in change and change != "weights":
        path = model / part / "diffusion_pytorch_model.safetensors"
        weights = {k: v for k, v in load_file(path).items() if k != "decoder.conv_in.bias"}
        more = {"face_adapter.weight": torch.zeros(1)} if change == "another weight" else {}
        save_file(weights | more, path, {"format": "pt"})
    assert refused(training.make_run(tmp_path / "run", model)) == (problem.format(model=model), hint)


@pytest.mark.parametrize(("change", "problem", "hint"), [
    ("missing", "{image}: no such image", "correct the path in the prompts file; it counts from that file"),
    ("unreadable", "{image}: cannot be read as an image: cannot identify image file '{image}'",
     "correct the path in the prompts file, or convert the file to PNG"),
    ("cut off", "{image}: cannot be read as an image: image file is truncated (1 bytes not processed)",
     "correct the path in the prompts file, or convert the file to PNG"),
    ("another size", "prompt {prompt}: {image} is 32 x 16, but the video is 16 x 16",
     "crop and scale the image to the size of the video, or set rollout.width and rollout.height"),
])  # fmt: skip
def test_an_image_that_cannot_be_taken(
    change: str, problem: str, hint: str, policies: dict[str, Policy], tmp_path: Path
) -> None:
    policy = policies["i2v2"]
    run = training.make_run(tmp_path / "run", policy.layout.folder, image=True)
    image = tmp_path / "first.png"
    if change == "missing":
        image.unlink()
    if change == "unreadable":
        image.write_text("no picture")
    if change == "cut off":
        image.write_bytes(image.read_bytes()[:100])
    if change == "another size":
        training.write_image(image, 32, 16)
    found, advice = refused(run, policy)
    expected = problem.format(image=image, prompt=found.split(":")[0].removeprefix("prompt "))
    assert found.split(" (")[0] == expected.split(" (")[0]  # how many bytes are left is the decoder's business
    assert advice == hint


def test_an_image_that_is_the_whole_video(policies: dict[str, Policy], tmp_path: Path) -> None:
    policy, size = policies["ti2v"], {"height": 32, "width": 32}
    problem, hint = refused(
        training.make_run(tmp_path / "run", policy.layout.folder, image=True, frames=1, **size), policy
    )
    assert re.fullmatch(r"prompt \d \('a sign .*'\) has an image, which is all of a video of one frame", problem)
    assert hint == "take rollout.frames >= 5, or remove the `image`"


def test_a_prompt_without_an_image(policies: dict[str, Policy], tmp_path: Path) -> None:
    policy = policies["i2v2"]
    problem, hint = refused(training.make_run(tmp_path / "run", policy.layout.folder), policy)
    number, text = problem.split()[1], problem.split("'")[1]
    assert problem == f"prompt {number} ('{text}') has no image, but the model is image-to-video"
    assert hint == "give every prompt an `image`, in a JSON-lines, CSV or Parquet file"


def test_a_lora_of_another_base(policies: dict[str, Policy], tiny_t2v2: Path, tiny_i2v2: Path, tmp_path: Path) -> None:
    """One of other shapes cannot be put on; one of the same shapes is told by the record of its training."""
    hidden = Policy.load(tiny_i2v2, device="cpu", text_length=training.TEXT_LENGTH)
    hidden.experts.add_lora(2, 4.0, 0)
    hidden.experts.save_lora(tmp_path / "lora")
    (tmp_path / "lora" / "policy.json").write_text(json.dumps(hidden.experts.fingerprint(tmp_path / "lora")))
    run = training.make_run(tmp_path / "run", tiny_t2v2, model={"lora": str(tmp_path / "lora")})
    beneath = (
        "has the fingerprint of its base; name that model in model.path, and in model.base_lora the LoRA that was "
        "beneath it, if there was one"
    )
    assert refused(run) == (
        f"model.lora: {tmp_path}/lora was trained on another base model than {tiny_t2v2}",
        f"{tmp_path}/lora/policy.json {beneath}",
    )
    (tmp_path / "lora" / "policy.json").rename(tmp_path / "lora" / "export.json")  # the same, exported
    assert refused(run) == (
        f"model.lora: {tmp_path}/lora was trained on another base model than {tiny_t2v2}",
        f"{tmp_path}/lora/export.json {beneath}",
    )
    (tmp_path / "lora" / "export.json").unlink()
    path = tmp_path / "lora" / "low_noise" / "pytorch_lora_weights.safetensors"
    save_file({name.replace("blocks.1.", "blocks.7."): value for name, value in load_file(path).items()}, path)
    problem, hint = refused(run)
    where = "blocks.7.attn1.to_k.lora_A.weight is [2, 24] there, and here does not exist"
    assert problem == f"{path}: does not fit this model: {where}"
    assert hint == "a LoRA of another model"


def test_a_lora_of_two_experts_on_one(
    policies: dict[str, Policy], tiny_t2v: Path, tiny_t2v2: Path, tmp_path: Path
) -> None:
    """Its high-noise half alone would fit."""
    both = Policy.load(tiny_t2v2, device="cpu", text_length=training.TEXT_LENGTH)
    both.experts.add_lora(2, 4.0, 0)
    both.experts.save_lora(tmp_path / "lora")
    run = training.make_run(tmp_path / "run", tiny_t2v, model={"lora": str(tmp_path / "lora")})
    assert refused(run) == (
        f"model.lora: {tmp_path}/lora holds adapters of two experts, but {tiny_t2v} has one",
        "name the model it was trained on in model.path, or the folder of one adapter in model.lora",
    )


def test_bfloat16_on_a_gpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such GPU is at hand, so what torch would say of one is put in its mouth."""
    answers = {"is_available": True, "device_count": 1, "is_bf16_supported": False, "get_device_name": "Tesla T4",
               "set_device": None}  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    with pytest.raises(UserError) as caught:
        find_device("cuda", "bfloat16")
    problem = "model.dtype: bfloat16, which Tesla T4 cannot compute"
    assert (caught.value.problem, caught.value.hint) == (problem, "set model.dtype = float32")
    with pytest.raises(UserError, match=r"model\.device: cuda:1, but this machine has 1 CUDA devices"):
        find_device("cuda:1")


def test_a_dtype_or_device_that_is_not_there(tiny_t2v: Path, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "half", tiny_t2v, model={"dtype": "float16"})
    assert refused(run) == (
        "model.dtype: float16, which a CPU computes badly or not at all", "set model.dtype = float32, or bfloat16"
    )  # fmt: skip
    run = training.make_run(tmp_path / "odd", tiny_t2v, model={"device": "gpu"})
    assert refused(run) == ("model.device: 'gpu' is not a device", "auto, cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        run = training.make_run(tmp_path / "cuda", tiny_t2v, model={"device": "cuda"})
        problem = "model.device: cuda, but this machine has no CUDA device"
        assert refused(run) == (problem, "set model.device = auto")


def test_a_refusal_comes_before_any_weight_is_read(tiny_t2v2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What the configurations show is told before gigabytes are loaded, by `rollout` and by `loop`."""
    import cli

    def forbidden(*_: object, **__: object) -> Policy:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Policy, "load", forbidden)
    monkeypatch.setattr(Policy, "of", forbidden)
    run = training.make_run(tmp_path / "run", tiny_t2v2, guidance_scale_2=None)
    assert refused(run)[0] == "the model has two experts, but rollout.guidance_scale_2 is not set"
    with pytest.raises(UserError, match="guidance_scale_2 is not set"):
        cli.load_policy(run, run.iteration(0))
    half = training.make_run(tmp_path / "half", tiny_t2v2, model={"dtype": "float16"})
    with pytest.raises(UserError, match="float16, which a CPU computes badly"):
        cli.load_policy(half, half.iteration(0))
    with pytest.raises(AssertionError, match="a model was loaded"):
        cli.load_policy(run)


def test_training_without_rollouts_makes_no_folder(tiny_t2v2: Path, tmp_path: Path) -> None:
    """The folder of an iteration that was never sampled would count as one: `verify --replay` looked for its shards."""
    from train.run import train

    run = training.make_run(tmp_path / "run", tiny_t2v2)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UserError) as caught:
        train(run, 0)
    hint = f"run `rushes rollout {run.path} --iteration 0` first"
    assert (caught.value.problem, caught.value.hint) == (f"{run.path}/iter-0000 has no rollouts", hint)
    assert sorted(run.path.rglob("*")) == before
