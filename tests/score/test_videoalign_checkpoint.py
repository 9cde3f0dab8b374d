"""VideoReward checkpoints on disk: both layouts, every root and step, strict keys, and what is refused."""

from __future__ import annotations

import ast
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from score.videoalign import VideoAlign
from score.videoalign.checkpoint import find_checkpoint
from score.videoalign.network import Tokens, read_base_config
from shards.errors import UserError
from tests.support.videoalign_fixtures import (  # noqa: F401 - fixtures count as used
    AGAIN,
    BASE_HINT,
    DATA,
    GOLDEN,
    PREFIX,
    PROMPTS,
    STEP,
    build_fixture,
    copied,
    fails,
    one_thread_fixture,
    source,
    split,
    stored_fixture,
    template_fixture,
)


def test_checkpoint_is_found_from_every_root(tmp_path: Path) -> None:
    copied(tmp_path / "clone" / "VideoReward")
    for path in (tmp_path / "clone", tmp_path / "clone" / "VideoReward", tmp_path / "clone" / "VideoReward" / STEP):
        found = find_checkpoint(path)
        assert (found.folder, found.config_file.parent) == (
            tmp_path / "clone" / "VideoReward" / STEP,
            tmp_path / "clone" / "VideoReward",
        )
    copied(tmp_path / "clone" / "other")
    fails(
        lambda: find_checkpoint(tmp_path / "clone"),
        f"checkpoint {tmp_path / 'clone'} holds several checkpoints: VideoReward, other",
        "give the path of one of them",
    )
    fails(
        lambda: find_checkpoint(tmp_path / "nowhere"),
        f"no model_config.json in checkpoint folder {tmp_path / 'nowhere'}",
        "give `checkpoint` the folder of a VideoReward download",
    )


def test_steps(tmp_path: Path) -> None:
    root = Path(copied(tmp_path / "c"))
    (root / "checkpoint-900").mkdir()
    (root / "checkpoint-final").mkdir()
    assert [find_checkpoint(root, step).folder.name for step in (None, -1, 900)] == [STEP, STEP, "checkpoint-900"]
    fails(lambda: find_checkpoint(root, 7), f"checkpoint {root} has no step 7",
          "it has 900, 11352; leave `step` out for the newest")  # fmt: skip
    fails(lambda: find_checkpoint(root / STEP, 900),
          f"step 900 was asked for, but checkpoint {root / STEP} is step 11352", "drop `step`")  # fmt: skip
    shutil.rmtree(root / STEP), shutil.rmtree(root / "checkpoint-900")
    fails(lambda: find_checkpoint(root), f"no checkpoint-STEP folder in {root}", AGAIN)


@pytest.mark.parametrize(
    ("section", "key", "value", "known"),
    [
        ("model_config", "output_dim", 4, "1 or 3"),
        ("model_config", "reward_token", "last", "special"),
        ("model_config", "reward_token", "mean", "special"),
        ("model_config", "use_special_tokens", False, "True"),
        ("model_config", "load_in_4bit", True, "False"),
        ("data_config", "prompt_template_type", "detailed", "detailed_special"),
        ("data_config", "sample_type", "multi_pts", "uniform"),
    ],
)
def test_configurations_no_release_has(section: str, key: str, value: Any, known: str, tmp_path: Path) -> None:
    root = copied(tmp_path / "c", **{f"{section}__{key}": value})
    problem = f"{root}/model_config.json: {key} is {value!r}, only {known} is known"
    fails(lambda: find_checkpoint(root), problem, "use a released VideoReward checkpoint")


def test_damaged_configuration(tmp_path: Path) -> None:
    root = Path(copied(tmp_path / "c"))
    config = json.loads((root / "model_config.json").read_text())
    for section, key in (
        ("data_config", "max_frame_pixels"),
        ("peft_lora_config", "lora_r"),
        ("inference_config", "MQ_std"),
    ):
        less = copy.deepcopy(config)
        del less[section][key]
        (root / "model_config.json").write_text(json.dumps(less))
        fails(lambda key=key: find_checkpoint(root), f"{root}/model_config.json has no '{key}'", AGAIN)
    (root / "model_config.json").write_text("{")
    with pytest.raises(UserError, match=f"^{root}/model_config.json cannot be read: Expecting property name"):
        find_checkpoint(root)


