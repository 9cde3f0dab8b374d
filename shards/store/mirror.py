"""The working copy of a run or a model at a URL: what is fetched into it, what is put from it, and in which order.

Stages work on local files as always. What they publish goes to the store before it gets its local name, so the store
never lacks what a file here refers to; what others published is fetched when a stage looks. Nothing here does anything
for a path outside of the cache.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import RunFailed, UserError
from shards.locks import name_new, waiting
from shards.store import commits, objects
from shards.store.copies import fetch_object, same, size_of
from shards.store.urls import CACHE, cache_folder, notes_folder, url_of, working_copy
from shards.store.versions import Memos

SMALL = (".json", ".jsonl", ".parquet", ".toml")  # fetched whenever a stage looks; the rest when it is needed
ASIDE = re.compile(r"(^|/)(trainer|tensorboard|report|frames|work)/")  # never fetched along
PLAN = re.compile(r"/iter-\d{4,}/plan\.json$")
# what has its name here only after the store has it, so that it is gone when the store lacks it
PUBLISHED = re.compile(
    r"(^|/)((run|plan|policy|model|_summary|(high|low)_noise)\.(json|toml)|shard-\d{6}\.(json|parquet))$"
)
RUN = re.compile(r"(/eval)?/iter-\d{4,}/.*|/[^/]+$")  # what follows the URL of the run in that of one of its files
LOOK_AGAIN = 1.0  # s between two looks at the same folder of the store
AT_ONCE = 8  # transfers

_looked: dict[Path, float] = {}


def is_small(name: str) -> bool:
    """Whether a file of a run is one of those that are always fetched: plans, manifests, indices, tables, records."""
    return name.endswith(SMALL) and not ASIDE.search(name)


# --- From the store --------------------------------------------------------------------------------------------------


def pull(folder: Path, wanted: Callable[[str], bool] = is_small, gone: re.Pattern[str] = PUBLISHED) -> None:
    """Make the wanted files of a folder what the store has under its URL: fetch what is missing or other, and drop what
    it has no more, if its name matches `gone`. `wanted` is asked with names relative to the folder.

    Raises UserError and RunFailed as store.get does.
    """
    url = url_of(folder)
    if url is None:
        return
    _looked[folder] = time.monotonic()
    here = _names(folder, wanted)  # before the listing: what is published from now on must not be taken for gone
    there = {name: entry for name, entry in objects.listing(url).items() if wanted(name)}
    memos = Memos(folder)
    here -= _forget_others(folder, here, there, memos)
    stale = [name for name, entry in there.items() if not same(folder / name, entry, memos)]
    _at_once(lambda name: fetch_object(f"{url}/{name}", folder / name, there[name], memos), stale)
    for name in here - there.keys():
        if gone.search(name):
            (folder / name).unlink(missing_ok=True)
    memos.write()


def refresh(folder: Path) -> None:
    """As `pull`, at most once a second: for places that look often."""
    if url_of(folder) is None:
        return
    now = time.monotonic()
    if all(now - _looked.get(one, -LOOK_AGAIN) >= LOOK_AGAIN for one in (folder, *folder.parents)):
        pull(folder)


def settle(folder: Path, seconds: float = 60.0) -> None:
    """For those who only read: what `pull` has just found is good enough for a while."""
    _looked[folder] = time.monotonic() + seconds


def look(path: Path) -> bool:
    """Whether a file is there, here or in the store; it is here then."""
    if path.exists():
        return True
    url = url_of(path)
    entry = objects.head(url) if url else None
    if url is None or entry is None:
        return False
    _fetch_one(url, path, entry)
    return True


def _fetch_one(url: str, path: Path, entry: objects.Entry) -> None:
    """Fetch an object to `path`, and remember which version that is."""
    memos = Memos(path.parent)
    fetch_object(url, path, entry, memos)
    memos.write()


def exists(path: Path) -> bool:
    """Whether a file is there, here or in the store, without fetching it."""
    url = url_of(path)
    return path.exists() or (url is not None and objects.head(url) is not None)


def fetch(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """As `pull`, for large files: processes of one machine that want the same wait for one of them to fetch it."""
    if url_of(folder) is None:
        return
    with waiting(notes_folder(folder) / "fetch.lock"):
        pull(folder, wanted, gone=re.compile(""))


def fetch_newest(folder: Path, commit: str) -> None:
    """Fetch the newest folder inside `folder` that holds the file `commit`, unless it is whole here."""
    url = url_of(folder)
    if url is None:
        return
    there = objects.listing(url)
    whole = sorted(name.partition("/")[0] for name in there if name.endswith(f"/{commit}"))
    for newest in whole[-1:]:
        sizes = {name: entry.size for name, entry in there.items() if name.startswith(f"{newest}/")}
        if any(size_of(folder / name) != size for name, size in sizes.items()):
            fetch(folder / newest)


def fetch_model(url: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The local copy of a model folder at a URL, or of those of its files that are wanted.

    Raises UserError when there is nothing, and as store.get does.
    """
    folder = working_copy(url)
    fetch(folder, wanted)
    if not _names(folder, wanted):
        raise UserError(f"{url_of(folder)}: no such model folder", "model.path names a folder in WanPipeline layout")
    return folder


