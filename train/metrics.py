"""Metrics of training: one JSON line an update, and the same for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shards.measures import read_metrics
from shards.records.opening import read_plain, refuse_escape
from shards.records.updates import MOST_BYTES, Update, update_line
from shards.run import EXPERT_NAMES
from shards.trackers.live import track_update

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

    from shards.run import Stage

Record = Update


class MetricsLog:
    """`policy/metrics.jsonl` and `policy/tensorboard` of one iteration.

    A process that trains one of two experts has a log of its own, `policy/metrics.high_noise.jsonl`, so that no file
    has two writers; `joined_logs` makes one of both. The JSON lines are the truth; what TensorBoard reads is made from
    them again whenever training begins or resumes.
    """

    def __init__(self, stage: Stage, kept: Mapping[str, int], expert: str = "") -> None:
        """Keep the records of updates that a checkpoint covers (`kept`: expert name -> updates) and drop later ones.

        `expert` is the only one that this process trains; without it this process is the only one that trains.
        """
        self.path, self.files = stage.expert_metrics_path(expert) if expert else stage.metrics_path, stage.files
        for path in (stage.metrics_path, *map(stage.expert_metrics_path, EXPERT_NAMES)):
            self.files.look(path)
        self.records = [record for record in read_metrics(stage) if record["update"] <= kept.get(record["expert"], 0)]
        if expert:
            self.records = [record for record in self.records if record["expert"] == expert]
        self.files.publish_replace(self.path, _lines(self.records))
        if not expert:
            _forget_own_logs(stage)
        self._board = _board(stage.policy_dir / "tensorboard", expert)
        for record in self.records:
            self._show(record)

    def add(self, record: Record) -> None:
        """Append the record of one update. It needs `expert`, `update` and `total_updates` besides the numbers."""
        self.records.append(record)
        self.files.append(self.path, update_line(record))
        self._show(record)
        self._board.flush()  # who watches sees it now
        track_update(record)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        self._board.close()

    def _show(self, record: Record) -> None:
        """All numbers in one event: SummaryWriter makes an event of each, in ten times the time."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {f"{record['expert']}/{name}": value for name, value in record.items() if isinstance(value, float)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._board.add_summary(Summary(value=values), record["total_updates"])


@contextmanager
def joined_logs(stage: Stage, experts: Iterable[str]) -> Iterator[list[Record]]:
    """The records of all experts, in one log; those of `experts`, which other processes trained, are fetched first.

    Inside, policy.json makes the common log the only one that counts; at the end the logs of single experts go. Several
    processes may do this at once: all write the same.
    """
    for path in map(stage.expert_metrics_path, experts):
        stage.files.agree(path)
    records = read_metrics(stage)
    lines = _lines(records)
    if not stage.metrics_path.exists() or read_plain(stage.metrics_path, MOST_BYTES) != lines:
        stage.files.publish_replace(stage.metrics_path, lines)
    yield records
    _forget_own_logs(stage)


def _forget_own_logs(stage: Stage) -> None:
    """Remove the logs of single experts: their lines are in the common one."""
    stage.files.remove_files([path for path in map(stage.expert_metrics_path, EXPERT_NAMES) if path.exists()])


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(map(update_line, records)).encode()


def _board(folder: Path, expert: str) -> FileWriter:
    """A new log for TensorBoard, in the place of what was shown so far; that of another expert alone stays."""
    from torch.utils.tensorboard import FileWriter

    refuse_escape(folder)
    others = [f".{name}" for name in EXPERT_NAMES if expert and name != expert]
    for path in folder.glob("*"):
        if path.suffix not in others:
            path.unlink(missing_ok=True)
    return FileWriter(str(folder), filename_suffix=f".{expert}" if expert else "")
