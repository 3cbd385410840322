"""Content-addressed cache: the same inputs and the same code give back the same bytes.

A cached value is never trusted by date. Its name carries a hash of the key (everything the value depends on) and of the
source that computes it, so that an edit of either makes a new entry.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from influence.shards import atomically as atomic_write

from . import paths

# Code that starts notebooks and shows results: an edit there changes no file of results.
_RUNNER = ("companion/__main__.py", "companion/runner/")
# Code that names and keeps results: an edit there changes no number in a cached table.
_LEDGER = ("companion/__init__.py", "companion/ledger/")
# Modules that compute, judge and draw: a number depends on the definitions that compute it alone.
_ARTIFACTS = "companion/artifacts/"
# Files, each with the names in it that count; None: all of it.
_Code = dict[Path, frozenset[str] | None]
_PARSING = threading.Lock()
# Under which name a file says how long its table took.
_SECONDS = "seconds"
_spared = 0.0


@contextlib.contextmanager
def alone(lock: Path, refusal: Exception) -> Iterator[None]:
    """Hold a lock; where another process has it, raise the refusal."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise refusal from None


def sha256(file: Path) -> str:
    """Checksum of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(obj: object) -> str:
    """Sha256 of the canonical JSON of plain values, mappings, sequences and dataclasses.

    Raises:
        TypeError: for anything else; a path, above all, since a key must not depend on where files lie.
    """
    text = json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parsed(source: str) -> ast.Module:
    """The syntax tree of Python source, made by one thread at a time: CPython 3.11 counts the depth of all as one."""
    with _PARSING:
        return ast.parse(source)


@cache
def code_digest(source: str) -> str:
    """Sha256 of Python source without its comments, docstrings and layout (of the text where it does not parse)."""
    try:
        tree = parsed(source)
    except SyntaxError:  # a notebook cell with a magic
        return hashlib.sha256(source.encode()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def clock() -> float:
    """Seconds on a clock that goes forward, where a table is found, by what it took when it was computed."""
    return time.perf_counter() + _spared


def table(name: str, key: Mapping[str, Any], compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that is computed once for each key and each state of the computing code.

    A fresh one, too, is returned as it was read from the file, so that it has the same bytes as a cached one. The key
    is all that `compute` depends on, parameters, seeds, digests of the data, besides its code and what that imports.
    """
    code = computing_hash(compute.__module__, compute.__qualname__.partition(".")[0])
    digest = fingerprint({"key": dict(key), "code": code})[:32]
    path = paths.cache_dir() / "tables" / f"{name}-{digest}.parquet"
    if path.exists():
        try:
            return _read(path, found=True)
        except Exception as error:  # a damaged file must not stop a run that can make it anew
            warnings.warn(f"{path.name} cannot be read and is computed again: {error}", stacklevel=2)
    began = clock()
    frame = compute()
    frame.attrs[_SECONDS] = clock() - began
    atomic_write(path, lambda temporary: frame.to_parquet(temporary))
    return _read(path, found=False)


def _read(path: Path, *, found: bool) -> pd.DataFrame:
    global _spared
    frame = pd.read_parquet(path)
    seconds = frame.attrs.pop(_SECONDS, 0.0)
    _spared += seconds if found else 0.0
    return frame