def fetch_file(url: str | Path) -> Path:
    """The local copy of one file at a URL, as the store has it now; nothing lies there when the store has none."""
    path = working_copy(url)
    if url_of(path) is None:
        raise UserError(f"{url}: no name in a store begins with a dot here", "give the file another name")
    with waiting(notes_folder(path.parent) / "fetch.lock"):
        agree(path)
    return path


def fetch_any(url: str | Path) -> Path:
    """The local copy of a file or a whole folder at a URL; nothing lies there when the store has neither."""
    path = fetch_file(url)
    if not path.is_file():
        fetch(path)
    return path


@contextmanager
def borrowed(path: Path) -> Iterator[None]:
    """Have a file here for a while: fetched when it is only in the store, and removed again in the end."""
    here = path.exists()
    look(path)
    try:
        yield
    finally:
        if not here and url_of(path):
            path.unlink(missing_ok=True)


@contextmanager
def afresh() -> Iterator[None]:
    """With an empty cache that is thrown away in the end: what is read then is what the store has now."""
    before = os.environ.get(CACHE)
    top = cache_folder()
    top.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="afresh-", dir=top) as empty:
        os.environ[CACHE] = empty
        try:
            yield
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


# --- To the store ----------------------------------------------------------------------------------------------------


def publish_new(temporary: Path, path: Path) -> bool:
    """Put a private file to the store under the URL of `path` and give it that name here; False when somebody was
    first: then `path` has that one's bytes. Raises as store.put_new does."""
    url = url_of(path)
    assert url
    if objects.put_new(temporary, url, RUN.sub("", url)):
        name_new(temporary, path)
        return True
    entry = objects.head(url)
    if entry is None:
        raise RunFailed(
            f"{url}: was there and is gone", "is somebody deleting this run? else run the same command again"
        )
    _fetch_one(url, path, entry)
    # the same bytes: the store took ours, and only its answer was lost
    return size_of(path) == size_of(temporary) and filecmp.cmp(path, temporary, shallow=False)


def agree(path: Path, *, put_back: bool = False) -> None:
    """Make a file here the one in the store: fetch that where they differ. What the store has no more goes from here
    too, or, with `put_back`, is published again: somebody deleted it there, and records that follow refer to it."""
    url, memos = url_of(path), Memos(path.parent)
    assert url
    entry = objects.head(url)
    if entry is None and put_back and objects.put_new(path, url, RUN.sub("", url)):
        return
    entry = entry or objects.head(url)
    if entry is None and path.is_file():
        path.unlink(missing_ok=True)
    elif entry is not None and not same(path, entry, memos):
        fetch_object(url, path, entry, memos)
    memos.write()


