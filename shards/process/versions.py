"""Versions of installed packages, this one's among them."""

from __future__ import annotations

from functools import cache


@cache
def version_of(package: str) -> str:
    """Version of a package; empty when it is not installed, as this one is not when it runs from a bare checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def our_version() -> str:
    """Version of this package; empty when it is not installed."""
    return version_of("rushes")
