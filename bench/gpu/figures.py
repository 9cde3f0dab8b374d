"""Steps 6 and 7: memory against the plan, and time against bare calls of model and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.gpu.found import Finding, Place
from bench.gpu.iteration import Iteration, bare_rollout, bare_updates, iterate, pipeline_seconds
from bench.gpu.models import Case, make_run
from rollout.memory.needs import plan_memory
from shards.run import Run

GIB = 2**30
ROLLOUT_GOAL, UPDATE_GOAL = 1.05, 1.05


def memory(place: Place, cases: list[Case]) -> Iterator[Finding]:
    """Step 6: bytes alive and bytes reserved at the peak of one iteration, and what `rushes plan-memory` says."""
    for case in cases:
        run = _run(place, case, "memory")
        done = iterate(run, place.policy(case), count=True)
        place.warm.add(case)
        needs = {need.stage: need for need in plan_memory(run)}
        sampled = max(needs[stage].device for stage in ("encode prompts", "rollout", "decode"))
        trained = needs["train LoRA, checkpointing"].device
        for name, planned, stage in (("rollout", sampled, done.rollout), ("training", trained, done.train)):
            if not stage.allocated:  # on a CPU, where counting the updates too takes longer than the rest
                continue
            reserved = f", {stage.reserved / GIB:.3f} reserved" if stage.reserved else ""
            text = f"{stage.allocated / GIB:.3f} GiB alive{reserved}, planned {planned / GIB:.3f}"
            ratio = planned / stage.allocated
            text = f"{text}, planned / alive {ratio:.2f}"
            yield Finding(6, f"{case}: peak of the {name}", text, None if case.small else 0.97 <= ratio <= 1.10)
        yield _proof(6, case, done)


def throughput(place: Place, cases: list[Case]) -> Iterator[Finding]:
    """Step 7: rollout and updates against the same forwards, decodings and backwards, after a whole warm-up."""
    for number, case in enumerate(cases):
        policy = place.policy(case)
        if case not in place.warm:
            iterate(_run(place, case, "warm"), policy, count=False)
        run = _run(place, case, "timed")
        done = iterate(run, policy, count=False)
        yield _proof(7, case, done)
        updates = bare_updates(policy, run)
        policy.experts.become(None)
        sampling = bare_rollout(policy, run)
        policy.release()
        yield _against(case, "rollout", done.rollout.seconds, "bare forwards and decodings", sampling, ROLLOUT_GOAL)
        yield _against(case, "updates", done.updates, "bare forwards and backwards", updates, UPDATE_GOAL)
        whole = f"{done.train.seconds:.2f} s, of which updates {done.updates:.2f} s"
        yield Finding(7, f"{case}: the whole training stage, with the gate and the writing", whole)
        rate = case.prompts * case.videos / done.rollout.seconds
        yield Finding(7, f"{case}: {case.steps} steps, {case.prompts * case.videos} videos", f"{rate:.3f} videos/s")
        if number == 0:
            pipeline = pipeline_seconds(policy.layout.folder, run, place.device)
            yield _against(case, "rollout", done.rollout.seconds, "WanPipeline.__call__", pipeline, None)


def _run(place: Place, case: Case, name: str) -> Run:
    path = Path(place.out / f"{name}-{case.model}-{case.height}x{case.width}x{case.frames}")
    return make_run(path, place.folder(case), case, place.device)


def _proof(step: int, case: Case, done: Iteration) -> Finding:
    low, high = done.ratios
    text = f"largest log-ratio of the replay {done.replay:.3g}, first ratios {low!r} to {high!r}"
    return Finding(step, f"{case}: proof", text, done.replay == 0.0 and low == high == 1.0)


def _against(case: Case, what: str, ours: float, other: str, theirs: float, goal: float | None) -> Finding:
    """A ratio of two times; its goal does not hold for tiny models, whose time is that of Python."""
    text = f"{ours:.3f} s / {theirs:.3f} s = {ours / theirs:.3f}" + (f" (goal {goal})" if goal else "")
    ok = ours / theirs <= goal if goal and not case.small else None
    return Finding(7, f"{case}: {what} / {other}", text, ok)
