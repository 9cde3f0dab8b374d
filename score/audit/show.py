"""A chain of links as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from score.audit.chain import Link, chain_sha256

SHORT = 12  # characters of a hash that are shown

Facts = Mapping[str, Any]


def render_chain(links: list[Link]) -> str:
    """A line a link: what it is, its most telling facts, where it lies; its faults below it; the hash of all last."""
    width = max(len(link.what) for link in links)
    lines = []
    for link in links:
        lines.append(f"{link.what:<{width}}  {FACTS[link.what](link.facts)}  ({link.where})")
        lines += [f"{'':<{width}}  WRONG: {fault}" for fault in link.faults]
    return "\n".join([*lines, f"{'chain':<{width}}  sha256 {chain_sha256(links)}"])


def _reward(facts: Facts) -> str:
    mean = facts["mean_reward"]
    return f"mean {'missing' if mean is None else format(mean, '.6f')} of {facts['videos']} videos, computed again"


def _advantages(facts: Facts) -> str:
    weights = facts["specification"]["weights"].items()
    return "computed again from the scores, weights " + ", ".join(f"{name} {value:g}" for name, value in weights)


def _scores(facts: Facts) -> str:
    source = f", source {facts['source_sha256'][:SHORT]}" if "source_sha256" in facts else ""
    return f"{facts['scorer']}, version {facts['version']}{source}"


def _shards(sums: Mapping[str, str] | None) -> str:
    return ", ".join(f"shard {shard} {sha256[:SHORT]}" for shard, sha256 in (sums or {}).items())


def _seeds(facts: Facts) -> str:
    """The seed of the run, and the first noise seed of a sample; a record holds them as a list or by step."""
    seeds = facts.get("noise_seeds")
    if not seeds:
        return f"of the run {facts['seed']}"
    values = list(seeds.values()) if isinstance(seeds, dict) else list(seeds)
    more = f" and {len(values) - 1} more" if len(values) > 1 else ""
    return f"of the run {facts['seed']}; of {facts['key']} {values[0]}{more}"


def _sigmas(facts: Facts) -> str:
    sigmas = facts["sigmas"]
    steps = f"{len(sigmas) - 1} steps from {sigmas[0]:.4f} to {sigmas[-1]:.4f}"
    return f"{steps}, law {facts['law']}, eta {facts['eta']:g}"


def _code(facts: Facts) -> str:
    return "; ".join(", ".join(f"{name} {version}" for name, version in one.items()) for one in facts["versions"])


def _policy(facts: Facts) -> str:
    files = facts.get("files")
    made = f" = base and {len(files)} files" + (", averaged" if facts["average"] else "") if files else ""
    return f"{str(facts.get('fingerprint'))[:SHORT]}{made}"


FACTS: dict[str, Callable[[Facts], str]] = {
    "reward": _reward,
    "advantages": _advantages,
    "scores": _scores,
    "videos": lambda facts: _shards(facts["sha256"]),
    "seeds": _seeds,
    "sigmas": _sigmas,
    "code": _code,
    "policy": _policy,
    "training": lambda facts: f"on advantages {facts['advantage']} of {_shards(facts['shards'])}",
    "model": lambda facts: f"{facts['path']}, {str(facts['base'])[:SHORT]}",
}
"""The most telling facts of each kind of link, in words."""
