"""Export: a trained policy as plain diffusers loads it, proven by loading it back before anything is published."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.export.card import Base, base_name, model_card, reward_curve
from rollout.lineage import averaged, check_committed, take_policy
from rollout.policy import Policy
from rollout.policy.folder import EXPERT_FOLDERS, Layout
from rollout.policy.full import is_full
from rollout.policy.plain import merge, open_plain, probe, round_adapter, sample, save_expert, wear
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import TEMPORARY, publish_new, read_json, sha256_file, sync, to_json
from shards.locks import locked
from shards.run import EXPERT_NAMES, Run, Stage
from shards.store import mirror
from shards.store.urls import working_copy

SCHEMA = 1
RECORD = "export.json"
SMALL = 1 << 30
"""Bytes of weights up to which an export is also proven by a call of the whole pipeline."""


@dataclass(frozen=True)
class ExportReport:
    """What `export` did."""

    path: Path
    iteration: int
    skipped: bool
    """True when this very export was there already."""
    checked: str
    """How it was proven."""
    merge_difference: float | None = None
    """Largest difference of an output by rounding merged weights; None when nothing was merged."""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: {self.path} holds this policy already"
        return f"{self.path} written; {self.checked}; {self.seconds:.1f} s"


def export(run: Run, iteration: int, out: str | Path, *, average: bool = True, fuse: bool = False) -> ExportReport:
    """Write the policy that `iteration` trained to the new folder `out`, whole or not at all.

    A LoRA policy becomes high_noise/ (and low_noise/) with diffusers' own LoRA files; with `fuse`, or when all weights
    were trained, a whole pipeline folder. `average` takes the averaged weights where training kept them. Beside it lie
    README.md, the model card, and export.json with the sha256 of every file. Before that it is loaded by plain
    diffusers, on the CPU, and must answer as the policy does, bit for bit.

    Raises UserError when the iteration was not trained or `out` is taken, RunFailed when the proof fails or the disk is
    full, StillBusy when another process writes there.
    """
    began, out = time.monotonic(), working_copy(out)
    mirror.fetch(out)
    stage = run.iteration(iteration)
    if not stage.trained():
        raise UserError(f"{stage.policy_dir} holds no finished policy", run.way_to_policy(iteration))
    source = _source(stage, average)
    wanted = {
        "schema": SCHEMA,
        "iteration": iteration,
        "policy": read_json(stage.policy_record_path)["fingerprint"],
        "average": source != stage.policy_dir,
        "fused": fuse or is_full(source),
    }
    with locked(out.parent / f".{out.name}.export.lock") as held:
        if not held:
            raise StillBusy(f"{out} is being written by another process", "wait for it, or choose another folder")
        if out.exists() and _same(out, wanted):
            return ExportReport(out, iteration, True, read_json(out / RECORD)["checked"])
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already and is not this export", "choose another folder, or remove it")
        with _published(out) as aside:
            checked, difference = _write(run, stage, source, aside, wanted)
        mirror.put_folder(out, last=RECORD)
    return ExportReport(out, iteration, False, checked, difference, time.monotonic() - began)


def _source(stage: Stage, average: bool) -> Path:
    folder = stage.fetched_policy()
    return (averaged(folder) if average else None) or folder


def _same(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` is the wanted export, every file of it untouched."""
    if not (out / RECORD).is_file():
        return False
    record = read_json(out / RECORD)
    names = [name for name, value in record.get("files", {}).items() if _hash(out / name) != value]
    return not names and {name: record.get(name) for name in wanted} == wanted


