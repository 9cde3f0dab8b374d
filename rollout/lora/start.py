"""What [model] of run.toml lays on the base model: checked against its layers before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rollout.lora.adapter import put_on
from rollout.lora.find import Start, find_lora, locate_lora
from rollout.lora.merged import BaseLora
from rollout.lora.read import Lora, read_lora
from rollout.policy.folder import EXPERT_FOLDERS, Layout, read_part
from rollout.policy.full import is_full
from rollout.policy.sizes import TransformerConfig, meta_expert
from shards.errors import UserError
from shards.files import read_json
from shards.records.kinds import read_model_record
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from rollout.policy.experts import ExpertWeights
    from shards.config import ModelConfig

LORA, BASE_LORA = "model.lora", "model.base_lora"


def open_start(first: str, second: str, layout: Layout) -> Start | None:
    """What `model.lora` and `model.lora_2` name: a folder of whole transformers, or LoRAs of one expert or both.

    Raises UserError where they are not clear, cannot be read, do not fit the model, or cannot be trained.
    """
    if not first and not second:
        return None
    place = None if second else locate_lora(LORA, first)
    if place is not None and is_full(place):
        return Start(None, place)
    _check_experts(LORA, place, layout)
    files = find_lora(LORA, first if place is None else str(place), second, layout.expert_ids)
    if not files:
        raise UserError(f"{LORA} = {first!r}, {LORA}_2 = {second!r} name no file", "leave both empty instead")
    for expert, file in files.items():
        lora = read_lora(file)
        if lora.is_dora:
            problem = f"{file.weights}: a DoRA ({_magnitude(lora)}), but only LoRA is trained"
            raise UserError(problem, "name it in model.base_lora, which merges it into the model")
        check_fit(lora, layout, expert)
    return Start(files, place)


def of_one_expert(model: ModelConfig, layout: Layout) -> list[str]:
    """A sentence for the user about each LoRA that only one of two experts gets, unless `none` says so.

    Raises UserError as `find_lora`.
    """
    if len(layout.expert_ids) == 1:
        return []
    said = []
    for setting, first, second, without in (
        (LORA, model.lora, model.lora_2, "starts without one"),
        (BASE_LORA, model.base_lora, model.base_lora_2, "stays without one"),
    ):
        if second and not first:
            said.append(
                f"{setting}_2: {second} is loaded into the low-noise expert, and the high-noise expert {without}"
            )
        elif first and not second:
            place = locate_lora(setting, first)
            if not is_full(place) and find_lora(setting, str(place), "", layout.expert_ids).keys() == {0}:
                said.append(
                    f"{setting}: {first} is one LoRA; it is loaded into the high-noise expert, as in diffusers, and "
                    f"the low-noise expert {without} (to use it on both, name it in {setting}_2 too)"
                )
    return said


def open_base(first: str, second: str, scale: float, layout: Layout) -> BaseLora | None:
    """What `model.base_lora` and its companions name. Raises UserError as `open_start`."""
    place = locate_lora(BASE_LORA, first) if first and not second else None
    if place is not None and is_full(place):
        problem = f"{BASE_LORA}: {place} holds whole transformers, not a LoRA"
        raise UserError(problem, "export it as a model folder, and name that in model.path")
    _check_experts(BASE_LORA, place, layout)
    base = BaseLora.open(first if place is None else str(place), second, scale, layout.expert_ids, place)
    for expert in layout.expert_ids if base else ():
        lora = base.read(expert) if base else None
        if lora is not None:
            check_fit(lora, layout, expert)
    return base


def _check_experts(setting: str, place: Path | None, layout: Layout) -> None:
    """UserError for a policy of two experts on one: its high-noise half alone would fit."""
    if place is not None and len(layout.expert_ids) == 1 and (place / EXPERT_NAMES[1]).is_dir():
        raise UserError(
            f"{setting}: {place} holds adapters of two experts, but {layout.folder} has one",
            f"name the model it was trained on in model.path, or the folder of one adapter in {setting}",
        )


def check_fit(lora: Lora, layout: Layout, expert: int) -> None:
    """UserError where a LoRA has other layers or shapes than an expert, of which only the configuration is read."""
    config = read_part(TransformerConfig, layout.folder / EXPERT_FOLDERS[expert], "save the transformer too")
    put_on(meta_expert(config, int(config["num_layers"])), lora)


def check_records(experts: ExpertWeights) -> None:
    """UserError for a LoRA that says that it was trained on another base than it is laid on here."""
    if experts.base_lora is not None:
        _check_record(BASE_LORA, experts.base_lora.folder, experts.model_fingerprint, experts.layout)
    if experts.start is not None:
        _check_record(LORA, experts.start.folder, experts.base_fingerprint, experts.layout)


def check_model(experts: ExpertWeights, path: Path) -> None:
    """UserError where the base model, or the LoRA merged into it, is not the one in model.json, if that is there."""
    known = read_model_record(path) if path.exists() else None
    if known is None or known.base == experts.base_fingerprint:
        return
    if (known.model or known.base) != experts.model_fingerprint:
        raise UserError(
            f"{experts.layout.folder} is not the model this run began with ({known.path})",
            f"{path} has its fingerprint; restore the model, or start a new run",
        )
    problem = "is not what this run began with" if experts.base_lora else "is empty, but this run began with one"
    if known.base_lora is None:
        problem = "is set, but this run began without one"
    hint = f"{path} has the sha256 of its files and its strength; restore them, or start a new run"
    raise UserError(f"{BASE_LORA} {problem}", hint)


def _check_record(setting: str, folder: Path | None, expected: str, layout: Layout) -> None:
    for record in (folder / "policy.json", folder / "export.json") if folder else ():
        base = read_json(record).get("base") if record.is_file() else None
        if base is not None and base != expected:
            raise UserError(
                f"{setting}: {folder} was trained on another base model than {layout.folder}",
                f"{record} has the fingerprint of its base; name that model in model.path, and in model.base_lora the "
                "LoRA that was beneath it, if there was one",
            )


def _magnitude(lora: Lora) -> str:
    return next(name for name in lora.state if ".lora_magnitude_vector" in name)


def start_sizes(first: str, second: str, layout: Layout) -> list[tuple[int, int]]:
    """(numbers, largest rank) of each LoRA that `model.lora` and `model.lora_2` bring, for `plan-memory`.

    None of them where they name nothing, or whole transformers. Raises UserError as `open_start`; weights of the model
    need not be there.
    """
    start = open_start(first, second, layout)
    states = [read_lora(file).state for file in (start.files if start and start.files else {}).values()]
    return [
        (
            sum(value.numel() for value in state.values()),
            max(len(value) for name, value in state.items() if name.endswith(".lora_A.weight")),
        )
        for state in states
    ]
