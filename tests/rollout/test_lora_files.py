"""Which file is the LoRA of which expert, and the sentences where that is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.lora.find import find_lora, hashes_of, told_apart
from shards.errors import UserError
from tests.support import lora_forms as forms
from tests.support.lora_forms import answers, load, same
from tests.support.tiny_models import tiny_transformer

ONE, TWO = (0,), (0, 1)


def touch(folder: Path, *names: str) -> Path:
    """Empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def sentence(setting: str, text: Path | str, experts: tuple[int, ...], second: Path | str = "") -> str:
    with pytest.raises(UserError) as caught:
        find_lora(setting, str(text), str(second), experts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("high_noise_model", "low_noise_model"),
        ("wan22_style_HighNoise", "wan22_style_LowNoise"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", "Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise"),
        ("WAN2.2-HighNoise_Photo_v3", "WAN2.2-LowNoise_Photo_v3"),
        ("style_hinoise", "style_lownoise"),
        ("smoke-H-e20", "smoke-L-e35"),
        ("smoke_hn", "smoke_ln"),
        ("smokeH", "smokeL"),
        ("high quality high noise", "high quality low noise"),
        ("w22High", "w22Low"),
    ],
)
def test_pairs_as_people_name_them(high: str, low: str) -> None:
    pair = (f"{high}.safetensors", f"{low}.safetensors")
    assert told_apart(pair) == pair
    assert told_apart(pair[::-1]) == pair


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["high_noise.safetensors"],
        ["style_high_noise.safetensors", "style_high_noise_v2.safetensors"],
        ["style_high.safetensors", "other.safetensors"],
        ["highres.safetensors", "lowres.safetensors"],
        ["slow.safetensors", "thigh.safetensors"],
        ["a_high_low.safetensors", "b_high_low.safetensors"],
        ["a_high_noise.safetensors", "b_L.safetensors"],
        ["high.safetensors", "low.safetensors", "low_v2.safetensors"],
    ],
)
def test_names_that_do_not_say_it(names: list[str]) -> None:
    assert told_apart(names) is None
    assert told_apart(names[::-1]) is None


def test_a_folder_of_one_expert(tmp_path: Path) -> None:
    folder = touch(tmp_path / "one", "wan_style_lora.safetensors", "README.md")
    assert find_lora("model.lora", str(folder), "", ONE)[0].weights == folder / "wan_style_lora.safetensors"
    touch(folder, "other.safetensors")
    assert sentence("model.lora", folder, ONE) == (
        f"model.lora: {folder} holds other.safetensors, wan_style_lora.safetensors: which one? "
        "(hint: name the file in model.lora)"
    )
    touch(folder, "pytorch_lora_weights.safetensors")  # diffusers takes this one too
    assert find_lora("model.lora", str(folder), "", ONE)[0].name == "pytorch_lora_weights.safetensors"
    assert sentence("model.lora", folder, ONE, folder) == (
        f"model.lora_2: {folder}, but the model has one expert (hint: name its LoRA in model.lora alone)"
    )
    named = find_lora("model.lora", str(folder / "other.safetensors"), "", ONE)
    assert named[0].name == "other.safetensors"


def test_a_folder_of_two_experts(tmp_path: Path) -> None:
    ways = (
        "(hint: name the folder of a pair (high_noise/ and low_noise/, or files whose names say high and low), or the "
        "high-noise file in model.lora and the low-noise file in model.lora_2; the same file twice is the same LoRA on "
        "both)"
    )
    folder = touch(tmp_path / "two", "wan_style_lora.safetensors")
    touch(folder, "b.safetensors")
    assert sentence("model.lora", folder, TWO) == (
        f"model.lora: {folder} holds b.safetensors, wan_style_lora.safetensors: which is of which expert? {ways}"
    )
    touch(folder, "high_noise/any.safetensors")
    assert sentence("model.lora", folder, TWO) == (
        f"model.lora: {folder}/low_noise: no such folder, but the model has two experts {ways}"
    )
    touch(folder, "low_noise/any.safetensors")
    found = find_lora("model.lora", str(folder), "", TWO)
    assert {expert: file.name for expert, file in found.items()} == {
        0: "high_noise/any.safetensors",
        1: "low_noise/any.safetensors",
    }
    touch(folder, "low_noise/more.safetensors")
    assert "low_noise holds any.safetensors, more.safetensors: which one?" in sentence("model.lora", folder, TWO)


def test_one_file_goes_on_the_high_noise_expert(tmp_path: Path) -> None:
    style = touch(tmp_path / "style", "wan_style_lora.safetensors")
    peft = touch(tmp_path / "peft", "adapter_config.json", "adapter_model.safetensors")
    names = ("wan_high_noise_L.safetensors", "low_poly.safetensors", "wan21_low_rank32.safetensors")
    others = [touch(tmp_path / name[:-12], name) / name for name in names]
    files = (style / "wan_style_lora.safetensors", peft / "adapter_model.safetensors")
    for place in (style, peft, *files, *others):
        (file,) = find_lora("model.lora", str(place), "", TWO).values()
        assert file.name == f"high_noise/{file.weights.name}"


@pytest.mark.parametrize("name", [
    "wan_low_noise.safetensors", "wanLowNoise.safetensors", "wan-LOW.safetensors", "lora_low.safetensors",
    "low_noise/pytorch_lora_weights.safetensors", "my_low_noise/adapter_model.safetensors",
])  # fmt: skip
def test_one_file_of_the_low_noise_expert_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = touch(tmp_path, name) / name
    for place in (path, path.parent) if "/" in name else (path,):
        assert sentence("model.lora", place, TWO) == (
            f"model.lora: {path} is of the low-noise expert, by its name "
            "(hint: name it in model.lora_2 instead; if it is of the high-noise expert, set model.lora_2 = none)"
        )
    assert find_lora("model.lora", str(path), "none", TWO).keys() == {0}
    assert find_lora("model.lora", "", str(path), TWO).keys() == {1}


