"""Export: a trained policy as plain diffusers loads it, proven by loading it back before anything is published."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from rollout.export.model_card import model_card, reward_curve
from rollout.export.model_card_code import Base, ExportRecord, ExportWanted
from rollout.export.proof import Exported, beneath_in_diffusers, largest, prove
from rollout.lineage import averaged, check_committed, take_policy
from rollout.lora.adapter import fold_strength
from rollout.lora.find import WEIGHTS
from rollout.lora.merged import merge_adapter
from rollout.lora.native import save_native
from rollout.policy import Policy
from rollout.policy.folder import EXPERT_FOLDERS, Layout
from rollout.policy.full import is_full
from rollout.policy.plain import probe, round_adapter, save_expert, settle
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import publish_new, read_json, sha256_file, sync, to_json
from shards.locks import TEMPORARY, locked
from shards.process.progress import counted
from shards.records.kinds import read_policy
from shards.records.opening import inside
from shards.run import EXPERT_NAMES, Run, Stage
from shards.store.files import files_at

SCHEMA = 2
FORMATS = ("diffusers", "comfyui")
RECORD = "export.json"
SMALL = 1 << 30
"""Bytes of weights up to which an export is also proven by a call of the whole pipeline."""


@dataclass(frozen=True)
class ExportReport:
    """What `export` did."""

    path: Path
    iterations: int
    """Iterations after which the policy was."""
    skipped: bool
    """True when this very export was there already."""
    checked: str
    """How it was proven."""
    difference: float | None = None
    """Largest difference of an output of an expert from what it was in training; None when nothing was done."""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: {self.path} holds this policy already"
        return f"{self.path} written; {self.checked}; {self.seconds:.1f} s"


def export(
    run: Run, iterations: int, out: str | Path, *, average: bool = True, fuse: bool = False, format: str = "diffusers"
) -> ExportReport:
    """Write the policy after so many `iterations` to the new folder `out`, whole or not at all.

    A LoRA policy becomes high_noise/ (and low_noise/) with diffusers' own LoRA files, or, in the format `comfyui`, one
    file for each expert under Wan's own names; alpha/rank is multiplied into their weights. With `fuse`, or when all
    weights were trained, it becomes a whole pipeline folder. `average` takes the averaged weights where training kept
    them. Beside it lie README.md, the model card, and export.json with the sha256 of every file. Before that it is
    loaded by plain diffusers, on the CPU, and must answer as the policy does, bit for bit.

    Raises UserError for 0, which is the base, for a policy that is not trained yet, when `out` is taken and when the
    format cannot hold the policy, RunFailed when the proof fails or the disk is full, StillBusy when another process
    writes there.
    """
    began = time.monotonic()
    files, out = files_at(out)
    _check_format(format, fuse)
    files.fetch(out)
    stage = _stage(run, iterations)
    source = _source(stage, average)
    if format != "diffusers" and is_full(source):
        raise UserError(f"{source} holds all weights, and --format {format} is of LoRA", "leave out --format")
    wanted: ExportWanted = {
        "schema": SCHEMA,
        "iterations": iterations,
        "policy": read_policy(stage.policy_record_path).fingerprint,
        "average": source != stage.policy_dir,
        "fused": fuse or is_full(source),
        "format": format,
    }
    with locked(out.parent / f".{out.name}.export.lock") as held:
        if not held:
            raise StillBusy(f"{out} is being written by another process", "wait for it, or choose another folder")
        if out.exists() and _same(out, wanted):
            return ExportReport(out, iterations, True, str(read_json(out / RECORD).get("checked", "")))
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already and is not this export", "choose another folder, or remove it")
        with _published(out) as aside:
            checked, difference = _write(run, stage, source, aside, wanted)
        files.put_folder(out, last=RECORD)
    return ExportReport(out, iterations, False, checked, difference, time.monotonic() - began)


def _stage(run: Run, iterations: int) -> Stage:
    """The iteration that ended with the policy after so many of them."""
    if iterations < 1:
        hint = "the first policy of a run is that after 1 iteration; `eval` and `export` count alike"
        raise UserError(f"iteration {iterations} is the model itself, which needs no export", hint)
    stage = run.iteration(iterations - 1)
    if not stage.trained():
        problem = f"{run.path} has no policy after {counted(iterations, 'iteration')}: {stage.name} is not trained"
        raise UserError(problem, run.way_to_policy(stage.iteration))
    return stage


def _check_format(format: str, fuse: bool) -> None:
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format", f"there are: {', '.join(FORMATS)}")
    if fuse and format != "diffusers":
        raise UserError(f"--fuse writes a pipeline folder of diffusers, not --format {format}", "leave out one of them")


def _source(stage: Stage, average: bool) -> Path:
    folder = stage.fetched_policy()
    return (averaged(folder) if average else None) or folder


def _same(out: Path, wanted: ExportWanted) -> bool:
    """Whether `out` is the wanted export, every file of it untouched.

    The policy says which it is; older exports have no `iterations`, but `iteration`, which is one less.
    """
    if not (out / RECORD).is_file():
        return False
    record = read_json(out / RECORD)
    files = record.get("files")
    if not isinstance(files, dict) or any(not inside(name) or _hash(out / name) != files[name] for name in files):
        return False
    return all(record.get(name) == value for name, value in wanted.items() if name != "iterations")


def _write(run: Run, stage: Stage, source: Path, aside: Path, wanted: ExportWanted) -> tuple[str, float]:
    """Fill the folder `aside` and prove it; returns how it was proven, and how far its outputs are from training's."""
    policy = Policy.of(run.config.model.model_copy(update={"device": "cpu", "lora": "", "lora_2": ""}))
    identity = take_policy(run, run.iteration(stage.iteration + 1), policy)
    if wanted["average"]:
        check_committed(source, policy.experts.fingerprint(source))
        policy.experts.become(source)
    layout, base_lora = policy.layout, policy.experts.base_lora
    if run.config.model.merge_lora and policy.experts.has_lora:
        policy.experts.compute_as(replace(policy.experts.arithmetic, adapters="merged"))
    trained = _answers(policy)
    files = _write_pipeline(policy, aside) if wanted["fused"] else _write_lora(run, policy, aside, wanted["format"])
    answers = _answers(policy)
    whole = _weight_bytes(layout) <= SMALL
    modules = [policy.experts.module(expert) for expert in policy.layout.expert_ids] if whole else []
    model = policy.experts.model_fingerprint
    del policy  # a large model is in memory once
    exported = Exported(aside, layout, run.config.model.dtype, run.config.model.text_length, files, base_lora)
    prove(exported, answers, modules)
    del modules
    difference = largest(answers, trained)
    beneath = beneath_in_diffusers(exported, answers) if files and base_lora else None
    checked = _checked(whole, wanted, difference, beneath, run.config.model.merge_lora)
    facts: dict[str, object] = {
        **wanted,
        "base": identity["base"],
        "model": model,
        "run": run.path.resolve().name,
        "experts": [EXPERT_NAMES[expert] for expert in layout.expert_ids],
        "lora": {EXPERT_NAMES[expert]: path.relative_to(aside).as_posix() for expert, path in files.items()},
        "checked": checked,
    }
    if base_lora is not None:
        facts["base_lora"] = base_lora.record(beneath is not None)
    facts["files"] = {path.relative_to(aside).as_posix(): sha256_file(path) for path in _files(aside)}
    publish_new(aside / "README.md", model_card(run, cast(ExportRecord, facts), Base.of(run, layout)).encode())
    if curve := reward_curve(run, wanted["iterations"]):
        publish_new(aside / "reward.svg", curve.encode())
    publish_new(aside / RECORD, to_json(facts, aside / RECORD))
    return checked, difference


