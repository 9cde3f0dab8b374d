"""The corpus of the fuzzers, replayed without one: every reader returns, or refuses with file and hint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from shards.errors import UserError
from tests.fuzz import targets
from tests.fuzz.seeds import CORPUS


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    yield
    shutil.rmtree(targets.FOLDER, ignore_errors=True)


def test_every_reader_has_a_corpus() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == targets.READERS.keys()


@pytest.mark.parametrize("kind", targets.READERS)
def test_the_corpus_is_read_or_refused(kind: str) -> None:
    files = sorted((CORPUS / kind).iterdir())
    refused = {path.name: targets.read(kind, path.read_bytes()) for path in files}
    assert {name: said for name, said in refused.items() if name.startswith("whole") and said} == {}


@pytest.mark.parametrize("kind", targets.READERS)
def test_a_cut_and_a_changed_byte_are_read_or_refused(kind: str) -> None:
    data = (CORPUS / kind / "whole").read_bytes()
    for part in range(8):
        at = len(data) * part // 8
        targets.read(kind, data[:at])
        targets.read(kind, data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])


def test_a_reader_that_raises_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise KeyError("policy")

    def silent(path: object) -> None:
        raise UserError("something is wrong", "look")

    for reader, error in ((broken, KeyError), (silent, AssertionError)):
        monkeypatch.setitem(targets.READERS, "json", ("a.json", reader))
        with pytest.raises(error):
            targets.read("json", b"{}")
