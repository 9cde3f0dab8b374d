"""What `model.path` may name by mistake: each is called what it is, and told what is wanted instead."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rollout.policy.folder import find_folder, read_layout
from rollout.preview import preview
from rollout.run import rollout
from shards.errors import UserError
from tests.support import training

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ca56075756c0dcb5df454be1324e2204\nsize 390735\n"
LAYOUT = "model.path is a folder in WanPipeline layout, with model_index.json, transformer, text encoder and VAE"
A14B = "hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers"
WHOLE = "name it in model.lora, and its base in model.path"


def refused(path: Path) -> tuple[str, str]:
    """What is said of a path, by a rollout and by a dry run, without the path itself."""
    said = []
    for weights in (True, False):
        with pytest.raises(UserError) as caught:
            read_layout(find_folder(str(path), weights=weights), weights=weights)
        assert "\n" not in str(caught.value)
        said.append((caught.value.problem.removeprefix(str(path)), caught.value.hint))
    assert said[0] == said[1]
    return said[0]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_checkpoint_of_the_official_code(tmp_path: Path) -> None:
    names = ("high_noise_model/config.json", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
    folder = touch(tmp_path / "Wan2.2-I2V-A14B", "configuration.json", "google/umt5-xxl/spiece.model", *names)
    problem, hint = refused(folder)
    found = "Wan2.1_VAE.pth, high_noise_model, models_t5_umt5-xxl-enc-bf16.pth"
    assert problem == f": a checkpoint of Wan's official code ({found}), not of diffusers"
    wanted = "take the release whose name ends in -Diffusers: hf download Wan-AI/{}-Diffusers"
    assert hint == wanted.format("Wan2.2-I2V-A14B")
    one = touch(tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B" / "snapshots" / "0123", "model.safetensors")
    (one / "config.json").write_text('{"_class_name": "WanModel"}')  # all that is fetched of it from a hub
    assert refused(one)[1] == wanted.format("Wan2.1-T2V-1.3B")
    elsewhere = touch(tmp_path / "wan", "low_noise_model/config.json")
    assert refused(elsewhere)[1] == wanted.format("Wan2.2-T2V-A14B")


@pytest.mark.parametrize(("names", "kind"), [
    (["model.diffusion_model.blocks.0.self_attn.q.weight", "model.diffusion_model.patch_embedding.weight"],
     "the transformer of a Wan model as ComfyUI and Wan's own code have it"),
    (["blocks.0.self_attn.q.weight"], "the transformer of a Wan model as ComfyUI and Wan's own code have it"),
    (["blocks.0.attn1.to_q.weight"], "the transformer of a Wan model alone"),
    (["decoder.conv1.weight", "encoder.conv1.weight"], "a VAE"),
    (["token_embedding.weight", "blocks.0.attn.q.weight"], "a text encoder"),
    (["one", "two"], "with 2 tensors"),
])  # fmt: skip
def test_a_single_file(names: list[str], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "wan2.2_t2v_high_noise_14B.safetensors"
    save_file({name: np.zeros(1, np.float32) for name in names}, path)
    assert refused(path) == (f": a single file, {kind}, not a model folder", f"{LAYOUT}: {A14B}")


def test_other_single_files(tmp_path: Path) -> None:
    for name, kind in (
        ("a.safetensors", "damaged or cut off"), ("a.gguf", "quantised weights (GGUF)"), ("a.pth", "pickled weights"),
        ("a.zip", "of type .zip"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"?")
        assert refused(tmp_path / name)[0] == f": a single file, {kind}, not a model folder"
    (tmp_path / "b.safetensors").write_text(LFS)
    problem, hint = refused(tmp_path / "b.safetensors")
    assert problem == ": a Git LFS pointer, not the file itself"
    assert hint == f"fetch it: cd {tmp_path} && git lfs pull"


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.diff_b"])
def test_a_lora_in_place_of_a_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({name: np.zeros(1, np.float32)}, folder / "pytorch_lora_weights.safetensors")
    assert refused(folder) == (": a LoRA, not a model folder", WHOLE)
    assert refused(folder / "pytorch_lora_weights.safetensors") == (": a LoRA, not a model folder", WHOLE)


def test_folders_beside_the_one_that_is_meant(tiny_t2v2: Path, tmp_path: Path) -> None:
    assert refused(tiny_t2v2 / "transformer") == (
        ": a WanTransformer3DModel alone, one part of a model", f"name the folder of the whole: {tiny_t2v2}",
    )  # fmt: skip
    above = tmp_path / "models"
    shutil.copytree(tiny_t2v2, above / "wan")
    hint = f"name the folder with model_index.json: {above / 'wan'}"
    assert refused(above) == (": holds a model folder, but is none itself", hint)
    comfy = touch(tmp_path / "comfy", "diffusion_models/wan.safetensors", "vae/wan_vae.safetensors")
    found = "diffusion_models/wan.safetensors, vae/wan_vae.safetensors"
    assert refused(comfy) == (
        f": holds single files of weights ({found}), but no model_index.json", f"{LAYOUT}: {A14B}"
    )  # fmt: skip
    made = "a Wan model folder is made by WanPipeline.save_pretrained"
    other = touch(tmp_path / "other", "readme.md", "notes.txt")
    assert refused(other) == (
        "/model_index.json: no such file", f"the folder holds notes.txt, readme.md; {made}"
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == ("/model_index.json: no such file", f"the folder is empty; {made}")


def rename(part: Path, change: Callable[[str], str]) -> None:
    for path in part.glob("*.safetensors"):
        path.rename(path.with_name(change(path.name)))


@pytest.mark.parametrize(("part", "to", "problem"), [
    ("transformer", "diffusion_pytorch_model.fp16.safetensors",
     "has only the variant fp16 of its weights (diffusion_pytorch_model.fp16.safetensors), not "
     "diffusion_pytorch_model.safetensors"),
    ("transformer_2", "diffusion_pytorch_model.bf16-00001-of-00001.safetensors",
     "has only the variant bf16 of its weights (diffusion_pytorch_model.bf16-00001-of-00001.safetensors), not "
     "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.fp16.safetensors",
     "has only the variant fp16 of its weights (model.fp16.safetensors), not model.safetensors"),
    ("vae", "wan_vae.safetensors",
     "holds wan_vae.safetensors, but neither diffusion_pytorch_model.safetensors nor its index"),
    ("vae", "diffusion_pytorch_model.bin", "holds no weights but diffusion_pytorch_model.bin"),
])  # fmt: skip
def test_weights_under_names_that_are_not_loaded(
    part: str, to: str, problem: str, tiny_t2v2: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_t2v2, tmp_path / "model")
    rename(model / part, lambda _: to)
    run = training.make_run(tmp_path / "run", model)
    with pytest.raises(UserError) as caught:
        rollout(run, run.iteration(0))
    assert caught.value.problem == f"{model / part}: {problem}"
    assert preview(run, run.iteration(0))  # reads no weights


@pytest.mark.parametrize("name", [
    "transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json", "vae/config.json",
    "text_encoder/model.safetensors", "model_index.json",
])  # fmt: skip
def test_pointers_in_place_of_files(name: str, tiny_t2v2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_t2v2, tmp_path / "a model")
    (model / name).write_text(LFS)
    problem, hint = refused(model)
    assert problem == f"/{name}: a Git LFS pointer, not the file itself"
    assert shlex.split(hint.removeprefix("fetch it: "))[1] == str((model / name).parent)


def test_a_pointer_or_a_giant_in_place_of_an_image(tiny_i2v2: Path, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_i2v2, image=True)
    image = tmp_path / "first.png"
    data = bytearray(image.read_bytes())
    image.write_text(LFS)
    with pytest.raises(UserError, match="a Git LFS pointer"):
        rollout(run, run.iteration(0))
    import zlib

    data[16:24] = (60_000).to_bytes(4) + (60_000).to_bytes(4)  # width and height in the header of a PNG
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    image.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as an image: Image size"):
        rollout(run, run.iteration(0))


def test_of_a_hub_only_configurations_are_fetched_where_there_is_no_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_t2v: Path
) -> None:
    asked: list[list[str]] = []
    official = tmp_path / "official"
    official.mkdir()
    (official / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tiny_t2v if name == "Wan-AI/tiny" else official)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="a checkpoint of Wan's official code"):
        read_layout(find_folder("Wan-AI/Wan2.2-T2V-A14B"))
    assert asked == [["*.json", "*.model", "*.txt"]]
    assert read_layout(find_folder("Wan-AI/tiny")).folder == tiny_t2v
    assert [("*.safetensors" in patterns) for patterns in asked] == [False, False, True]