def test_split_layout_scores_the_same(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    checkpoint, base = split(tmp_path, stored)
    for mode in ("float32", "official_rope_float32_math"):
        found = build(checkpoint=checkpoint, base_model=base, mode=mode).score_videos([source("v0")], PROMPTS[:1])
        assert found == build(mode=mode).score_videos([source("v0")], PROMPTS[:1])


def test_plain_weights_in_the_adapter_file_count_last(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    checkpoint, base = split(tmp_path, stored)
    others = Path(checkpoint, STEP, "non_lora_state_dict.pth")
    trained = torch.load(others, weights_only=True)
    embedding = f"{PREFIX}model.embed_tokens.weight"
    lora = {k.replace(".default", ""): v for k, v in stored.items() if ".lora_" in k}
    save_file(lora | {embedding: trained[embedding]}, Path(checkpoint, STEP, "adapter_model.safetensors"))
    torch.save(trained | {embedding: torch.zeros_like(trained[embedding])}, others)
    found = build(checkpoint=checkpoint, base_model=base).score_videos([source("v0")], PROMPTS[:1])
    assert found == build().score_videos([source("v0")], PROMPTS[:1])


def test_frozen_vision_tower_comes_from_the_base_model(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    checkpoint, base = split(tmp_path, stored)
    others = Path(checkpoint, STEP, "non_lora_state_dict.pth")
    trained = torch.load(others, weights_only=True)
    tower = {k: v for k, v in trained.items() if ".visual." in k and ".merger." not in k}
    torch.save({k: v for k, v in trained.items() if k not in tower}, others)
    fails(
        lambda: build(checkpoint=checkpoint, base_model=base, batch_size=1).network,
        f"{others}: missing keys {PREFIX}visual.blocks.0.attn.proj.bias, {PREFIX}visual.blocks.0.attn.proj.weight, "
        f"{PREFIX}visual.blocks.0.attn.qkv.bias and 22 more",
        "the file belongs to another model or is damaged",
    )
    config = json.loads(Path(checkpoint, "model_config.json").read_text())
    config["model_config"]["freeze_vision_tower"] = True
    Path(checkpoint, "model_config.json").write_text(json.dumps(config))
    Path(base, "model.safetensors").rename(Path(base, "model-00001-of-00002.safetensors"))
    save_file({k.removeprefix(PREFIX): v for k, v in tower.items()}, Path(base, "model-00002-of-00002.safetensors"))
    found = build(checkpoint=checkpoint, base_model=base, batch_size=2).score_videos([source("v0")], PROMPTS[:1])
    assert found == build().score_videos([source("v0")], PROMPTS[:1])


def test_full_file_counts_before_the_split_ones(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    checkpoint, _ = split(tmp_path, stored)
    Path(checkpoint, STEP, "adapter_model.safetensors").write_bytes(b"not read")
    shutil.copy(DATA / "checkpoint" / STEP / "model.pth", Path(checkpoint, STEP))
    assert build(checkpoint=checkpoint).network.rm_head.weight.shape == (1, 64)


FOREIGN = "the file belongs to another model or is damaged"


def test_full_file_with_other_keys(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    changes: dict[str, tuple[dict[str, Any], str]] = {
        f"{PREFIX}rm_head.weight": ({}, f"missing key {PREFIX}rm_head.weight"),
        f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.default.weight": (
            {},
            f"missing key {PREFIX}model.layers.1.mlp.up_proj.lora_B.default.weight",
        ),
        f"{PREFIX}lm_head.weight": ({}, f"missing key {PREFIX}lm_head.weight"),
        "": ({f"{PREFIX}extra.weight": torch.zeros(1)}, f"unexpected key {PREFIX}extra.weight"),
    }
    for number, (dropped, (added, problem)) in enumerate(changes.items()):
        weights = {k: v for k, v in stored.items() if k != dropped} | added
        checkpoint = copied(tmp_path / str(number), weights)
        fails(lambda c=checkpoint: build(checkpoint=c).network, f"{checkpoint}/{STEP}/model.pth: {problem}", FOREIGN)


def test_split_files_with_other_keys(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor], template: str
) -> None:
    checkpoint, base = split(tmp_path, stored)
    adapter, others = (Path(checkpoint, STEP, n) for n in ("adapter_model.safetensors", "non_lora_state_dict.pth"))
    lora = {k.replace(".default", ""): v for k, v in stored.items() if ".lora_" in k}
    trained = torch.load(others, weights_only=True)
    weights = Path(base, "model.safetensors")

    def check(problem: str, hint: str = FOREIGN) -> None:
        reward = VideoAlign(checkpoint, base, template)
        fails(lambda: reward.network, problem, hint)

    save_file(lora | {"stray.weight": torch.zeros(1)}, adapter)
    check(f"{adapter}: unexpected key stray.weight")
    first = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A"
    save_file({k: v for k, v in lora.items() if not k.startswith(first)}, adapter)
    check(f"{adapter}: missing key {first}.weight")
    save_file(lora, adapter)
    torch.save({k: v for k, v in trained.items() if "rm_head" not in k}, others)
    check(f"{others}: missing key {PREFIX}rm_head.weight")
    torch.save({k: v for k, v in trained.items() if "embed_tokens" not in k}, others)
    check(f"{others}: missing key {PREFIX}model.embed_tokens.weight")
    torch.save(trained | {"stray.weight": torch.zeros(1)}, others)
    check(f"{others}: unexpected key stray.weight")
    torch.save(trained, others)
    weights.rename(base + "/other.safetensors")
    check(
        f"no model*.safetensors in {base}",
        "a checkpoint without model.pth needs the base model's weights: give `base_model` their folder",
    )
    save_file({"model.norm.weight": torch.zeros(64)}, weights)
    with pytest.raises(UserError, match=r"model\*.safetensors: missing keys model.layers.0.input_layernorm.weight"):
        build(checkpoint=checkpoint, base_model=base).network  # noqa: B018
    others.unlink()
    check(f"no model.pth and no non_lora_state_dict.pth in {checkpoint}/{STEP}", AGAIN)


def test_weights_of_another_shape(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    hint = "check that model_config.json and `base_model` belong to this checkpoint"
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.default.weight"
    root = copied(tmp_path / "a", stored | {key: torch.zeros(8, 64)})
    fails(lambda: build(checkpoint=root).network,
          f"{root}/{STEP}: {key} is [8, 64], the configuration asks for [64, 64]", hint)  # fmt: skip
    root = copied(tmp_path / "b", model_config__output_dim=3)
    fails(lambda: build(checkpoint=root).network,
          f"{root}/{STEP}: {PREFIX}rm_head.weight is [1, 64], the configuration asks for [3, 64]", hint)  # fmt: skip


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_only_tensors_are_unpickled(tmp_path: Path, build: Callable[..., VideoAlign]) -> None:
    root = copied(tmp_path / "c", {"x": Trap(tmp_path / "sprung")})
    fails(
        lambda: build(checkpoint=root).network,
        f"{root}/{STEP}/model.pth holds more than tensors, or is damaged, and is not opened",
        AGAIN,
    )
    assert not (tmp_path / "sprung").exists()
    torch.save([torch.zeros(1)], Path(root, STEP, "model.pth"))
    fails(lambda: build(checkpoint=root).network, f"{root}/{STEP}/model.pth is not a table of tensors", AGAIN)
    whole = (DATA / "checkpoint" / STEP / "model.pth").read_bytes()
    Path(root, STEP, "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.pth cannot be read: "):
        build(checkpoint=root, batch_size=1).network  # noqa: B018


def test_base_model_folder(tmp_path: Path, build: Callable[..., VideoAlign]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(
        lambda: build(base_model=str(empty)).tokenizer,
        f"no tokenizer in {empty} or {DATA}/checkpoint/{STEP}/tokenizer",
        BASE_HINT,
    )
    (empty / "config.json").write_text('{"model_type": "llama"}')
    fails(lambda: read_base_config(empty, 1117), f"{empty}/config.json is of a llama model, not qwen2_vl", BASE_HINT)
    with pytest.raises(UserError, match=r"config\.json cannot be read: "):
        read_base_config(tmp_path, 1117)


def test_tokenizer_saved_with_the_checkpoint_suffices(tmp_path: Path, build: Callable[..., VideoAlign]) -> None:
    root = Path(copied(tmp_path / "c"))
    build().tokenizer.save_pretrained(root / STEP / "tokenizer")
    (tmp_path / "base").mkdir()
    shutil.copy(DATA / "base_model" / "config.json", tmp_path / "base")
    reward = build(checkpoint=str(root), base_model=str(tmp_path / "base"))
    assert reward.score_videos([source("v0")], PROMPTS[:1]) == build().score_videos([source("v0")], PROMPTS[:1])
    assert Tokens.of(reward.tokenizer).rewards == tuple(GOLDEN["meta"]["special_token_ids_tiny"])


def test_no_training_library_is_needed() -> None:
    imported = set()
    for file in (Path(__file__).parents[2] / "score" / "videoalign").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    assert not imported & {"peft", "trl", "decord", "torchvision", "qwen_vl_utils"}
    assert {"torch", "transformers", "safetensors"} <= imported