def test_one_expert_may_go_without(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.safetensors")
    file = str(folder / "a.safetensors")
    assert find_lora("model.base_lora", file, "none", TWO).keys() == {0}
    assert find_lora("model.base_lora", "", file, TWO).keys() == {1}
    assert find_lora("model.base_lora", file, file, TWO).keys() == {0, 1}


def test_places_that_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    missing = tmp_path / "missing"
    takes = (
        "(hint: it takes a .safetensors file, a folder, a URL, or a name of the hub that is in the local cache)"
    )  # fmt: skip
    assert sentence("model.lora", missing, ONE) == f"model.lora: {missing}: no such file or folder {takes}"
    assert sentence("model.lora", "lora", ONE) == f"model.lora: lora: no such file or folder {takes}"
    assert sentence("model.base_lora", "owner/name", ONE) == (
        "model.base_lora: owner/name: no such file or folder, and not in the local cache of the hub "
        "(hint: is it on the hub? `hf download owner/name` fetches it, or write hf://owner/name)"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert sentence("model.lora", empty, ONE) == (
        f"model.lora: {empty} holds no .safetensors file (hint: model.lora takes a file, or the folder it lies in)"
    )
    touch(empty, "v1/a.safetensors")
    assert sentence("model.lora", empty, TWO).endswith(f"(hint: {empty}/v1 does: name it, or a file)")
    touch(empty, "a.bin")
    pickled = "pickled weights are not read: convert them"
    assert sentence("model.lora", empty, TWO) == (
        f"model.lora: {empty} holds a.bin, but no .safetensors file (hint: {pickled})"
    )
    path = empty / "a.bin"
    assert sentence("model.lora", path, ONE) == f"model.lora: {path} is no .safetensors file (hint: {pickled})"


def test_a_name_of_the_hub_is_found_in_the_local_cache(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--lightx2v--tiny" / "snapshots" / ("0" * 40)
    (tmp_path / "models--lightx2v--tiny" / "refs").mkdir(parents=True)
    (tmp_path / "models--lightx2v--tiny" / "refs" / "main").write_text("0" * 40)
    files = [snapshot / "4steps" / f"{side}_noise_model.safetensors" for side in ("high", "low")]
    for seed, file in enumerate(files):
        forms.write(file, forms.native(tiny_transformer(1), seed, alpha=8.0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = forms.plain(tiny_t2v2, *files)
    assert same(answers(load(tiny_t2v2, lora="lightx2v/tiny/4steps")), expected)
    both = [f"lightx2v/tiny/4steps/{side}_noise_model.safetensors" for side in ("high", "low")]
    assert same(answers(load(tiny_t2v2, lora=both[0], lora_2=both[1])), expected)
    assert sentence("model.lora", "lightx2v/tiny", TWO).endswith(f"(hint: {snapshot}/4steps does: name it, or a file)")
    assert sentence("model.lora", "lightx2v/tiny/none", TWO) == (
        f"model.lora: lightx2v/tiny/none: the local cache of the hub has no none there (hint: look in {snapshot})"
    )


def test_the_fingerprint_tells_experts_apart_and_knows_policy_folders(tmp_path: Path) -> None:
    """Two files in each other's place are another policy; the name of a policy folder's file is as it always was."""
    a, b = (forms.write(tmp_path / f"{name}.safetensors", forms.native(tiny_transformer(1), seed))
            for seed, name in enumerate("ab"))  # fmt: skip
    one = hashes_of(find_lora("model.lora", str(a), str(b), TWO))
    other = hashes_of(find_lora("model.lora", str(b), str(a), TWO))
    assert one.keys() == {"high_noise/a.safetensors", "low_noise/b.safetensors"}
    assert one.keys() != other.keys()
    policy = touch(tmp_path / "policy", *(f"{side}_noise/pytorch_lora_weights.safetensors" for side in ("high", "low")))
    assert hashes_of(find_lora("model.lora", str(policy), "", TWO)).keys() == {
        "high_noise/pytorch_lora_weights.safetensors",
        "low_noise/pytorch_lora_weights.safetensors",
    }
    assert hashes_of(find_lora("model.lora", str(policy), "", ONE)).keys() == {
        "high_noise/pytorch_lora_weights.safetensors"
    }


def test_a_pair_may_lie_in_policy_folders_under_any_name(tiny_t2v2: Path, tmp_path: Path) -> None:
    files = [
        forms.write(tmp_path / f"{side}_noise" / "my.safetensors", forms.native(tiny_transformer(1), seed))
        for seed, side in enumerate(("high", "low"))
    ]
    assert same(answers(load(tiny_t2v2, lora=tmp_path)), forms.plain(tiny_t2v2, *files))
    expected = forms.plain(tiny_t2v2, *files)
    for options in ({"lora": files[0].parent, "lora_2": files[1].parent}, {"lora": tmp_path, "lora_2": tmp_path}):
        assert same(answers(load(tiny_t2v2, **options)), expected)


def test_a_pair_is_not_half_taken_by_a_model_of_one_expert(tiny_t2v: Path, tmp_path: Path) -> None:
    for side in ("high", "low"):
        forms.write(tmp_path / f"{side}_noise" / "a.safetensors", forms.native(tiny_transformer(1), 1))
    for setting in ("lora", "base_lora"):
        with pytest.raises(
            UserError, match=rf"^model\.{setting}: {tmp_path} holds adapters of two experts, but .*has one"
        ):
            load(tiny_t2v, **{setting: tmp_path})
