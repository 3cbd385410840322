"""What the runner reads off a notebook without running it: title, parameters, code hash."""

from __future__ import annotations

import ast
import contextlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from . import cache, paths

_ORDER = ("sensitivity", "stability", "bridge", "beyond")  # then adapt_your_model and whatever else stands alone
LAST = "00_overview"
_ANNOTATIONS = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple, "dict": dict}


class NotebookError(ValueError):
    """A notebook or a set of parameters that cannot be run; the message is one line for the reader."""


@dataclass(frozen=True)
class Parameter:
    """One line of the `parameters` cell: an annotation (source text, None without) and the default."""

    annotation: str | None
    default: Any

    def convert(self, value: Any) -> Any:
        """`value` as the notebook is to get it, an int as a float where one is asked for; a TypeError for others."""
        if self.annotation is None:
            return _convert(value, Any if self.default is None else type(self.default))
        try:
            expected = eval(self.annotation, {"__builtins__": {}}, {**_ANNOTATIONS, "Literal": Literal})
        except Exception:
            known = ", ".join(_ANNOTATIONS)
            raise NotebookError(f"annotation {self.annotation!r} of a parameter: use {known}") from None
        return _convert(value, expected)


@dataclass(frozen=True)
class Notebook:
    """A notebook, named by its stem: the path below `notebooks/` without suffix."""

    stem: str
    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        """The notebook's JSON; a NotebookError where it is none."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NotebookError(f"{self.stem}: cannot be read as a notebook: {error}") from None
        if "cells" not in content:
            raise NotebookError(f"{self.stem}: is no notebook: it has no cells")
        return content

    def cells(self, *, tag: str | None = None) -> list[dict[str, Any]]:
        """The code cells, in order; with `tag`, those that carry it."""
        code = [c for c in self.content["cells"] if c["cell_type"] == "code"]
        return [c for c in code if tag is None or tag in c.get("metadata", {}).get("tags", [])]

    @property
    def code_hash(self) -> str:
        """Hash of the code cells; comments, text and outputs do not count."""
        return cache.fingerprint([cache.code_digest("".join(c["source"])) for c in self.cells()])

    @property
    def title(self) -> str:
        """The first heading; the stem where there is none."""
        for cell in self.content["cells"]:
            for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
                if line.startswith("#"):
                    return line.lstrip("#").strip()
        return self.stem

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The one `parameters` cell, of assignments of literals alone: name -> annotation and default."""
        tagged = self.cells(tag="parameters")
        if len(tagged) != 1:
            raise NotebookError(f"{self.stem}: expected one cell with the tag 'parameters', found {len(tagged)}")
        try:
            return dict(_parameter(node) for node in cache.parsed("".join(tagged[0]["source"])).body)
        except (SyntaxError, ValueError) as error:
            reason = f"the parameters cell takes only assignments of literals: {error}"
            raise NotebookError(f"{self.stem}: {reason}") from None

    @property
    def redraws(self) -> bool:
        """Whether it draws what is published unless `recompute` asks for more."""
        return "recompute" in self.parameters

    def merge(self, overrides: Mapping[str, Any], *, profile: str) -> dict[str, Any]:
        """The defaults under the profile's parameters, names and types checked; what is None is the profile's."""
        known = self.parameters
        if "profile" not in known:
            raise NotebookError(f"{self.stem}: the parameters cell has no 'profile'")
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise NotebookError(f"{self.stem}: unknown parameter {unknown[0]!r}: it has {', '.join(known)}")
        merged = {name: parameter.default for name, parameter in known.items()}
        for name, value in {**merged, **overrides, "profile": profile}.items():
            try:
                merged[name] = known[name].convert(value)
            except TypeError:
                expected = known[name].annotation or type(known[name].default).__name__
                raise NotebookError(f"{self.stem}: parameter {name!r} is {expected}, got {value!r}") from None
        return merged


def profile(name: str) -> dict[str, dict[str, Any]]:
    """The parameters of a profile, by notebook: `notebooks/profiles/NAME.yaml`, nothing where there is no such file.

    Raises:
        NotebookError: no mapping from notebook to its parameters.
    """
    path = paths.PROFILES / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}
    except yaml.YAMLError as error:
        raise NotebookError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise NotebookError(f"{path}: expected a mapping from notebook to its parameters")
    return {stem: values or {} for stem, values in content.items()}


def discover() -> dict[str, Notebook]:
    """All notebooks by stem, in the order in which they run: one folder after the other, the overview last."""
    found = [
        Notebook(path.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix(), path)
        for path in paths.NOTEBOOKS.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    ]

    def place(notebook: Notebook) -> tuple[int, str]:
        folder = notebook.stem.split("/")[0]
        last = len(_ORDER) + (notebook.stem == LAST)
        return (_ORDER.index(folder) if folder in _ORDER else last, notebook.stem)

    return {notebook.stem: notebook for notebook in sorted(found, key=place)}


def _parameter(node: ast.stmt) -> tuple[str, Parameter]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        return node.target.id, Parameter(ast.unparse(node.annotation), ast.literal_eval(node.value))
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, Parameter(None, ast.literal_eval(node.value))
    raise ValueError(ast.unparse(node))


def _convert(value: Any, expected: Any) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    kind = origin or expected
    if expected is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for member in sorted(arguments, key=lambda member: member is not type(value)):  # int | float keeps an int
            with contextlib.suppress(TypeError):
                return _convert(value, member)
    elif origin is Literal and value in arguments:
        return value
    elif expected in (None, type(None)) and value is None:
        return value
    elif kind in (list, tuple) and isinstance(value, list | tuple):
        return [_convert(v, arguments[0]) for v in value] if arguments else list(value)
    elif kind is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1]) if arguments else v for k, v in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    raise TypeError(value)
