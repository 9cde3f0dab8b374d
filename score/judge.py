"""Scoring video files outside a run: how a user checks a reward before trusting it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from score import process
from score.catalogue.argument import EXAMPLE, parse_argument
from score.ocr.similarity import NoTarget, target_of
from score.reward import Chosen, Reward, Scored, Video, choose
from shards.errors import UserError
from shards.pointers import refuse_pointer
from shards.text.cleaning import clean
from shards.video import LIMITS, VideoLimits, load_video

ONE_FOR_ALL = "give it once for all videos, or once per video"


class Verdict(TypedDict):
    """What one reward says of one video."""

    reward: str
    scorer: str
    status: str
    value: float | None
    components: Mapping[str, float | None]
    frames_used: list[int]
    text: NotRequired[Sequence[object] | None]


class JudgedVideo(TypedDict):
    """What all rewards say of one video."""

    file: str
    prompt: str
    target: str | None
    fps: float
    frames: int
    rewards: list[Verdict]


def judge(
    videos: Sequence[str | Path],
    prompts: Sequence[str],
    rewards: Sequence[str],
    targets: Sequence[str] = (),
    limits: VideoLimits = LIMITS,
) -> Iterator[JudgedVideo]:
    """One record a video, in order, as soon as it is scored: plain JSON values.

    A record has `file`, `prompt` (as given; rewards get it cleaned, as in a run), `target` (the one given, else what
    the prompt quotes, cleaned; null without), `fps` (of the container), `frames` (how many it has) and `rewards`, a
    list with, for each reward: `reward` (name), `scorer` (name and fingerprint), `status` ("ok" or why there is no
    score), `value` (its first component),
    `components` (all, raw and normalised), `frames_used` (numbers of the frames looked at), and `text` (frame, text,
    confidence) when it reads. Every video is judged alone: what a reward makes of a group is not in it. `prompts` and
    `targets` hold one for all or one for each. A video beyond `limits` is refused before it is decoded.
    Raises UserError, for wrong names, options and counts and for missing files before anything is loaded.
    """
    chosen = [parse_reward(reward) for reward in rewards]
    if not chosen:
        raise UserError("no reward is given", f"name at least one with --reward, {EXAMPLE}")
    asked = one_each("--prompt", prompts, len(videos))
    wanted = one_each("--target", targets or [""], len(videos))
    for path in videos:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file", "give the path of a video file")
        refuse_pointer(Path(path))
    return _records([Path(path) for path in videos], asked, wanted, chosen, limits)


def _records(
    videos: Sequence[Path],
    prompts: Sequence[str],
    targets: Sequence[str],
    chosen: Sequence[Chosen],
    limits: VideoLimits,
) -> Iterator[JudgedVideo]:
    built: list[tuple[Chosen, Reward]] | None = None
    for path, prompt, target in zip(videos, prompts, targets, strict=True):
        frames, fps = load_video(path, limits)
        built = built or [(one, one.build()) for one in chosen]
        cleaned = clean(prompt)  # as in a run
        video = Video(str(path), frames, cleaned, _target(cleaned, clean(target)), fps)
        yield {
            "file": str(path),
            "prompt": prompt,
            "target": video.target,
            "fps": fps,
            "frames": len(frames),
            "rewards": [_verdict(one, reward, video) for one, reward in built],
        }


def _target(prompt: str, given: str) -> str | None:
    """What a reward looks for: as in a run, the quoted text of the prompt where nothing else is given."""
    try:
        return target_of(prompt, given)
    except NoTarget:
        return given or None


def _verdict(chosen: Chosen, reward: Reward, video: Video) -> Verdict:
    """What one reward says of one video."""
    scored = chosen.after_group([process.judge_all(reward, [video], chosen.components)[0]])[0]
    verdict: Verdict = {
        "reward": chosen.name,
        "scorer": chosen.directory,
        "status": scored.reason or "ok",
        "value": None if scored.reason else float(scored.components[chosen.components[0]]),
        "components": _components(chosen, scored),
        "frames_used": [int(n) for n in (range(len(video.frames)) if scored.frames is None else scored.frames)],
    }
    return verdict if scored.text is None else verdict | {"text": scored.readings()}


def _components(chosen: Chosen, scored: Scored) -> Mapping[str, float | None]:
    return {name: None if scored.reason else float(scored.components[name]) for name in chosen.components}


def json_line(record: Mapping[str, object], encoding: str | None) -> str:
    """A record as one line of JSON in characters as they are, or all escaped where one of them is in the way.

    That is one which `encoding` cannot write, or one which ends a line for some readers (U+2028).
    """
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(encoding or "utf-8")
        whole = len(line.splitlines()) == 1
    except UnicodeEncodeError:
        whole = False
    return line if whole else json.dumps(record)


def parse_reward(text: str) -> Chosen:
    """The reward that `NAME:option=value,…` stands for; the weight that `score` takes has no meaning for one video.

    Raises UserError for a weight, and whatever `parse_argument` and `choose` refuse.
    """
    argument = parse_argument(text)
    if argument.weight is not None:
        raise UserError(f"--reward {text}: `judge` adds nothing up, so it takes no weight", "leave the weight out")
    return choose(argument.name, argument.options)


def one_each(option: str, texts: Sequence[str], count: int) -> list[str]:
    """`count` texts out of one or of as many. Raises UserError for another number."""
    if len(texts) == count:
        return list(texts)
    if len(texts) == 1:
        return [texts[0]] * count
    raise UserError(f"{option} is given {len(texts)} times for {count} videos", ONE_FOR_ALL)