@cache
def commit() -> str | None:
    """The commit of the checkout, "+" behind it where files differ from it; None where there is no git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]  # by no tag
    try:
        return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def package_hash() -> str:
    """Sha256 of the package without the runner: what an artifact depends on."""
    return _hash(_all_but(_RUNNER))


@cache
def computing_hash(module: str, name: str | None = None) -> str:
    """Sha256 of a module, by its full name, and all it imports, without runner and ledger: what a number depends on.

    A module outside the package depends on all of it; of one that draws too, only what the function `name` uses counts.
    """
    root, *rest = module.split(".")
    base = paths.PACKAGE.joinpath(*rest)
    files = set(base.rglob("*.py")) if base.is_dir() else {f for f in [base.with_suffix(".py")] if f.is_file()}
    if root != paths.PACKAGE.name or not files:
        return _hash(_all_but(_RUNNER + _LEDGER))
    return _hash(_reached([(file, None if name is None else frozenset({name})) for file in files]))


def _name(file: Path) -> str:
    return file.relative_to(paths.PACKAGE).as_posix()


def _all_but(excluded: tuple[str, ...]) -> _Code:
    return dict.fromkeys(f for f in paths.PACKAGE.rglob("*.py") if not _name(f).startswith(excluded))


def _reached(left: list[tuple[Path, frozenset[str] | None]]) -> _Code:
    """Code of the package that is reached through imports, none of it of the runner or the ledger."""
    found: _Code = {}
    while left:
        file, names = left.pop()
        if _name(file).startswith(_RUNNER + _LEDGER):
            continue
        if not _name(file).startswith(_ARTIFACTS):
            names = None
        if file in found:
            before = found[file]
            if before is None or (names is not None and names <= before):
                continue
            names = None if names is None else before | names
        found[file] = names
        left += _imports(file, file.read_text(encoding="utf-8"), names)
    return found


@cache
def _statements(source: str) -> list[ast.stmt]:
    return parsed(source).body


def _definitions(source: str, names: frozenset[str] | None) -> list[ast.stmt]:
    """The statements of a file, in order: all, or those that define some names or what these use of the same file."""
    statements = _statements(source)
    if names is None:
        return statements
    defined = {name: i for i, statement in enumerate(statements) for name in _defined(statement)}
    left, wanted = [defined[name] for name in names if name in defined], set[int]()
    while left:
        i = left.pop()
        if i not in wanted:
            wanted.add(i)
            left += [defined[node.id] for node in ast.walk(statements[i]) if _reads(node) and node.id in defined]
    return [statement for i, statement in enumerate(statements) if i in wanted]


def _reads(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _defined(statement: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module gives a meaning; those of its imports, too."""
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Import() | ast.ImportFrom():
            return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


@cache
def _imports(file: Path, source: str, names: frozenset[str] | None) -> list[tuple[Path, frozenset[str] | None]]:
    """Files of the package that the definitions of some names in a file import, each with the names they use of it."""
    package = (paths.PACKAGE.name, *file.relative_to(paths.PACKAGE).parent.parts)
    nodes = [node for statement in _definitions(source, names) for node in ast.walk(statement)]
    read = {node.id for node in nodes if _reads(node)}
    attributes: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, set()).add(node.attr)
    files: list[tuple[Path, frozenset[str] | None]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            files += [(f, None) for alias in node.names for f in _module(alias.name.split("."))]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                local = alias.asname or alias.name
                if local in read or not _name(file).startswith(_ARTIFACTS):
                    module = _module([*base, alias.name])
                    files += [(f, frozenset(attributes.get(local, ()))) for f in module]
                    files += [(f, frozenset({alias.name})) for f in (() if module else _module(base))]
    return files


def _module(name: list[str]) -> set[Path]:
    """The file of a module, or a package's own file."""
    if name[:1] != [paths.PACKAGE.name]:
        return set()
    base = paths.PACKAGE.joinpath(*name[1:])
    return {f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()}


def _hash(code: _Code) -> str:
    sha = hashlib.sha256()
    for file in sorted(code, key=_name):
        source = file.read_text(encoding="utf-8")
        if code[file] is not None:
            source = "\n".join(map(ast.unparse, _definitions(source, code[file])))
        sha.update(f"{_name(file)}\0{code_digest(source)}\n".encode())
    return sha.hexdigest()


def _plain(obj: object) -> Any:
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    if isinstance(obj, np.generic):
        return obj.item()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {f.name: _plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
        return {"__dataclass__": type(obj).__name__, **fields}
    if isinstance(obj, Mapping):
        if not all(isinstance(k, str) for k in obj):
            raise TypeError(f"keys must be strings, got {list(obj)!r}")
        return {k: _plain(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(v) for v in obj]
    raise TypeError(f"cannot take the fingerprint of {type(obj).__name__} {obj!r}: use plain values or dataclasses")
