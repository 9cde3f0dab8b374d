"""The golden VideoAlign checkpoint, copies of it with other contents, and its prompt template."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from score.videoalign import VideoAlign
from score.videoalign.text import TEMPLATE_SHA256, load_tokenizer
from score.videoalign.video import Request
from shards.errors import UserError

DATA = Path(__file__).parents[1] / "data" / "videoalign"
GOLDEN = json.loads((DATA / "golden.json").read_text())
PROMPTS = GOLDEN["prompts"]
STEP = "checkpoint-11352"
CLIP = DATA / "videos" / "v1_yuv_320x192_16fps_81f.mp4"
RELEASED = Request(fps=2.0, num_frames=None, max_pixels=200704)
PREFIX = "base_model.model."
TEMPLATE_HINT = "take the template from a VideoAlign checkout"
BASE_HINT = "give `base_model` the folder of Qwen2-VL-2B-Instruct"
AGAIN = "fetch or copy the checkpoint again"


@pytest.fixture(autouse=True, scope="module", name="one_thread")
def one_thread_fixture() -> Iterator[None]:
    """The machine is shared; the numbers do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", name="template")
def template_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file with the released template, got back from the token ids of a golden case."""
    tokenizer = load_tokenizer(DATA / "base_model", DATA / "none")
    text = tokenizer.decode(GOLDEN["intermediates"]["v0"]["input_ids"], clean_up_tokenization_spaces=False)
    filled = text.split("<|vision_end|>")[1].split("<|im_end|>")[0]
    path = tmp_path_factory.mktemp("template") / "template.txt"
    path.write_bytes(filled.replace(PROMPTS[0], "{text_prompt}").encode())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TEMPLATE_SHA256
    return str(path)


@pytest.fixture(scope="session", name="build")
def build_fixture(template: str) -> Callable[..., VideoAlign]:
    """VideoAlign on the golden checkpoint unless told otherwise; equal options share one network."""

    @functools.cache
    def built(**options: Any) -> VideoAlign:
        own = {"checkpoint": str(DATA / "checkpoint"), "base_model": str(DATA / "base_model"), "template": template}
        return VideoAlign(**own | {"mode": "float32"} | options)

    return built


@pytest.fixture(scope="session", name="stored")
def stored_fixture() -> dict[str, torch.Tensor]:
    """The tensors of the golden model.pth."""
    return torch.load(DATA / "checkpoint" / STEP / "model.pth", weights_only=True)


def source(name: str) -> Any:
    """A golden video: a file, or the frames the reference sampled, which are few enough to be all sampled again."""
    if (DATA / "videos" / name).is_file():
        return DATA / "videos" / name
    return np.load(DATA / "frames" / "v0_sampled.npz")["frames"], 24.0


def write_video(path: Path, frames: int, size: tuple[int, int] = (64, 64), codec: str = "libx264") -> Path:
    """A small grey video at 16 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for shade in range(frames):
            image = np.full((*size, 3), 40 + shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def copied(folder: Path, weights: dict[str, Any] | None = None, **changes: Any) -> str:
    """The golden checkpoint in `folder` with other weights or another configuration (`section__key=value`)."""
    (folder / STEP).mkdir(parents=True)
    config = json.loads((DATA / "checkpoint" / "model_config.json").read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    (folder / "model_config.json").write_text(json.dumps(config))
    if weights is None:
        shutil.copy(DATA / "checkpoint" / STEP / "model.pth", folder / STEP)
    else:
        torch.save(weights, folder / STEP / "model.pth")
    return str(folder)


def split(folder: Path, stored: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The golden checkpoint in the split layout, and a base model that holds what the split layout leaves out."""
    checkpoint, base = folder / "checkpoint", folder / "base"
    copied(checkpoint)
    (checkpoint / STEP / "model.pth").unlink()
    lora = {k.replace(".default", ""): v for k, v in stored.items() if ".lora_" in k}
    others = {k: v for k, v in stored.items() if re.search(r"\.(visual|embed_tokens|rm_head)\.", k)}
    save_file(lora, checkpoint / STEP / "adapter_model.safetensors")
    torch.save(others, checkpoint / STEP / "non_lora_state_dict.pth")
    shutil.copytree(DATA / "base_model", base)
    language = {k: v for k, v in stored.items() if ".model.layers." in k or ".model.norm." in k}
    plain = {k.removeprefix(PREFIX).replace(".base_layer", ""): v for k, v in language.items() if ".lora_" not in k}
    plain["model.embed_tokens.weight"] = torch.zeros(1152, 64)  # must not be taken: the trained ones count
    plain["visual.patch_embed.proj.weight"] = torch.zeros(32, 3, 2, 14, 14)
    save_file(plain, base / "model.safetensors")
    return str(checkpoint), str(base)


def fails(call: Callable[[], Any], problem: str, hint: str) -> None:
    """The call raises a UserError of exactly these words."""
    with pytest.raises(UserError) as caught:
        call()
    assert (caught.value.problem, caught.value.hint) == (problem, hint)
