"""Metrics of training: one JSON line an update, and the same for TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.files import Files, LocalFiles
from shards.records.opening import refuse_escape
from shards.records.updates import read_updates, update_line
from shards.run import METRICS
from shards.trackers.live import track_update

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class MetricsLog:
    """`policy/metrics.jsonl` and `policy/tensorboard` of one iteration.

    The JSON lines are the truth; the TensorBoard folder is made from them again whenever training begins or resumes.
    """

    def __init__(self, policy_dir: Path, kept: Mapping[str, int], files: Files | None = None) -> None:
        """Keep the records of updates that a checkpoint covers (`kept`: expert name -> updates) and drop later ones."""
        self.path, self.files = policy_dir / METRICS, files or LocalFiles()
        self.files.look(self.path)
        self.records = [
            record for record in read_updates(self.path) if record["update"] <= kept.get(record["expert"], 0)
        ]
        self.files.publish_replace(self.path, "".join(update_line(record) for record in self.records).encode())
        self._board = _board(policy_dir / "tensorboard")
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
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{record['expert']}/{name}", value, record["total_updates"])


def _board(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    refuse_escape(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))
