"""What goes wrong with a store: what passes by itself, and the rest in the words of this program."""

from __future__ import annotations

import errno
from typing import Any

from shards.errors import RunFailed, UserError
from shards.files import FULL

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
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"}


class Missing(UserError):
    """No such object; not an error to those who only look."""


class Taken(Exception):
    """The name is taken already."""


class Short(Exception):
    """Fewer or other bytes arrived than the store has."""


def passes(error: BaseException) -> bool:
    """Whether asking again may help: throttling, timeouts, lost connections, server errors, short answers."""
    if isinstance(error, Short | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    return any(kind.__name__ in PASSING_NAMES for kind in type(error).__mro__) or status_of(error) in PASSING_STATUS


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, from whichever client it came."""
    while error is not None:
        response = getattr(error, "response", None)
        found: Any = getattr(error, "code", None) or getattr(response, "status_code", getattr(error, "status", None))
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(found)
        error = error.__cause__
    return None


def plain(url: str, error: Exception) -> Exception:
    """An error in the words of this program; the first sentence of the client's where it adds something."""
    text = str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
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
    if isinstance(error, FileNotFoundError):
        return Missing(f"{url}: no such object", "correct the URL, or run the stage that writes it")
    if "difference between the request time" in text:  # S3 signs the time with every request
        problem = f"{url}: the clock of this machine is too far from the store's: {text}"
        return UserError(problem, "set it; S3 bears a quarter of an hour")
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return UserError(f"{url}: access denied: {text}", f"check the rights of your key on {bucket}, and the key")
    return RunFailed(f"{url}: {text}", "what was published is kept; run the same command again when the store answers")


def bucket_of(url: str) -> str:
    """scheme://bucket of a URL."""
    return "/".join(url.split("/")[:3])
