"""A comparison as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from shards.compare.runs import Comparison, Pair, Side
from shards.measures import Measure
from shards.process.progress import counted
from shards.settings.history import written

MOST_ROWS = 24  # of a curve; of a longer one some are shown
CELL = 17  # columns of a reward with its error
NUMBER = 4  # columns of an iteration


def text_of(found: Comparison, width: int = 80) -> str:
    """Settings and curves in lines of at most `width` columns; only the path of a run may be longer."""
    lines = [f"{side.letter}  {side.path}: {counted(side.trained, 'iteration')} trained" for side in found.sides]
    lines += ["", "settings that differ" if found.differing else "no setting differs", *_settings(found, width)]
    for side in found.sides:
        if side.changed:
            text = f"not the same in all iterations of {side.letter}: {', '.join(side.changed)}"
            lines += _wrapped(text, width)
    held_out = [(side.letter, side.held_out) for side in found.sides]
    training = [(side.letter, side.training) for side in found.sides]
    lines += ["", "held-out reward ± standard error, after so many iterations", *_curves(held_out, width)]
    lines += [line for pair in found.pairs for line in _wrapped(sentence(pair, found.sides[0]), width)]
    lines += ["", "reward of the rollouts, by iteration: their prompts change", *_curves(training, width)]
    return "\n".join(lines)


def sentence(pair: Pair, first: Side) -> str:
    """What a run is over the first one, on the same prompts and noise."""
    begin = f"{pair.letter} less {first.letter} after {counted(pair.iteration, 'iteration')}"
    if pair.found is None or pair.found.difference is None:
        return f"{begin}: not to be paired: the evaluations have other {', '.join(pair.unlike[:4]) or 'videos'}"
    error = "" if pair.found.standard_error is None else f" ± {pair.found.standard_error:.4f}"
    counts = f"{pair.found.wins} better, {pair.found.losses} worse, {pair.found.ties} neither"
    prompts = counted(pair.found.prompts, "prompt")
    return f"{begin}, same prompts and noise: {pair.found.difference:+.4f}{error} over {prompts}, {counts}"


def _settings(found: Comparison, width: int) -> list[str]:
    """A row a setting; where a value is too long for its column, a line a run."""
    if not found.differing:
        return []
    size = max(map(len, found.differing))
    room = (width - size - 2) // len(found.sides) - 2
    lines = [_row("", [side.letter for side in found.sides], size, room)] if room > 2 else []
    for name in found.differing:
        values = [written(side.settings.get(name)) for side in found.sides]
        if max(map(len, values)) <= room:
            lines.append(_row(name, values, size, room))
            continue
        lines.append(f"  {name}")
        for side, value in zip(found.sides, values, strict=True):
            lines += _wrapped(f"{side.letter}  {value}", width, "    ")
    return lines


def _row(name: str, values: Sequence[str], size: int, room: int) -> str:
    return f"  {name:<{size}}{''.join(f'  {value:<{room}}' for value in values)}".rstrip()


def _curves(curves: Sequence[tuple[str, dict[int, Measure]]], width: int) -> list[str]:
    numbers = sorted({k for _, curve in curves for k in curve})
    if not numbers:
        return ["  none yet"]
    rows = [numbers[round(at * (len(numbers) - 1) / (MOST_ROWS - 1))] for at in range(MOST_ROWS)]
    shown = numbers if len(numbers) <= MOST_ROWS else rows
    lines = []
    each = max(1, (width - NUMBER - 2) // CELL)
    for start in range(0, len(curves), each):
        block = curves[start : start + each]
        lines.append(f"  {'':>{NUMBER}}{''.join(f'{letter:>{CELL}}' for letter, _ in block)}")
        lines += [f"  {k:>{NUMBER}}{''.join(f'{_cell(curve.get(k)):>{CELL}}' for _, curve in block)}" for k in shown]
    if len(shown) < len(numbers):
        lines.append(f"  {len(shown)} of {len(numbers)} are shown; --json has all")
    return lines


def _cell(one: Measure | None) -> str:
    return "–" if one is None else f"{one.mean:.3f} ± {one.error:.3f}"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=f"{indent}   ", break_on_hyphens=False)
