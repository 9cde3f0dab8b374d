"""The working copy of a run or a model at a URL: what is fetched into it, what is put from it, and in which order.

Stages work on local files as always. What they publish goes to the store before it gets its local name, so the store
never lacks what a file here refers to; what others published is fetched when a stage looks.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from shards.errors import REPAIR, Damaged, RunFailed
from shards.files import (
    Buffer,
    Claims,
    Files,
    LocalFiles,
    NoClaims,
    Ranges,
    Wanted,
    append,
    disk_errors,
    every,
    publish_new,
    publish_replace,
    written_aside,
)
from shards.locks import name_new, waiting
from shards.records.opening import refuse_escape
from shards.store.claims import StoredClaims
from shards.store.commits import Commits
from shards.store.copies import at_once, fetch_object, same, size_of
from shards.store.objects import Entry, Objects
from shards.store.urls import Cache, run_of
from shards.store.versions import Memos

SMALL = (".json", ".jsonl", ".parquet", ".toml")  # fetched whenever a stage looks; the rest when it is needed
ASIDE = re.compile(r"(^|/)(trainer|tensorboard|report|frames|work)/")  # never fetched along
PLAN = re.compile(r"/iter-\d{4,}/plan\.json$")
# what has its name here only after the store has it, so that it is gone when the store lacks it
PUBLISHED = re.compile(
    r"(^|/)((run|plan|policy|model|_summary|(high|low)_noise)\.(json|toml)|shard-\d{6}\.(json|parquet))$"
)
LOOK_AGAIN = 1.0  # s between two looks at the same folder of the store
SETTLED = 60.0  # s for which those who only read take what was found for good


def files_at(path: str | Path) -> tuple[Files, Path]:
    """The files of what lies at a path or URL, and its path here. Raises UserError for an unusable URL.

    A path into the cache, which other processes of this machine are given for a URL, stands for that URL.
    """
    cache = Cache.current()
    here = cache.working_copy(path)
    url = cache.url_of(here)
    if url is None:
        return LocalFiles(), here
    return MirroredFiles(Objects(url.partition("://")[0]), cache), here


def is_small(name: str) -> bool:
    """Whether a file of a run is one of those that are always fetched: plans, manifests, indices, tables, records."""
    return name.endswith(SMALL) and not ASIDE.search(name)


def of_policy(name: str) -> bool:
    """Whether a file in the folder of a policy belongs to the policy: what training keeps for itself does not."""
    return not ASIDE.search(name)


class MirroredFiles:
    """As Files, for the working copies of one store in one cache; threads may share it."""

    one_spool = one_clock = False

    def __init__(self, objects: Objects, cache: Cache, look_again: float = LOOK_AGAIN) -> None:
        self.objects, self.cache, self.look_again = objects, cache, look_again
        # on the hub each sign of life would be a commit
        self.claims: Claims = NoClaims() if objects.in_commits else StoredClaims(objects, cache, look_again)
        self._commits = Commits(objects, cache)
        self._looked: dict[Path, float] = {}

    # --- Names -------------------------------------------------------------------------------------------------------

    def shown(self, text: str) -> str:
        """As Files."""
        return self.cache.shown(text)

    def common_name(self, folder: Path) -> str | None:
        """As Files: every machine has a working copy of its own."""
        return self.cache.url_of(folder)

    # --- From the store ----------------------------------------------------------------------------------------------

    def exists(self, path: Path) -> bool:
        """As Files."""
        url = self.cache.url_of(path)
        return path.exists() or (url is not None and self.objects.head(url) is not None)

    def look(self, path: Path) -> bool:
        """As Files."""
        if path.exists():
            return True
        url = self.cache.url_of(path)
        entry = self.objects.head(url) if url else None
        if url is None or entry is None:
            return False
        self._fetch_one(url, path, entry)
        return True

    def pull(self, folder: Path) -> None:
        """As Files."""
        self._pull(folder, is_small, PUBLISHED)

    def refresh(self, folder: Path) -> None:
        """As Files."""
        now = time.monotonic()
        if all(now - self._looked.get(one, -self.look_again) >= self.look_again for one in (folder, *folder.parents)):
            self.pull(folder)

    def settle(self, folder: Path) -> None:
        """As Files."""
        self._looked[folder] = time.monotonic() + SETTLED

    def agree(self, path: Path) -> None:
        """As Files; processes of one machine that want the same wait for one of them to fetch it."""
        if self.cache.url_of(path):
            with waiting(self.cache.notes_folder(path.parent) / "fetch.lock"):
                self._agree(path)

    def fetch(self, folder: Path, wanted: Wanted = every) -> None:
        """As Files; processes wait as in `agree`."""
        if self.cache.url_of(folder):
            with waiting(self.cache.notes_folder(folder) / "fetch.lock"):
                self._pull(folder, wanted, gone=re.compile(""))

    def fetch_newest(self, folder: Path, commit: str) -> None:
        """As Files, unless it is whole here."""
        there = self.objects.listing(self._url(folder))
        whole = sorted(name.partition("/")[0] for name in there if name.endswith(f"/{commit}"))
        for newest in whole[-1:]:
            sizes = {name: entry.size for name, entry in there.items() if name.startswith(f"{newest}/")}
            if any(size_of(folder / name) != size for name, size in sizes.items()):
                self.fetch(folder / newest)

    @contextmanager
    def borrowed(self, path: Path) -> Iterator[None]:
        """As Files: fetched when it is only in the store, and removed again in the end."""
        here = path.exists()
        self.look(path)
        try:
            yield
        finally:
            if not here and self.cache.url_of(path):
                path.unlink(missing_ok=True)

    @contextmanager
    def afresh(self, path: Path) -> Iterator[tuple[Files, Path]]:
        """As Files, with an empty cache that is thrown away in the end."""
        self.cache.top.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="afresh-", dir=self.cache.top) as empty:
            cache = Cache(Path(empty))
            yield MirroredFiles(self.objects, cache, self.look_again), cache.working_copy(self._url(path))

    def open_range(self, path: Path, size: int) -> Ranges | None:
        """As Files."""
        url = self.cache.url_of(path)
        if url is None or size_of(path) == size:
            return None
        entry = self.objects.head(url)
        if entry is None:
            raise Damaged(f"{url}: is not there, but its manifest is", REPAIR)
        if entry.size != size:
            raise Damaged(f"{url}: has {entry.size} bytes, committed were {size}", REPAIR)
        return Ranges(partial(self.objects.read, url), self.cache.top / "pieces")

    # --- To the store ------------------------------------------------------------------------------------------------

    def publish_new(self, path: Path, data: Buffer | Iterable[Buffer]) -> bool:
        """As Files. The store decides: the file is put there first, and the loser of a race finds the winner's bytes
        under `path`. Raises as Objects.put_new does."""
        url = self.cache.url_of(path)
        if url is None:
            return publish_new(path, data)
        refuse_escape(path)
        if os.path.lexists(path):
            self._agree(path, put_back=True)
            return False
        with written_aside(path, data) as temporary:
            if self.objects.put_new(temporary, url, run_of(url)):
                name_new(temporary, path)
                return True
            entry = self.objects.head(url)
            if entry is None:
                hint = "is somebody deleting this run? else run the same command again"
                raise RunFailed(f"{url}: was there and is gone", hint)
            self._fetch_one(url, path, entry)
            # the same bytes: the store took ours, and only its answer was lost
            return size_of(path) == size_of(temporary) and filecmp.cmp(path, temporary, shallow=False)

    def publish_replace(self, path: Path, data: Buffer | Iterable[Buffer]) -> None:
        """As Files."""
        url = self.cache.url_of(path)
        if url is None:
            return publish_replace(path, data)
        refuse_escape(path)
        with written_aside(path, data) as temporary:
            self.objects.put(temporary, url)
            with disk_errors(path):
                os.replace(temporary, path)

    def append(self, path: Path, line: str) -> None:
        """As Files. Where every put is a commit, the log waits for the next `put_folder`."""
        append(path, line)
        if self.objects.in_commits:
            self._commits.wait(path)
        else:
            self.objects.put(path, self._url(path))

    def put_folder(self, folder: Path, last: str = "", wanted: Wanted = every) -> None:
        """As Files: put what the store does not have, `last` after all others, or all in one commit."""
        url = self.cache.url_of(folder)
        if url is None:
            return
        there, memos = self.objects.listing(url), Memos(folder, self.cache)
        missing = [name for name in self._names(folder, wanted) if not same(folder / name, there.get(name), memos)]
        if self.objects.in_commits:
            return self._commits.commit(folder, url, missing)

        def send(name: str) -> None:
            found = os.stat(folder / name)
            self.objects.put(folder / name, f"{url}/{name}")
            entry = self.objects.head(f"{url}/{name}")
            if entry is not None and entry.size == found.st_size:  # so that it is not fetched back
                memos.note(name, entry.version, found)

        at_once(send, [name for name in missing if name != last])
        if last in missing:
            send(last)
        memos.write()

    def remove(self, folder: Path, keep: Iterable[str]) -> None:
        """As Files. Records that make a folder count go first."""
        url, kept = self._url(folder), set(keep)
        names = [name for name in self.objects.listing(url) if name.partition("/")[0] not in kept]
        if self.objects.in_commits:
            if names:
                self.objects.change({}, [f"{url}/{name}" for name in names])
            return
        for records in (True, False):
            chosen = [name for name in names if name.endswith(".json") is records]
            at_once(lambda name: self.objects.remove(f"{url}/{name}"), chosen)

    def remove_files(self, paths: Iterable[Path]) -> None:
        """As Files."""
        chosen = list(paths)
        urls = [url for url in map(self.cache.url_of, chosen) if url]
        for path in chosen:
            path.unlink(missing_ok=True)
        if self.objects.in_commits:
            if urls:
                self.objects.change({}, urls)
            return
        at_once(self.objects.remove, urls)

    # --- Both --------------------------------------------------------------------------------------------------------

    def _url(self, path: Path) -> str:
        """The URL of what is published, as whoever asks knows it to be."""
        url = self.cache.url_of(path)
        assert url, path
        return url

    def _pull(self, folder: Path, wanted: Wanted, gone: re.Pattern[str]) -> None:
        """Make the wanted files of a folder what the store has under its URL: fetch what is missing or other, and drop
        what it has no more, if its name matches `gone`."""
        url = self.cache.url_of(folder)
        if url is None:
            return
        self._looked[folder] = time.monotonic()
        here = self._names(folder, wanted)  # before the listing: what is published from now on must not count as gone
        there = {name: entry for name, entry in self.objects.listing(url).items() if wanted(name)}
        memos = Memos(folder, self.cache)
        here -= self._forget_others(folder, here, there, memos)
        stale = [name for name, entry in there.items() if not same(folder / name, entry, memos)]
        at_once(lambda name: fetch_object(self.objects, f"{url}/{name}", folder / name, there[name], memos), stale)
        for name in here - there.keys():
            if gone.search(name):
                (folder / name).unlink(missing_ok=True)
        memos.write()

    def _fetch_one(self, url: str, path: Path, entry: Entry) -> None:
        """Fetch an object to `path`, and remember which version that is."""
        memos = Memos(path.parent, self.cache)
        fetch_object(self.objects, url, path, entry, memos)
        memos.write()

    def _agree(self, path: Path, *, put_back: bool = False) -> None:
        """Make a file here the one in the store: fetch that where they differ. What the store has no more goes from
        here too, or, with `put_back`, is published again: somebody deleted it there, and later records refer to it."""
        url, memos = self._url(path), Memos(path.parent, self.cache)
        entry = self.objects.head(url)
        if entry is None and put_back and self.objects.put_new(path, url, run_of(url)):
            return
        entry = entry or self.objects.head(url)
        if entry is None and path.is_file():
            path.unlink(missing_ok=True)
        elif entry is not None and not same(path, entry, memos):
            fetch_object(self.objects, url, path, entry, memos)
        memos.write()

    def _forget_others(self, folder: Path, here: set[str], there: dict[str, Entry], memos: Memos) -> set[str]:
        """Remove stages whose plan is another one in the store, or gone: at that URL is a new run now, and nothing made
        for the old one may get into it. Returns the names that were removed."""
        removed: set[str] = set()
        for name in here:
            path = folder / name
            if PLAN.search(str(path)) and not self._same_plan(path, there.get(name), memos):
                removed |= {other for other in here if (folder / other).is_relative_to(path.parent)}
                shutil.rmtree(path.parent, ignore_errors=True)
        return removed

    def _same_plan(self, path: Path, entry: Entry | None, memos: Memos) -> bool:
        if entry is None or same(path, entry, memos):
            return entry is not None
        return size_of(path) == entry.size and self.objects.read(self._url(path), 0, entry.size) == path.read_bytes()

    def _names(self, folder: Path, wanted: Wanted) -> set[str]:
        """Files under a folder, relative to it, hidden ones and the spool left out."""
        found: set[str] = set()
        for top, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".") and self.cache.url_of(Path(top, name))]
            names = (Path(top, name).relative_to(folder).as_posix() for name in files if not name.startswith("."))
            found.update(name for name in names if wanted(name))
        return found
