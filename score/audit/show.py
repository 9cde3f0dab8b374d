"""A chain of links as lines for people."""

from __future__ import annotations

from typing import Any

from score.audit.chain import Link, chain_sha256

SHORT = 12  # characters of a hash that are shown


def render_chain(links: list[Link]) -> str:
    """A line a link: what it is, its most telling facts, where it lies; its faults below it; the hash of all last."""
    width = max(len(link.what) for link in links)
    lines = []
    for link in links:
        lines.append(f"{link.what:<{width}}  {_facts(link)}  ({link.where})")
        lines += [f"{'':<{width}}  WRONG: {fault}" for fault in link.faults]
    return "\n".join([*lines, f"{'chain':<{width}}  sha256 {chain_sha256(links)}"])


def _facts(link: Link) -> str:
    facts = dict(link.facts)
    if link.what == "reward":
        mean = facts["mean_reward"]
        return f"mean {'missing' if mean is None else format(mean, '.6f')} of {facts['videos']} videos, computed again"
    if link.what == "advantages":
        weights = facts["specification"]["weights"]
        return "computed again from the scores, weights " + ", ".join(
            f"{name} {value:g}" for name, value in weights.items()
        )
    if link.what == "scores":
        source = f", source {facts['source_sha256'][:SHORT]}" if "source_sha256" in facts else ""
        return f"{facts['scorer']}, version {facts['version']}{source}"
    if link.what == "videos":
        return ", ".join(f"shard {shard} {sha256[:SHORT]}" for shard, sha256 in facts["sha256"].items())
    if link.what == "seeds":
        seeds = facts.get("noise_seeds")
        first = f"; of {facts['key']} {_first(seeds)}" if seeds else ""
        return f"of the run {facts['seed']}{first}"
    return _identity(link, facts)


def _identity(link: Link, facts: dict[str, Any]) -> str:
    if link.what == "sigmas":
        sigmas = facts["sigmas"]
        steps = f"{len(sigmas) - 1} steps from {sigmas[0]:.4f} to {sigmas[-1]:.4f}"
        return f"{steps}, law {facts['law']}, eta {facts['eta']:g}"
    if link.what == "code":
        return "; ".join(", ".join(f"{name} {version}" for name, version in one.items()) for one in facts["versions"])
    if link.what == "training":
        used = ", ".join(f"shard {shard} {sha256[:SHORT]}" for shard, sha256 in (facts["shards"] or {}).items())
        return f"on advantages {facts['advantage']} of {used}"
    if link.what == "model":
        return f"{facts['path']}, {str(facts['base'])[:SHORT]}"
    files = facts.get("files")
    made = f" = base and {len(files)} files" + (", averaged" if facts["average"] else "") if files else ""
    return f"{str(facts.get('fingerprint'))[:SHORT]}{made}"


def _first(seeds: Any) -> str:
    """The first of the seeds, which a record may hold as a list or by step."""
    values = list(seeds.values()) if isinstance(seeds, dict) else list(seeds)
    return f"{values[0]}" + (f" and {len(values) - 1} more" if len(values) > 1 else "")
