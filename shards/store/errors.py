"""What goes wrong with a store: what passes by itself, and the rest in the words of this program."""

from __future__ import annotations

import errno
import re

from shards.errors import FULL, RunFailed, UserError

HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws; for a public bucket "
    "FSSPEC_S3='{\"anon\": true}'",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "`hf auth login`, or HF_TOKEN",
}
PASSING = {errno.EBUSY, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", -1)}
PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional puts met
PASSING_NAMES = {  # of the clients under fsspec, which are not imported for this
    "ClientConnectionError", "ClientPayloadError", "FlexibleChecksumError", "HTTPClientError", "ChecksumError",
    "IncompleteRead", "ResponseParserError", "RequestError", "TransportError",
}  # fmt: skip
KINDS = {"models", "datasets", "spaces", "kernels", "buckets"}  # first part of a path on the hub, or it is an owner
OFFLINE = "OfflineModeIsEnabled"  # of the client of the hub; a lost connection by its type
WAITS = 300.0  # s that we wait at most when a store asks for it: the window of the hub's quotas
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"}


class Missing(UserError):
    """No such object; not an error to those who only look."""


class Taken(Exception):
    """The name is taken already."""


class Short(Exception):
    """Fewer or other bytes arrived than the store has."""


class Moved(Exception):
    """Somebody else changed the same branch of the hub in the same moment."""


def passes(error: BaseException) -> bool:
    """Whether asking again may help: throttling, timeouts, lost connections, server errors, short answers."""
    if type(error).__name__ == OFFLINE:
        return False
    if isinstance(error, Short | Moved | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    return any(kind.__name__ in PASSING_NAMES for kind in type(error).__mro__) or status_of(error) in PASSING_STATUS


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, from whichever client it came."""
    while error is not None:
        response = getattr(error, "response", None)
        found: object = getattr(error, "code", None) or getattr(response, "status_code", getattr(error, "status", None))
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(str(found))
        error = error.__cause__
    return None


def wait_of(error: BaseException) -> float:
    """Seconds that the store asks to wait before the next request; 0 when it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    found = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(r"t=(\d+)", headers.get("RateLimit", ""))
    return float(found[found.lastindex or 0]) if found and status_of(error) in (429, 503) else 0.0


def plain(url: str, error: Exception) -> Exception:
    """An error in the words of this program; the first sentence of the client's where it adds something."""
    if isinstance(error, UserError):
        return error
    text = (getattr(error, "server_message", None) or str(error)).strip() or type(error).__name__
    text = text.splitlines()[0].strip()
    scheme, bucket = url.partition("://")[0], bucket_of(url)
    names = {kind.__name__ for kind in type(error).__mro__} | {type(error.__cause__).__name__}
    if isinstance(error, FileExistsError) or status_of(error) == 412:
        return Taken(url)
    if isinstance(error, OSError) and error.errno in FULL:
        return RunFailed(f"{url}: the disk of the local cache is full", "make room, or name another in RUSHES_CACHE")
    if names & NO_KEYS:
        return UserError(f"{url}: no credentials for {scheme}://", f"set {HINTS[scheme]}")
    if "NoSuchBucket" in names or "bucket does not exist" in text:
        return UserError(f"{bucket}: no such bucket", "make it, or correct the URL")
    if OFFLINE in names:
        return UserError(f"{url}: the client of the hub is set to stay offline", "unset HF_HUB_OFFLINE")
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError"} and "GatedRepoError" not in names:
        what = "repository" if "RepositoryNotFoundError" in names else "branch, tag or commit"
        hint = f"correct the URL, make it with `hf repos create`, or log in: {HINTS['hf']}"
        return UserError(f"{bucket}: no such {what}, or it is private and you may not see it", hint)
    if isinstance(error, FileNotFoundError) or "EntryNotFoundError" in names:
        return Missing(f"{url}: no such object", "correct the URL, or run the stage that writes it")
    if "difference between the request time" in text:  # S3 signs the time with every request
        problem = f"{url}: the clock of this machine is too far from the store's: {text}"
        return UserError(problem, "set it; S3 bears a quarter of an hour")
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return UserError(f"{url}: access denied: {text}", f"check the rights of your key on {bucket}, and the key")
    if status_of(error) == 429:
        return RunFailed(f"{url}: too many requests for now: {text}", "nothing is lost; run the same command later")
    return RunFailed(f"{url}: {text}", "what was published is kept; run the same command again when the store answers")


def bucket_of(url: str) -> str:
    """scheme://bucket of a URL; on the hub the repository, with its kind and its revision where the URL has them."""
    parts = url.split("/")
    if parts[0] != "hf:":
        return "/".join(parts[:3])
    return "/".join(parts[: 5 if parts[2] in KINDS else 4])
