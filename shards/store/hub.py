"""The Hugging Face hub (hf://) as an object store: its git repositories, through the client huggingface_hub.

That client's own file system, HfFileSystem, remembers listings and which repositories exist, also when it is asked to
put a file only where none is. Here every look asks the hub, and files that belong together are one commit. Of two
writers of a name the first one wins: a new name is committed on top of the very commit that was seen to lack it, and
the hub refuses that (412) when another commit came between.
"""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, tqdm  # type: ignore[attr-defined]

from shards.errors import UserError
from shards.store.errors import Moved

TIMEOUTS = (10.0, 300.0, 300.0, 300.0)  # s: to connect, to read, to write, to get a connection; a commit takes long
READ_TIMEOUTS = (10.0, 60.0, 60.0, 60.0)  # s, of a download
MOVED = 412  # status of a commit whose parent is not the newest any more
NAMES = 500  # that are looked up in one request
TRIES = 10  # at a new name, while others commit to the same branch
PAUSE = 0.2  # s, longer with every try

PATH = re.compile(
    r"(?:(?P<kind>models|datasets|spaces)/)?(?P<id>(?!buckets/|kernels/)[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/[^/]+|[^/]+))?(?:/(?P<path>.+))?"
)

warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # tables are meant


@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository; `kind` is model, dataset or space, no revision is the branch main."""

    kind: str
    id: str
    revision: str | None
    path: str


class Hub:
    """Repositories of the hub, with those methods of a file system that `objects.py` calls; threads may share it.

    Paths are `owner/name[@revision]/…`, or begin with `datasets/`. Errors are those of huggingface_hub, and
    FileNotFoundError, FileExistsError, Moved, and UserError for what is not a path of a repository.
    """

    def __init__(self, **options: Any) -> None:
        own = HfFileSystem(**options)  # reads FSSPEC_HF
        self._options, self._api = options, HfApi(endpoint=own.endpoint, token=own.token)
        self._seen: dict[str, dict[str, object]] = {}  # what the last look told of files, for one download of each

    def invalidate_cache(self, path: str | None = None) -> None:
        """Nothing: every look asks the hub."""

    def info(self, path: str, **_: object) -> dict[str, object]:
        """Name, size, type, blob_id, lfs and xet_hash of a file or folder, as the hub has it now.

        Raises FileNotFoundError where there is none in an existing repository.
        """
        place = _place(path)
        if not place.path:
            return {"name": path, "size": 0, "type": "directory"}
        found = self._ask().get_paths_info(place.id, place.path, revision=place.revision, repo_type=place.kind)
        if not found:
            raise FileNotFoundError(path)
        self._seen[path] = _info(path, found[0])
        return self._seen[path]

    def find(self, path: str, **_: object) -> dict[str, dict[str, object]]:
        """What `info` tells, of everything below a folder, by name. Raises EntryNotFoundError where there is none."""
        place = _place(path)
        top = path.strip("/").removesuffix(place.path).rstrip("/")
        found = self._ask().list_repo_tree(
            place.id, place.path or None, recursive=True, revision=place.revision, repo_type=place.kind
        )
        looked = {f"{top}/{one.path}": _info(f"{top}/{one.path}", one) for one in found}
        self._seen.update(looked)
        return looked

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        """The bytes from `start` to `end` of a file, in one request of exactly those."""
        first, span = start or 0, f"{start or 0}-{'' if end is None else end - 1}"
        if end is not None and end <= first:
            return b""
        headers = self._headers() | {"Range": f"bytes={span}"}
        response = http_backoff("GET", self._url(path), headers=headers, timeout=READ_TIMEOUTS)
        hf_raise_for_status(response)
        content: bytes = response.content
        return content if response.status_code == 206 else content[first:end]

    def get_file(self, rpath: str, lpath: str, **_: object) -> None:
        """Fetch a file, by Xet where the hub keeps it so; a download that breaks off continues where it was."""
        seen = self._seen.pop(rpath, None) or self.info(rpath)
        if seen.get("xet_hash"):
            HfFileSystem(**self._options).get_file(rpath, lpath)  # a new one, for it remembers
            return
        with open(lpath, "wb") as file:
            http_get(self._url(rpath), file, headers=self._headers(), tqdm_class=_Silent)

    def put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **_: object) -> None:
        """Put a file, as one commit. With `mode` "create" FileExistsError is raised when the name is taken."""
        if mode != "create":
            return self.change({rpath: Path(lpath)})
        place = _place(rpath)
        for number in range(TRIES):
            seen = self._newest(place)
            if self._ask().get_paths_info(place.id, place.path, revision=seen, repo_type=place.kind):
                raise FileExistsError(rpath)
            try:
                return self.change({rpath: Path(lpath)}, parent=seen)
            except Moved:
                time.sleep(PAUSE * (number + 1) * random.uniform(0.5, 1.5))
        raise Moved("others commit to the same branch all the time")

    def rm_file(self, path: str) -> None:
        """Delete a file, if it is there."""
        self.change({}, [path])

    def change(self, add: Mapping[str, Path], remove: Sequence[str] = (), parent: str | None = None) -> None:
        """Put and delete files of one repository in one commit, on top of `parent` where that is given.

        What is so already is left out: files with the same content, and deleted ones, as when only the answer was lost.
        Raises Moved when another commit came first.
        """
        places = {name: _place(name) for name in [*add, *remove]}
        place = next(iter(places.values()))
        gone = self._there(place, [places[name].path for name in remove])
        names = [*(places[name].path for name in add), *gone]
        if not names:
            return
        added = [CommitOperationAdd(places[name].path, file) for name, file in add.items()]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *added,
            *(CommitOperationDelete(name) for name in gone),
        ]
        verb = "put" if add else "delete"
        title = f"{verb} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        try:
            self._ask().create_commit(
                place.id, operations, commit_message=title, repo_type=place.kind, revision=place.revision,
                parent_commit=parent,
            )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response.status_code == MOVED:
                raise Moved(error.server_message or "another commit came first") from error
            raise
        left_out = [one.path_in_repo for one in added if getattr(one, "_should_ignore", False)]
        if left_out:  # by the client, without a word
            problem = f"hf://{place.id}: its .gitignore keeps {left_out[0]} out of the repository"
            raise UserError(problem, "take the line that matches it out of .gitignore")

    def _there(self, place: HubPath, names: Sequence[str]) -> list[str]:
        """Those of the names that a repository has."""
        found: list[str] = []
        for first in range(0, len(names), NAMES):
            asked = list(names[first : first + NAMES])
            looked = self._ask().get_paths_info(place.id, asked, revision=place.revision, repo_type=place.kind)
            found += [one.path for one in looked]
        return found

    def _newest(self, place: HubPath) -> str | None:
        """The commit that a branch is at."""
        # without `expand` the answer has all names of the repository
        found = self._ask().repo_info(place.id, revision=place.revision, repo_type=place.kind, expand=["sha"])  # type: ignore[arg-type]
        return found.sha

    def _ask(self) -> HfApi:
        """The client, which by itself would wait for an answer without end."""
        get_session().timeout = TIMEOUTS
        return self._api

    def _url(self, path: str) -> str:
        """Where a file is downloaded."""
        place, endpoint = _place(path), self._api.endpoint
        return hf_hub_url(place.id, place.path, repo_type=place.kind, revision=place.revision, endpoint=endpoint)

    def _headers(self) -> dict[str, str]:
        """Of a download; what was packed on the way cannot be counted."""
        return build_hf_headers(token=self._api.token) | {"Accept-Encoding": "identity"}


class _Silent(tqdm):
    """A progress bar that is not shown: a run is many files."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


def _place(path: str) -> HubPath:
    """The parts of a path on the hub. Raises UserError for what is not a path of a repository."""
    match = PATH.fullmatch(path.strip("/"))
    if match is None:
        hint = "hf://OWNER/NAME is a model repository, hf://datasets/OWNER/NAME a dataset; both may end in @BRANCH"
        raise UserError(f"hf://{path}: not a place in a repository of the hub", hint)
    return HubPath((match["kind"] or "models").removesuffix("s"), match["id"], match["revision"], match["path"] or "")


def _info(name: str, found: RepoFile | RepoFolder) -> dict[str, object]:
    if isinstance(found, RepoFolder):
        return {"name": name, "size": 0, "type": "directory"}
    of_content = {"blob_id": found.blob_id, "lfs": found.lfs, "xet_hash": found.xet_hash}
    return {"name": name, "size": found.size, "type": "file", **of_content}
