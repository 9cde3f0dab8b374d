"""Checkpoints of sharded training: written on some ranks, read on others, one failing rank stops all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.support import forks
from tests.support.checkpoint_ranks import go_on, one_rank


def on_ranks(ranks: int, folder: Path, first: int, last: int, result: Path, fail: bool = False) -> None:
    children = forks.ranks(result.with_suffix(""), *[lambda: one_rank(folder, first, last, result, fail)] * ranks)
    forks.finish(*children)


def test_training_goes_on_with_the_same_losses_on_any_number_of_ranks(tmp_path: Path) -> None:
    """One rank, then two, then three, then one; and on three, what one rank cannot write or read stops all."""
    expected, state = go_on(tmp_path / "straight", 0, 6)
    folder = tmp_path / "moving"
    losses = go_on(folder, 0, 2)[0]
    on_ranks(2, folder, 2, 4, tmp_path / "two.pt")
    assert json.loads((folder / "update-000004" / "commit.json").read_text())["ranks"] == 2
    on_ranks(3, folder, 4, 5, tmp_path / "three.pt", fail=True)
    assert json.loads((folder / "update-000005" / "commit.json").read_text())["ranks"] == 3
    two, three = torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "three.pt")
    last, ended = go_on(folder, 5, 6)
    losses += two["losses"] + three["losses"] + last
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-6, rtol=0)
    assert ended.keys() == state.keys()
    for name, one in state.items():
        torch.testing.assert_close(ended[name], one, atol=1e-6, rtol=0, msg=name)
    assert not torch.equal(two["drawn"][0], two["drawn"][1])  # each rank has a generator of its own
    assert torch.equal(two["drawn"][1], two["again"][1])
    assert all("rank 1: File too large" in told for told in three["full"])
    assert all("does not fit this model: 5 tensors differ, first ema." in told for told in three["misfit"])
    for words in ("full", "misfit"):
        assert [told[0] for told in three[words]] == ["/", "(", "("]
    assert sorted(path.name for path in folder.iterdir()) == ["update-000005", "update-000006"]
    assert len(three["damaged"]) > 4  # some rank looks at each of them
    for name, said in three["damaged"].items():
        assert all(f"{name} is damaged: its sha256" in told for told in said), name
        assert [told[0] for told in said] == ["/", "(", "("]
