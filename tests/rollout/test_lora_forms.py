"""model.lora takes what `load_lora_weights` takes, bit for bit, and refuses in one sentence what that would drop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from rollout.lora.find import LoraFile
from rollout.lora.read import read_lora
from rollout.policy.plain import probe, round_adapter, settle
from shards.errors import UserError
from shards.plan import Arithmetic
from tests.support import lora_forms as forms
from tests.support.lora_forms import Tensors, answers, load, same
from tests.support.tiny_models import tiny_transformer

Maker = Callable[[WanTransformer3DModel, int], Tensors]


def ends(model: WanTransformer3DModel, seed: int) -> Tensors:
    """Layers outside of the blocks too, as distilled LoRAs have them."""
    generator = torch.Generator().manual_seed(seed)
    found = forms.native(model, seed, bias=True)
    for name, ours in (
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("head.head", "proj_out"),
    ):
        outputs, inputs = model.get_submodule(ours).weight.shape
        found[f"diffusion_model.{name}.lora_A.weight"] = 0.1 * torch.randn(2, inputs, generator=generator)
        found[f"diffusion_model.{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, 2, generator=generator)
        found[f"diffusion_model.{name}.diff_b"] = 0.1 * torch.randn(outputs, generator=generator)
    return found


def head_difference(model: WanTransformer3DModel, seed: int) -> Tensors:
    """The whole difference of the last layer, which diffusers turns into a LoRA of its full rank."""
    found = forms.native(model, seed, bias=True)
    found["diffusion_model.head.head.diff"] = torch.full(tuple(model.proj_out.weight.shape), 0.01)
    found["diffusion_model.head.head.diff_b"] = torch.full(tuple(model.proj_out.bias.shape), 0.02)
    return found


def mixed_ranks(model: WanTransformer3DModel, seed: int) -> Tensors:
    """Feed-forward layers of another rank than attention."""
    small, large = forms.native(model, seed, 2), forms.native(model, seed, 5)
    return forms.diffusers_keys({name: (large if "ffn" in name else small)[name] for name in small})


def fewer_layers(model: WanTransformer3DModel, seed: int) -> Tensors:
    """Only queries of the last block."""
    return {name: value for name, value in forms.native(model, seed).items() if "blocks.1.self_attn.q" in name}


FORMS: dict[str, Maker] = {
    "diffusers": lambda model, seed: forms.diffusers_keys(forms.native(model, seed)),
    "diffusers, biases": lambda model, seed: forms.diffusers_keys(forms.native(model, seed, bias=True)),
    "diffusers, mixed ranks": mixed_ranks,
    "native": forms.native,
    "native, alpha": lambda model, seed: forms.native(model, seed, alpha=3.0),
    "native, down and up, alpha": lambda model, seed: forms.renamed(
        forms.native(model, seed, alpha=3.0), ("lora_A", "lora_down"), ("lora_B", "lora_up")
    ),
    "native, biases": lambda model, seed: forms.native(model, seed, bias=True),
    "native, ends": ends,
    "native, head.diff": head_difference,
    "native, fewer layers": fewer_layers,
    "musubi": lambda model, seed: forms.musubi_keys(forms.native(model, seed, alpha=3.0)),
    "half precision": lambda model, seed: {
        name: value.bfloat16() for name, value in forms.native(model, seed, alpha=3.0).items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_gives_the_velocities_of_diffusers_bit_for_bit(form: str, tiny_t2v: Path, tmp_path: Path) -> None:
    file = forms.write(tmp_path / "any name.safetensors", FORMS[form](tiny_transformer(1), 7))
    policy = load(tiny_t2v, lora=file)
    expected = forms.plain(tiny_t2v, file)
    assert same(answers(policy), expected)
    assert not same(answers(load(tiny_t2v)), expected)
    assert all(".policy." in name and value.dtype == torch.float32 for name, value in policy.experts.trainable(0))
    with policy.experts.reference():
        assert same(answers(policy), answers(load(tiny_t2v)))


@pytest.mark.parametrize("layout", ["t2v2", "i2v2", "ti2v"])
@pytest.mark.parametrize("form", ["native, alpha", "diffusers, biases", "musubi"])
def test_experts_get_their_own_file_in_every_layout(
    form: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{layout}")
    inputs = {"t2v2": (16, 16), "i2v2": (36, 16), "ti2v": (48, 48)}[layout]
    names = ["high_noise_model", "low_noise_model"][: 1 if layout == "ti2v" else 2]
    files = [
        forms.write(tmp_path / f"{name}.safetensors", FORMS[form](tiny_transformer(1, *inputs), seed))
        for seed, name in enumerate(names)
    ]
    expected = forms.plain(model, *files)
    assert same(answers(load(model, lora=tmp_path)), expected)
    if len(files) == 2:
        assert same(answers(load(model, lora=files[0], lora_2=files[1])), expected)
        assert not same(answers(load(model, lora=files[1], lora_2=files[0])), expected)


def test_alpha_of_the_metadata_counts(tiny_t2v: Path, tmp_path: Path) -> None:
    """As `save_lora_weights` writes it, with patterns of ranks and alphas, and with the scale of rsLoRA."""
    every: list[dict[str, Any]] = [
        {"lora_alpha": 12},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 8, "rank_pattern": {"ffn.net.2": 2}, "alpha_pattern": {"to_v": 1}},
    ]
    for number, options in enumerate(every):
        module = tiny_transformer(1)
        targets = ["to_q", "to_v", "ffn.net.2"]
        module.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options))
        folder = tmp_path / str(number)
        WanPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(module),
            transformer_lora_adapter_metadata=module.peft_config["default"].to_dict(),
        )
        settle(module)
        policy = load(tiny_t2v, lora=folder)
        assert same(answers(policy), [probe(module, policy.layout)])
        assert same(answers(policy), forms.plain(tiny_t2v, folder / "pytorch_lora_weights.safetensors"))


def test_a_half_precision_model_computes_as_diffusers_with_the_adapter_kept_in_fp32(
    tiny_t2v: Path, tmp_path: Path
) -> None:
    """diffusers rounds the LoRA to the dtype of the model; here it stays fp32, because it is trained, and its products
    have the dtype of the model. (In layers that diffusers keeps in fp32, those of the timestep, they are in fp32.)"""
    file = forms.write(tmp_path / "a.safetensors", FORMS["native, biases"](tiny_transformer(1), 7))
    policy = load(tiny_t2v, lora=file, dtype="bfloat16")
    expected = forms.plain(tiny_t2v, file, dtype="bfloat16")
    assert same(answers(policy), expected)
    assert {value.dtype for _, value in policy.experts.trainable(0)} == {torch.float32}
    policy.experts.compute_as(Arithmetic(adapters="float32"))  # of plans from before
    (difference,) = [(a - b).abs().max() for a, b in zip(answers(policy), expected, strict=True)]
    assert 0 < difference < 0.05 * expected[0].abs().max()
    round_adapter(policy.experts.module(0), "bfloat16")
    assert same(answers(policy), expected)


def test_forms_that_diffusers_ignores_are_what_it_loads_under_its_own_names(tiny_t2v: Path, tmp_path: Path) -> None:
    """DiffSynth's `.lora_A.default.weight`, and keys without the prefix, whichever names follow."""
    tensors = forms.native(tiny_transformer(1), 7)
    expected = forms.plain(tiny_t2v, forms.write(tmp_path / "native.safetensors", tensors))
    named, bare = (".weight", ".default.weight"), ("diffusion_model.", "")
    for number, other in enumerate((
        forms.renamed(tensors, named),
        forms.renamed(tensors, named, bare),
        forms.renamed(tensors, bare),
        forms.renamed(forms.diffusers_keys(tensors), named),
        forms.renamed(forms.diffusers_keys(tensors), ("transformer.", "")),
    )):  # fmt: skip
        file = forms.write(tmp_path / f"{number}.safetensors", other)
        assert same(answers(load(tiny_t2v, lora=file)), expected), number