def put(source: Path, path: Path) -> None:
    """Put a file to the store under the URL of `path`; the last writer wins. Nothing happens for local runs.

    Where every put is a commit, a log that has grown (`source` is `path`) waits for the next `put_folder`, and weights
    for that of their own folder, which always follows: what is written next to them makes them count.
    """
    url = url_of(path)
    if url and source == path and objects.in_commits(url):
        commits.wait(path)
    elif url and not (path.suffix == ".safetensors" and objects.in_commits(url)):
        objects.put(source, url)


def put_folder(folder: Path, last: str = "", wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Put the files of a folder that the store does not have, `last` after all others, or all in one commit. Nothing
    happens for local runs."""
    url = url_of(folder)
    if url is None:
        return
    there, memos = objects.listing(url), Memos(folder)
    missing = [name for name in _names(folder, wanted) if not same(folder / name, there.get(name), memos)]
    if objects.in_commits(url):
        return commits.commit(folder, url, missing)

    def send(name: str) -> None:
        found = os.stat(folder / name)
        objects.put(folder / name, f"{url}/{name}")
        entry = objects.head(f"{url}/{name}")
        if entry is not None and entry.size == found.st_size:  # so that it is not fetched back
            memos.note(name, entry.version, found)

    _at_once(send, [name for name in missing if name != last])
    if last in missing:
        send(last)
    memos.write()


def remove(folder: Path, keep: Iterable[str] = ()) -> None:
    """Delete what the store has in a folder, but for the folders inside it that are named. Nothing for local runs."""
    url, kept = url_of(folder), set(keep)
    names = [name for name in objects.listing(url) if name.partition("/")[0] not in kept] if url else []
    if url and objects.in_commits(url):
        if names:
            objects.change({}, [f"{url}/{name}" for name in names])
        return
    # records that make a folder count go first
    _at_once(lambda name: objects.remove(f"{url}/{name}"), [name for name in names if name.endswith(".json")])
    _at_once(lambda name: objects.remove(f"{url}/{name}"), [name for name in names if not name.endswith(".json")])


def remove_files(paths: Iterable[Path]) -> None:
    """Delete files, in the store too, where it has them."""
    chosen = list(paths)
    urls = [url for url in map(url_of, chosen) if url]
    for path in chosen:
        path.unlink(missing_ok=True)
    if urls and objects.in_commits(urls[0]):
        return objects.change({}, urls)
    _at_once(objects.remove, urls)


# --- Both ------------------------------------------------------------------------------------------------------------


def _forget_others(folder: Path, here: set[str], there: dict[str, objects.Entry], memos: Memos) -> set[str]:
    """Remove stages whose plan is another one in the store, or gone: at that URL is a new run now, and nothing made for
    the old one may get into it. Returns the names that were removed."""
    removed: set[str] = set()
    for name in here:
        path = folder / name
        if PLAN.search(str(path)) and not _same_plan(path, there.get(name), memos):
            removed |= {other for other in here if (folder / other).is_relative_to(path.parent)}
            shutil.rmtree(path.parent, ignore_errors=True)
    return removed


def _same_plan(path: Path, entry: objects.Entry | None, memos: Memos) -> bool:
    if entry is None or same(path, entry, memos):
        return entry is not None
    url = url_of(path)
    assert url
    return size_of(path) == entry.size and objects.read(url, 0, entry.size) == path.read_bytes()


def _names(folder: Path, wanted: Callable[[str], bool]) -> set[str]:
    """Files under a folder, relative to it, hidden ones and the spool left out."""
    found: set[str] = set()
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and url_of(Path(top, name))]
        names = (Path(top, name).relative_to(folder).as_posix() for name in files if not name.startswith("."))
        found.update(name for name in names if wanted(name))
    return found


def _at_once(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Several transfers at a time; the first error ends it."""
    chosen = list(names)
    if not chosen:
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(AT_ONCE, len(chosen))) as pool:
        jobs = [pool.submit(work, name) for name in chosen]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
