"""What a scoring process does: decode the videos of a job once, give them to every reward; and the processes."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from score.reward import Chosen, Reward, Scored, Video
from shards.errors import UserError
from shards.process.fork_server import ONE_THREAD
from shards.process.machine import LocalPlace, place, take_helper_place
from shards.process.peak_memory import peak_memory_bytes
from shards.process.pool import Pool
from shards.reader import Shard, open_shard
from shards.run import Stage
from shards.video import decode_mp4

LARGEST = 1e100  # of a component: the squares of larger ones overflow, and advantages would be 0 or not a number
P = ParamSpec("P")
T = TypeVar("T")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt


@dataclass(frozen=True)
class Job:
    """Some samples of one shard and the rewards that have not seen them."""

    stage: Stage
    shard: int
    keys: tuple[str, ...]
    rewards: tuple[Chosen, ...]


@dataclass(frozen=True)
class Judged:
    """Scores of a job's samples in the order of its keys and the seconds they took, by scorer directory."""

    scored: dict[str, list[Scored]]
    seconds: dict[str, float]
    peak_memory_bytes: int


def score_job(job: Job) -> Judged:
    """What the rewards of a job say.

    Raises UserError when the shard is damaged or a reward cannot work at all (weights missing).
    """
    with open_shard(job.stage, job.shard) as shard:
        videos = [_video(shard, key) for key in job.keys]
    scored, seconds = {}, {}
    for chosen in job.rewards:
        began = time.monotonic()
        scored[chosen.directory] = _score(chosen, videos)
        seconds[chosen.directory] = time.monotonic() - began
    return Judged(scored, seconds, peak_memory_bytes())


def _video(shard: Shard, key: str) -> Video | str:
    """The decoded sample, or why there is none to be scored."""
    meta, data = shard.meta(key), shard.video(key)
    if (status := meta.get("status", "ok")) != "ok":
        return str(status)
    try:
        plan = shard.stage.plan()
        frames = decode_mp4(data, key, plan.video if plan else None)
    except UserError as error:
        return error.problem
    return Video(key, frames, str(meta["prompt"]), meta.get("target"), float(meta.get("fps", 16)), meta)


def _score(chosen: Chosen, videos: Sequence[Video | str]) -> list[Scored]:
    reward = _built(chosen)
    readable = [video for video in videos if isinstance(video, Video)]
    found = iter(judge_all(reward, readable, chosen.components))
    return [Scored(reason=video) if isinstance(video, str) else next(found) for video in videos]


def judge_all(reward: Reward, videos: Sequence[Video], components: Sequence[str]) -> list[Scored]:
    """Score videos together; when that fails, one by one, so that one bad video does not take the others with it."""
    if not videos:
        return []
    try:
        return _checked(reward, videos, components)
    except UserError:
        raise
    except Exception:
        return [_judge_one(reward, video, components) for video in videos]


def _judge_one(reward: Reward, video: Video, components: Sequence[str]) -> Scored:
    try:
        return _checked(reward, [video], components)[0]
    except UserError:
        raise
    except Exception as error:
        return Scored(reason=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def _checked(reward: Reward, videos: Sequence[Video], components: Sequence[str]) -> list[Scored]:
    """What the reward says, with numbers that are absent or cannot be used turned into a reason."""
    scored = list(reward(videos))
    if len(scored) != len(videos):
        raise ValueError(f"reward {reward.name!r} gave {len(scored)} scores for {len(videos)} videos")
    return [_sound(one, components) for one in scored]


def _sound(scored: Scored, components: Sequence[str]) -> Scored:
    flaw = _flaw_of_text(scored) or ("" if scored.reason else _flaw_of_numbers(scored, components))
    return replace(scored, components={}, confidence=None, reason=scored.reason or flaw) if flaw else scored


def _flaw_of_numbers(scored: Scored, components: Sequence[str]) -> str:
    """Why the components cannot be kept, "" when they can."""
    for name in components:
        value = scored.components.get(name, math.nan)
        if not math.isfinite(value):
            return f"{name} is not a number"
        if abs(float(value)) > LARGEST:
            return f"{name} is {value:g}, more than {LARGEST:g}"
    return ""


def _flaw_of_text(scored: Scored) -> str:
    """Why the text cannot be kept with its confidences and frames, "" when it can or when there is none."""
    if scored.text is None or scored.confidence is None:
        return ""
    if not all(map(math.isfinite, scored.confidence)):
        return "a confidence is not a number"
    counts = len(scored.text), len(scored.confidence), len(scored.text if scored.frames is None else scored.frames)
    return "" if len(set(counts)) == 1 else "there are {} texts, {} confidences and {} frames".format(*counts)


_rewards: dict[str, Reward] = {}


def _built(chosen: Chosen) -> Reward:
    """The reward, built once per process and kept: its model is what takes long."""
    name = _name(chosen)
    if name not in _rewards:
        _rewards[name] = chosen.build()
    return _rewards[name]


def _name(chosen: Chosen) -> str:
    return json.dumps([chosen.directory, dict(chosen.options)], sort_keys=True)


def unbuilt(rewards: Sequence[Chosen], count: int) -> list[Chosen]:
    """Those of the rewards that the processes of `executor(count)` have yet to build, which loads their models."""
    if count > 1:
        return [] if count in processes.executors else list(rewards)
    return [one for one in rewards if _name(one) not in _rewards]


class Inline(Executor):
    """An executor that works in the calling process, when there is one worker."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run now; the future is finished when it is returned."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(count: int) -> Executor:
    """Processes that stay alive with their models, so that the next iteration need not load them. Inline for 1."""
    return Inline() if count == 1 else processes.of(count, place())


def start_worker(of: LocalPlace | None = None) -> None:
    """Before anything heavy is imported: one thread per library, memory kept between calls, and which process this is
    of those that the process at the place `of` starts."""
    os.environ.update(ONE_THREAD)
    keep_memory()
    take_helper_place(of)


processes = Pool(start_worker)


def keep_memory() -> None:
    """Tell glibc's allocator to keep freed memory: a detector that maps and unmaps 400 MB per frame spends a quarter of
    its time in page faults. Nothing happens with another C library."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TOP_PAD, 2**28), (M_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(parameter, value)