def test_a_peft_folder_is_what_peft_makes_of_it(tiny_t2v: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], rank_pattern={"ffn.net.2": 2}, init_lora_weights=False
    )
    torch.manual_seed(3)
    PeftModel(tiny_transformer(1), config).save_pretrained(tmp_path / "peft")
    theirs = PeftModel.from_pretrained(tiny_transformer(1), tmp_path / "peft")
    settle(theirs)
    policy = load(tiny_t2v, lora=tmp_path / "peft")
    expected = [probe(theirs.base_model.model, policy.layout)]
    assert same(answers(policy), expected)
    assert same(answers(load(tiny_t2v, lora=tmp_path / "peft" / "adapter_model.safetensors")), expected)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    stored = load_file(weights)
    forms.write(weights, forms.renamed(stored, ("base_model.model.", "")))  # the configuration counts all the same
    assert same(answers(load(tiny_t2v, lora=tmp_path / "peft")), expected)
    forms.write(weights, stored)
    (tmp_path / "peft" / "adapter_config.json").rename(tmp_path / "peft" / "config.json")
    assert "keys of a PEFT folder (base_model.model.blocks.0.attn1.to_q.lora_A.weight), but no adapter_config.json" in (
        refused(tiny_t2v, tmp_path / "peft")
    )
    forms.write(weights, stored)
    settings = json.loads((tmp_path / "peft" / "config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "LOHA"}))
    assert "LOHA, not LoRA" in refused(tiny_t2v, tmp_path / "peft")


def test_a_peft_folder_of_the_official_code(tiny_t2v: Path, tmp_path: Path) -> None:
    """Its modules have the official names; alpha stands in its configuration."""
    tensors = forms.native(tiny_transformer(1), 7)
    names = forms.renamed(tensors, ("diffusion_model.", "base_model.model."))
    forms.write(tmp_path / "peft" / "adapter_model.safetensors", names)
    LoraConfig(r=4, lora_alpha=8, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"]).save_pretrained(
        tmp_path / "peft"
    )
    twice = {name: 2 * value if "lora_B" in name else value for name, value in tensors.items()}
    expected = forms.plain(tiny_t2v, forms.write(tmp_path / "b.safetensors", twice))
    policy = load(tiny_t2v, lora=tmp_path / "peft")
    assert same(answers(policy), expected)
    policy.experts.save_lora(tmp_path / "saved")
    files = [tmp_path / "saved" / "high_noise" / "pytorch_lora_weights.safetensors"]
    assert same(answers(load(tiny_t2v, lora=tmp_path / "saved")), expected)
    assert same(forms.plain(tiny_t2v, *files), expected)


def refused(model: Path, lora: Path, **options: Any) -> str:
    """The sentence with which a LoRA is refused."""
    with pytest.raises(UserError) as caught:
        load(model, lora=lora, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


KEY = "diffusion_model.blocks.0"
OURS = "transformer.blocks.0.attn1.to_q"


def without(tensors: Tensors, text: str) -> Tensors:
    return {name: value for name, value in tensors.items() if text not in name}


def comfy() -> Tensors:
    return forms.native(tiny_transformer(1), 7, bias=True)


def plain_names() -> Tensors:
    return forms.diffusers_keys(forms.native(tiny_transformer(1), 7))


def musubi() -> Tensors:
    return forms.musubi_keys(forms.native(tiny_transformer(1), 7, alpha=3.0))


REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "difference of a norm": (
        lambda: comfy() | {f"{KEY}.norm3.diff": torch.ones(24), f"{KEY}.norm3.diff_b": torch.ones(24)},
        f"diffusers drops {KEY}.norm3.diff, {KEY}.norm3.diff_b without a word",
    ),
    "difference of a modulation and a layer": (
        lambda: comfy() | {f"{KEY}.diff_m": torch.ones(6, 24), f"{KEY}.self_attn.q.diff": torch.ones(24, 24)},
        f"diffusers drops {KEY}.diff_m, {KEY}.self_attn.q.diff without a word",
    ),
    "bias of time_projection alone": (
        lambda: comfy() | {"diffusion_model.time_projection.1.diff_b": torch.ones(144)},
        "diffusers drops diffusion_model.time_projection.1.diff_b without a word",
    ),
    "DoRA of kohya": (
        lambda: forms.native(tiny_transformer(1), 7) | {f"{KEY}.self_attn.q.dora_scale": torch.ones(24, 1)},
        f"diffusers cannot convert this file of ComfyUI keys: it does not know {KEY}.self_attn.q.dora_scale",
    ),
    "alpha without its layer": (
        lambda: forms.native(tiny_transformer(1), 7) | {"diffusion_model.head.head.alpha": torch.tensor(1.0)},
        "it does not know diffusion_model.head.head.alpha",
    ),
    "both notations": (
        lambda: comfy() | {f"{KEY}.self_attn.q.lora_down.weight": torch.ones(4, 24)},
        f"it does not know {KEY}.self_attn.q.lora_down.weight",
    ),
    "head.diff without its bias": (
        lambda: comfy() | {"diffusion_model.head.head.diff": torch.ones(64, 24)},
        "it has no diffusion_model.head.head.diff_b",
    ),
    "native, no blocks": (
        lambda: {"diffusion_model.head.head.lora_A.weight": torch.ones(4, 24)},
        "it finds no blocks, but diffusion_model.head.head.lora_A.weight",
    ),
    "musubi, attention alone": (
        lambda: without(musubi(), "ffn"),
        "diffusers cannot convert this file of musubi keys: it has no lora_unet_blocks_0_ffn_0.lora_down.weight "
        "(hint: diffusers wants attention, feed-forward and alpha of every block; convert_lora.py of musubi-tuner",
    ),
    "musubi without alpha": (lambda: without(musubi(), "alpha"), "it has no lora_unet_blocks_0_self_attn_q.alpha"),
    "musubi with dots": (
        lambda: forms.renamed(comfy(), ("diffusion_model.", "lora_unet_")),
        "it does not know lora_unet_blocks.0.cross_attn.k.diff_b, lora_unet_blocks.0.cross_attn.k.lora_A.weight and",
    ),
    "musubi, more than blocks": (
        lambda: musubi() | {"lora_unet_head_head.lora_up.weight": torch.ones(64, 4)},
        "it does not know lora_unet_head_head.lora_up.weight",
    ),
    "two experts in one": (
        lambda: plain_names() | forms.renamed(plain_names(), ("transformer.", "transformer_2.")),
        "diffusers does not load transformer_2.blocks.0.attn1.to_k.lora_A.weight, transformer_2.blocks.0.attn1.to_k."
        "lora_B.weight and 38 more keys as LoRA of one expert (hint: the low-noise expert wants a file of its own",
    ),
    "alpha under the names of diffusers": (
        lambda: plain_names() | {f"{OURS}.alpha": torch.tensor(2.0)},
        f"diffusers does not load {OURS}.alpha as LoRA of one expert",
    ),
    "down and up under the names of diffusers": (
        lambda: {f"{OURS}.lora_down.weight": torch.ones(4, 24), f"{OURS}.lora_up.weight": torch.ones(24, 4)},
        f"diffusers does not load {OURS}.lora_down.weight, {OURS}.lora_up.weight as LoRA",
    ),
    "LoKr": (
        lambda: {f"{OURS}.lokr_w1": torch.ones(4, 4), f"{OURS}.lokr_w2": torch.ones(6, 6)},
        f"diffusers does not load {OURS}.lokr_w1, {OURS}.lokr_w2 as LoRA of one expert (hint: LoKr and LoHa are not",
    ),
    "a text encoder too": (
        lambda: plain_names() | {"text_encoder.block.0.q.lora_A.weight": torch.ones(4, 24)},
        "diffusers does not load text_encoder.block.0.q.lora_A.weight as LoRA",
    ),
    "a deeper model": (
        lambda: plain_names() | forms.renamed(plain_names(), ("blocks.1.", "blocks.7.")),
        "does not fit this model: blocks.7.attn1.to_k.lora_A.weight is [4, 24] there, and here does not exist",
    ),
    "only layers that are not there": (
        lambda: {name.replace("blocks.0.", "blocks.7."): value for name, value in plain_names().items()
                 if "blocks.0." in name},
        "has no layer of this model",
    ),
    "a layer that takes none": (
        lambda: {f"transformer.blocks.0.attn1.norm_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"},
        "peft puts no LoRA on blocks.0.attn1.norm_q: Target module",
    ),
    "another width": (
        lambda: plain_names() | {f"{OURS}.lora_A.weight": torch.ones(4, 25)},
        "does not fit this model: blocks.0.attn1.to_q.lora_A.weight is [4, 25] there, and here is [4, 24]",
    ),
    "no up": (
        lambda: without(plain_names(), "blocks.0.attn1.to_q.lora_B"),
        "does not fit this model: blocks.0.attn1.to_q.lora_B.weight is missing there",
    ),
    "no down": (
        lambda: without(plain_names(), "blocks.0.attn1.to_q.lora_A"),
        "does not fit this model: blocks.0.attn1.to_q.lora_A.weight is missing there",
    ),
    "biases of some layers": (
        lambda: without(comfy(), "blocks.1.ffn.2.diff_b"),
        "does not fit this model: blocks.1.ffn.net.2.lora_B.bias is missing there (hint: diffusers wants A, B and",
    ),
    "bias without weights": (
        lambda: without(comfy(), "blocks.1.ffn.2.lora"),
        "blocks.1.ffn.net.2.lora_A.weight and 1 more is missing there",
    ),
    "DoRA": (
        lambda: plain_names() | {
            name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32 if "net.0" in name else 24)
            for name in plain_names() if "lora_A" in name
        },
        "a DoRA (blocks.0.attn1.to_k.lora_magnitude_vector), but only LoRA is trained (hint: name it in model.base_lo",
    ),
    "numbers that cannot be multiplied": (
        lambda: {name: value.to(torch.float8_e4m3fn)
                 for name, value in forms.native(tiny_transformer(1), 7, alpha=3.0).items()},
        "diffusers cannot convert this file of ComfyUI keys: ",
    ),
    "two alphas of a layer": (
        lambda: forms.native(tiny_transformer(1), 7) | {f"{KEY}.self_attn.q.alpha": torch.ones(2)},
        "diffusers cannot convert this file of ComfyUI keys: a Tensor with 2 elements cannot be converted to Scalar",
    ),
    "nothing": (dict, "holds no tensor"),
    "a whole model": (lambda: {"blocks.0.attn1.to_q.weight": torch.ones(24, 24)}, "as LoRA of one expert"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_diffusers_refuses_or_drops_is_one_sentence(case: str, tiny_t2v: Path, tmp_path: Path) -> None:
    make, sentence = REFUSED[case]
    file = forms.write(tmp_path / "a.safetensors", make())
    found = refused(tiny_t2v, file)
    assert found.startswith(f"{file}: ")
    assert sentence in found


def test_what_is_dropped_and_zero_changes_nothing(tiny_t2v: Path, tmp_path: Path) -> None:
    """Extracted LoRAs have differences of norms that are zero."""
    tensors = comfy()
    file = forms.write(tmp_path / "a.safetensors", tensors | {f"{KEY}.norm3.diff": torch.zeros(24)})
    assert same(answers(load(tiny_t2v, lora=file)), forms.plain(tiny_t2v, file))


def test_files_that_are_no_lora(tiny_t2v: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refused(tiny_t2v, path) == (
        f"{path}: a pointer of git-lfs, not the file itself (hint: fetch it: git lfs pull)"
    )
    path.write_bytes(b"not safetensors")
    assert "cannot be read as LoRA weights" in refused(tiny_t2v, path)
    forms.write(path, plain_names())
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read as LoRA weights" in refused(tiny_t2v, path)
    forms.write(path, plain_names(), {"lora_adapter_metadata": "{"})
    assert "its metadata are not a JSON object" in refused(tiny_t2v, path)
    forms.write(path, plain_names(), {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.odd": 1}'})
    assert "its metadata are not a configuration of a LoRA: " in refused(tiny_t2v, path)
    forms.write(path, plain_names(), {"lora_adapter_metadata": '{"transformer.r": 3}'})
    assert "lora_A.weight is [4, 24] there, and here is [3, 24]" in refused(tiny_t2v, path)
    forms.write(path, plain_names(), {"lora_adapter_metadata": '{"transformer.modules_to_save": ["norm1"]}'})
    assert "holds whole modules beside the LoRA (norm1)" in refused(tiny_t2v, path)


def test_a_way_to_begin_that_changes_the_base_is_not_taken_from_the_metadata(tiny_t2v: Path, tmp_path: Path) -> None:
    """PiSSA subtracts its first adapter from the weights when it is made, not when a trained one is loaded."""
    metadata = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.init_lora_weights": "pissa"}
    file = forms.write(tmp_path / "a.safetensors", plain_names(), {"lora_adapter_metadata": json.dumps(metadata)})
    same_file = forms.write(tmp_path / "b.safetensors", plain_names())
    assert same(answers(load(tiny_t2v, lora=file)), forms.plain(tiny_t2v, same_file))


def test_reading_does_not_touch_the_random_numbers(tiny_t2v: Path, tmp_path: Path) -> None:
    policy = load(tiny_t2v, lora=forms.write(tmp_path / "a.safetensors", comfy()))
    state = torch.random.get_rng_state()
    policy.experts.become(None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_strength_of_a_native_file_is_folded_as_diffusers_does(tmp_path: Path) -> None:
    tensors = forms.native(tiny_transformer(1), 7, alpha=3.0)
    lora = read_lora(LoraFile(forms.write(tmp_path / "a.safetensors", tensors), "a"))
    down = tensors["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]
    assert (lora.config.r, lora.config.lora_alpha) == (4, 4)
    product = lora.state["blocks.0.attn1.to_q.lora_B.weight"] @ lora.state["blocks.0.attn1.to_q.lora_A.weight"]
    expected = tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"] @ down * 3 / 4
    torch.testing.assert_close(product, expected)