def _checked(whole: bool, wanted: ExportWanted, difference: float, beneath: float | None, merged: bool) -> str:
    """How an export was proven, in one sentence; `merged`: training added LoRA to the weights at every forward."""
    twice = "" if wanted["fused"] or wanted["format"] != "diffusers" else ", with its metadata and without,"
    text = f"loaded back by plain diffusers{twice} every expert's output equal bit for bit"
    if whole:
        text += ", and one call of the whole pipeline"
    if difference:
        why = "alpha/rank is in the weights, in the model's dtype"
        if wanted["fused"]:
            why = "merged weights are rounded"
        elif merged:
            why = "training adds LoRA to the weights first"
        text += f"; from the outputs in training they differ by at most {difference:.1e} ({why})"
    if beneath is not None:
        text += (
            f"; with the base LoRA fused by diffusers, as in the code below, outputs differ by at most {beneath:.1e}"
        )
    return text


def _write_lora(run: Run, policy: Policy, aside: Path, format: str) -> dict[int, Path]:
    """Write the LoRA of each expert with its whole strength in its weights, and round it as diffusers will."""
    files, name = {}, re.sub(r"[^\w.-]+", "_", run.path.resolve().name)
    for expert in policy.layout.expert_ids:
        side = EXPERT_NAMES[expert]
        fold_strength(policy.experts.module(expert))
        if format == "comfyui":
            file = f"{name}_{side}.safetensors" if len(policy.layout.expert_ids) > 1 else f"{name}.safetensors"
            files[expert] = aside / file
            save_native(policy.experts.module(expert), files[expert])
        else:
            files[expert] = aside / side / WEIGHTS
    if format == "diffusers":
        policy.experts.save_lora(aside)
    for expert in policy.layout.expert_ids:
        round_adapter(policy.experts.module(expert), policy.dtype)
    return files


def _write_pipeline(policy: Policy, aside: Path) -> dict[int, Path]:
    """Merge the adapters and write the whole pipeline folder."""
    layout, adapted = policy.layout, policy.experts.has_lora
    for part in layout.parts:
        if part not in EXPERT_FOLDERS:
            shutil.copytree(layout.folder / part, aside / part)
    shutil.copyfile(layout.folder / "model_index.json", aside / "model_index.json")
    for expert in policy.layout.expert_ids:
        module = policy.experts.module(expert)
        if adapted:
            merge_adapter(module)
            settle(module)
        save_expert(module, aside / EXPERT_FOLDERS[expert])
    return {}


def _answers(policy: Policy) -> dict[int, Tensor]:
    return {expert: probe(policy.experts.module(expert), policy.layout) for expert in policy.layout.expert_ids}


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A private folder beside `out` that takes its name when all is done and synced, and vanishes otherwise.

    The caller holds the lock of `out`: private folders found here belong to killed processes and are removed.
    """
    begin = f"{TEMPORARY}{out.name}-"
    try:
        for leftover in out.parent.glob(f"{begin}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside = out.parent / f"{begin}{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        try:
            yield aside
            for path in (*aside.rglob("*"), aside):
                sync(path)
            os.rename(aside, out)  # replaces an empty folder, never one with files
            sync(out.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise RunFailed(f"{out}: cannot be written: {error.strerror or error}", "make room and export again") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return sha256_file(path) if path.is_file() else ""


def _weight_bytes(layout: Layout) -> int:
    return sum(path.stat().st_size for part in layout.parts for path in (layout.folder / part).glob("*.safetensors"))
