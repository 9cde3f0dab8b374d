"""What each rank does in the tests of training on many ranks: one case after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from rollout.ranks import agreement
from rollout.ranks.world import World, local
from shards.errors import RunFailed, UserError
from shards.files import LocalFiles
from shards.process.signals import stopped
from shards.run import Run
from train import batch_loss, ranks, replay
from train.data import Inputs, Stored
from train.order import Unit
from train.run import train
from train.trainer import ExpertTrainer

Case = dict[str, Any]
Change = Callable[..., Any]


@contextmanager
def changed(place: Any, name: str, function: Change) -> Iterator[Change]:
    """Inside, an attribute is another one; gives the one that was there."""
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield before
    finally:
        setattr(place, name, before)


class CountingFiles(LocalFiles):
    """Files that count how often the ranks have compared the folder of the run."""

    named = 0

    def common_name(self, folder: Path) -> str | None:
        self.named += 1
        return super().common_name(folder)


def train_case(case: Case, rank: int) -> dict[str, Any]:
    """Train an iteration of a run, or of the run that `others` names on the ranks after the first.

    With `command` the ranks have met before, as under the command line.
    """
    sums: list[str] = []
    used: list[list[Any]] = []
    held: list[dict[str, int]] = []
    files = CountingFiles()
    check, backward = ExpertTrainer.check_ranks, ExpertTrainer.backward

    def noting_sums(self: ExpertTrainer) -> str:
        sums.append(check(self))
        held.append(held_by(self))
        return sums[-1]

    def noting_units(self: ExpertTrainer, unit: Unit, *args: Any, counts: bool = True, **names: Any) -> Any:
        used.append([self.state.updates, counts, *unit])
        return backward(self, unit, *args, counts=counts, **names)

    path = case.get("others", case["run"]) if rank else case["run"]
    run = Run.open(Path(path), case.get("sets", []) if rank else [], files)
    with (
        changed(ExpertTrainer, "check_ranks", noting_sums),
        changed(ExpertTrainer, "backward", noting_units),
    ):
        if case.get("command"):
            agreement.agree_on_run(run)
        report = train(run, case.get("iteration", 0))
    return {
        "fingerprint": report.fingerprint,
        "replay": report.replay,
        "updates": report.updates,
        "warnings": report.warnings,
        "sums": sums,
        "used": used,
        "held": held,
        "met": files.named,
    }


def held_by(trainer: ExpertTrainer) -> dict[str, int]:
    """Bytes of an expert and of what training keeps beside it that lie on this rank, after an update."""
    learning = list(trainer.state.parameters.values())
    frozen = [
        weight for weight in trainer.policy.experts.module(trainer.expert).parameters() if not weight.requires_grad
    ]
    moments = [state[name] for state in trainer.state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    parts: dict[str, Any] = {
        "weights" if trainer.policy.experts.is_full else "LoRA": learning,
        "gradients": [weight.grad for weight in learning],
        "AdamW": moments,
        "average": trainer.state.ema.values(),
        "weights of the rollout": trainer.rolled_out.kept.values(),
    }
    parts |= {} if trainer.policy.experts.is_full else {"weights": frozen}
    return {name: sum(local(tensor.detach()).nbytes for tensor in tensors) for name, tensors in parts.items()}


def odd_folder(case: Case, rank: int) -> dict[str, Any]:
    """The ranks have run directories of their own; what is not there after half a second does not come."""
    with changed(agreement, "PATIENCE", 0.5):
        return train_case(case, rank)


def odd_log_probs(case: Case, rank: int) -> dict[str, Any]:
    """The last rank replays other log-probs than the rollout's."""
    before = replay.log_probs
    shift = 0.25 * (rank == World.joined().size - 1)
    with changed(replay, "log_probs", lambda *args: before(*args) + shift):
        return train_case(case, rank)


def odd_weights(case: Case, rank: int) -> dict[str, Any]:
    """The last rank's weights change by themselves after the first update."""
    check = ExpertTrainer.check_ranks

    def spoiling(self: ExpertTrainer) -> str:
        if rank == self.world.size - 1:
            weight = next(value for value in self.state.parameters.values() if local(value).numel())
            local(weight.detach()).flatten()[0] += 1e-3
        return check(self)

    with changed(ExpertTrainer, "check_ranks", spoiling):
        return train_case(case, rank)


def odd_file(case: Case, rank: int) -> dict[str, Any]:
    """The last rank cannot read its second chunk."""
    before, calls = batch_loss.read_step, []

    def read(*args: Any) -> Stored:
        calls.append(args)
        if rank == World.joined().size - 1 and len(calls) == 2:
            raise RunFailed("shard-000000.tar: crc32 of the latents is wrong", "restore the file")
        return before(*args)

    with changed(batch_loss, "read_step", read):
        return train_case(case, rank)


def odd_advantages(case: Case, rank: int) -> dict[str, Any]:
    """The last rank reads other advantages."""
    before = ranks.freeze

    def other(*args: Any) -> Inputs:
        inputs = before(*args)
        more = float(rank == World.joined().size - 1)
        return replace(inputs, advantages={key: (one + more, two) for key, (one, two) in inputs.advantages.items()})

    with changed(ranks, "freeze", other):
        return train_case(case, rank)


def odd_software(case: Case, rank: int) -> dict[str, Any]:
    """The last rank has another version of everything."""
    number = 1 + (rank == World.joined().size - 1)
    with changed(agreement, "version_of", lambda name: f"{number}.0"):
        return train_case(case, rank)


def interrupted(case: Case, rank: int) -> dict[str, Any]:
    """Ctrl-C reaches the last rank while each works for itself."""
    with World.joined().together():
        if rank == World.joined().size - 1:
            raise stopped(SIGINT, "while it waited")
    return {}


def recomputed(case: Case, rank: int) -> dict[str, Any]:
    """Ends before the first update and tells how many units have an old log-prob that was taken here."""

    def end(self: ExpertTrainer, *_: Any) -> None:
        units = [unit for unit in self.inputs.units() if unit.expert == self.expert]
        raise RunFailed(f"{sum(unit in self.losses.old_log_probs for unit in units)} of {len(units)} units")

    with changed(ExpertTrainer, "update", end):
        return train_case(case, rank)


ACTIONS: dict[str, Callable[[Case, int], dict[str, Any]]] = {
    "train": train_case,
    "odd folder": odd_folder,
    "odd log-probs": odd_log_probs,
    "odd weights": odd_weights,
    "odd file": odd_file,
    "odd advantages": odd_advantages,
    "odd software": odd_software,
    "recomputed": recomputed,
    "interrupted": interrupted,
}


def main(path: Path) -> None:
    """Run the cases of a file; each rank writes what came out of each."""
    torch.set_num_threads(1)
    joined = World.joined()
    found = {}
    for case in json.loads(path.read_text()):
        try:
            found[case["name"]] = ACTIONS[case["action"]](case, joined.rank)
        except UserError as error:
            found[case["name"]] = {"kind": type(error).__name__, "error": str(error), "told": error.told}
            found[case["name"]]["code"] = error.exit_code
        path.with_name(f"rank-{joined.rank}.json").write_text(json.dumps(found))
    joined.close()