def _write(run: Run, stage: Stage, source: Path, aside: Path, wanted: dict[str, Any]) -> tuple[str, float | None]:
    """Fill the folder `aside` and prove it; returns how it was proven, and what merging changed."""
    model = run.config.model
    policy = Policy.load(model.path, dtype=model.dtype, device="cpu", text_length=model.text_length)
    identity = take_policy(run, run.iteration(stage.iteration + 1), policy)
    if wanted["average"]:
        check_committed(source, policy.fingerprint(source))
        policy.become(source)
    layout, difference = policy.layout, None
    if wanted["fused"]:
        difference = _write_pipeline(policy, aside)
    else:
        policy.save_lora(aside)
    answers = _answers(policy)
    whole = _weight_bytes(layout) <= SMALL
    modules = [policy.module(expert) for expert in policy.expert_ids] if whole else []
    del policy  # a large model is in memory once
    prove(layout, aside, answers, modules, dtype=model.dtype, text_length=model.text_length, fused=wanted["fused"])
    del modules
    checked = "loaded back by plain diffusers, every expert's output equal bit for bit" + (
        ", and one call of the whole pipeline" if whole else ""
    )
    experts = [EXPERT_NAMES[expert] for expert in layout.expert_ids]
    record = {
        **wanted,
        "base": identity["base"],
        "run": run.path.resolve().name,
        "experts": experts,
        "checked": checked,
    }
    record["files"] = {path.relative_to(aside).as_posix(): sha256_file(path) for path in _files(aside)}
    publish_new(aside / "README.md", model_card(run, record, _base(run, layout)).encode())
    if curve := reward_curve(run, stage.iteration):
        publish_new(aside / "reward.svg", curve.encode())
    publish_new(aside / RECORD, to_json(record, aside / RECORD))
    return checked, difference


def _base(run: Run, layout: Layout) -> Base:
    """The model below the policy, for the card."""
    scheduler = layout.scheduler_config
    return Base(
        name=base_name(run, layout.folder),
        pipeline=read_json(layout.folder / "model_index.json")["_class_name"],
        shift=scheduler.get("flow_shift", scheduler.get("shift")),
        takes_image=layout.takes_image == "must",
    )


def _write_pipeline(policy: Policy, aside: Path) -> float:
    """Merge the adapters and write the whole pipeline folder; returns the largest difference merging made."""
    layout, worst, adapted = policy.layout, 0.0, policy.has_lora
    for part in layout.parts:
        if part not in EXPERT_FOLDERS:
            shutil.copytree(layout.folder / part, aside / part)
    shutil.copyfile(layout.folder / "model_index.json", aside / "model_index.json")
    for expert in policy.expert_ids:
        module = policy.module(expert)
        before = probe(module, layout)
        if adapted:
            merge(module)
        after = probe(module, layout)
        worst = max(worst, (after - before).abs().max().item())
        save_expert(module, aside / EXPERT_FOLDERS[expert])
    return worst


def _answers(policy: Policy) -> dict[int, Tensor]:
    """What each expert answers, its adapter in the dtype that `load_lora_weights` will give it."""
    answers = {}
    for expert in policy.expert_ids:
        round_adapter(policy.module(expert), policy.dtype)
        answers[expert] = probe(policy.module(expert), policy.layout)
    return answers


def prove(
    layout: Layout,
    folder: Path,
    answers: dict[int, Tensor],
    modules: list[Any],
    *,
    dtype: str,
    text_length: int,
    fused: bool,
) -> None:
    """Load `folder` by plain diffusers and compare, bit for bit: each expert's answers, and, when the policy's own
    `modules` are given, the latents of one call of the whole pipeline. Raises RunFailed where they differ.
    """
    pipe = open_plain(folder if fused else layout.folder, dtype, whole=bool(modules))
    if not fused:
        wear(pipe, folder, layout.expert_ids)
    for expert, answer in answers.items():
        found = probe(getattr(pipe, EXPERT_FOLDERS[expert]), layout)
        _equal(found, answer, f"{folder}: the {EXPERT_NAMES[expert]} expert")
    if not modules:
        return
    theirs = sample(pipe, layout, text_length)
    for expert, module in zip(layout.expert_ids, modules, strict=True):
        setattr(pipe, EXPERT_FOLDERS[expert], module)
    _equal(theirs, sample(pipe, layout, text_length), f"{folder}: a sample")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        difference = (found - expected).abs().max().item()
        raise RunFailed(
            f"{what} loaded back by plain diffusers differs from the policy by {difference:.3g}",
            "nothing was published; tell us which versions of diffusers and peft you have",
        )


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
