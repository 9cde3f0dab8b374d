"""What each rank does in the tests of training on many ranks: one case after another, started by torchrun."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rollout.parallel import World, local
from shards.errors import RunFailed, UserError
from shards.run import Run
from train import losses, replay
from train.data import Chunk
from train.order import Unit
from train.run import train
from train.update import ExpertTrainer

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


def train_case(case: Case, rank: int) -> dict[str, Any]:
    """Train an iteration of a run, or of the run that `others` names on the ranks after the first."""
    sums: list[str] = []
    used: list[list[Any]] = []
    check, backward = ExpertTrainer.check_ranks, ExpertTrainer.backward

    def noting_sums(self: ExpertTrainer) -> str:
        sums.append(check(self))
        return sums[-1]

    def noting_units(self: ExpertTrainer, unit: Unit, *args: Any, counts: bool = True, **names: Any) -> Any:
        used.append([self.state.updates, counts, *unit])
        return backward(self, unit, *args, counts=counts, **names)

    path = case.get("others", case["run"]) if rank else case["run"]
    sets = case.get("sets", []) if rank else []
    with changed(ExpertTrainer, "check_ranks", noting_sums), changed(ExpertTrainer, "backward", noting_units):
        report = train(Run.open(Path(path), sets), case.get("iteration", 0))
    return {
        "fingerprint": report.fingerprint,
        "replay": report.replay,
        "updates": report.updates,
        "warnings": report.warnings,
        "sums": sums,
        "used": used,
    }


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
    before, calls = losses.read_chunk, []

    def read(*args: Any) -> Chunk:
        calls.append(args)
        if rank == World.joined().size - 1 and len(calls) == 2:
            raise RunFailed("shard-000000.tar: crc32 of the latents is wrong", "restore the file")
        return before(*args)

    with changed(losses, "read_chunk", read):
        return train_case(case, rank)


ACTIONS: dict[str, Callable[[Case, int], dict[str, Any]]] = {
    "train": train_case,
    "odd log-probs": odd_log_probs,
    "odd weights": odd_weights,
    "odd file": odd_file,
}


def main(path: Path) -> None:
    """Run the cases of a file; each rank writes what came out of each."""
    torch.set_num_threads(1)
    ranks = World.joined()
    found = {}
    for case in json.loads(path.read_text()):
        try:
            found[case["name"]] = ACTIONS[case["action"]](case, ranks.rank)
        except UserError as error:
            found[case["name"]] = {"kind": type(error).__name__, "error": str(error), "told": error.told}
        except Exception:
            traceback.print_exc()
            raise
        path.with_name(f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
