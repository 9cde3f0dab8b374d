"""Classes of the user's that settings name: `package.module:Class`, or by a file, `/path/file.py:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from shards.absolute_paths import nearest_file
from shards.errors import UserError, nearest


def load_class(what: str, target: str) -> Any:
    """The class behind `module:Class`. The current folder counts, since that is where users keep their classes.

    what: what it is meant to be, with the name that the user gave, for errors. Raises UserError for a module that is
    missing or cannot be imported, and for a class that it does not have.
    """
    source, _, class_name = target.partition(":")
    try:
        module = _from_file(Path(source).expanduser()) if is_file(source) else _from_path(source)
    except FileNotFoundError:
        raise UserError(f"{what}: {source}: no such file", nearest_file(Path(source))) from None
    except ImportError as error:
        hint = "install it, or give the command in the folder where it lies, or name its file: `path/file.py:Class`"
        raise UserError(f"{what}: cannot import {source}: {error}", hint) from error
    except Exception as error:  # the file is the user's, and can raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: cannot import {source}: {problem}", "--debug says where") from error
    if not hasattr(module, class_name):
        names = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = nearest(class_name, names)
        hint = f"did you mean {near!r}?" if near else "write it as `module:Class`"
        raise UserError(f"{what}: module {source} has no {class_name!r}", hint)
    return getattr(module, class_name)


def is_file(source: str) -> bool:
    """Whether the part before the colon names a file, not a module."""
    return source.endswith(".py") or "/" in source


def in_package(file: Path) -> tuple[Path, str]:
    """The folder that must be on the path for a file, and its module there: `pkg.colour` where its folder is one."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts, folder = [folder.name, *parts], folder.parent
    return folder, ".".join(parts)


def _from_path(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _from_file(file: Path) -> ModuleType:
    """The module in a file, once per process. Its folder, or that of its package, counts for what it imports.

    Raises FileNotFoundError, and whatever its import raises.
    """
    if not file.is_file():
        raise FileNotFoundError(file)
    folder, dotted = in_package(file)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if "." in dotted or file.name == "__init__.py":
        return importlib.import_module(dotted)
    # under a name of its own, because two files of one name are two modules
    own = f"_own_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if own not in sys.modules:
        spec = importlib.util.spec_from_file_location(own, file)
        assert spec
        assert spec.loader
        sys.modules[own] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[own]
            raise
    return sys.modules[own]
