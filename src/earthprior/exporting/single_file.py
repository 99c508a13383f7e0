"""The loader in one file: the package's own sources of `backbone` and all that it imports, one after the other.

So there is no second copy of the code to keep in step, and both compute the same bits.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import earthprior

NAME = "earthprior_backbone.py"
FIRST = "earthprior.backbone"

HEADER = '''"""A pretrained EarthPrior backbone, read without EarthPrior: this file needs only torch and safetensors.

    from earthprior_backbone import read

    backbone = read("FOLDER")                   # with config.json and backbone.safetensors
    x0 = backbone.normalize(raw)                # raw: (B, C, H, W), values as in the files, bands as backbone.bands
    pyramid = backbone.features(x0)             # finest first, level i at 1 / 2**i of the resolution

Written by `earthprior export` of version {version} out of the package's own modules; do not edit.
SPDX-License-Identifier: MIT. Copyright (c) the EarthPrior authors.
"""
# ruff: noqa
# mypy: ignore-errors

from __future__ import annotations
'''


class _Module(NamedTuple):
    name: str
    lines: list[str]
    tree: ast.Module


def single_file() -> str:
    """The source of a module with `read` and `Backbone`.

    Raises:
        RuntimeError: Two modules define one name, or import each other by name: then they cannot stand in one file.
    """
    modules: list[_Module] = []
    _collect(FIRST, modules, set())
    owners: dict[str, str] = {}
    parts = [HEADER.format(version=earthprior.__version__)]
    for module in modules:
        for name in _defined(module.tree):
            if owners.setdefault(name, module.name) != module.name:
                raise RuntimeError(f"{name} is defined in {owners[name]} and in {module.name}; rename one of them")
        parts.append(f"# {module.name}\n\n{_without_own_imports(module)}")
    return "\n\n".join(parts)


def _collect(name: str, modules: list[_Module], seen: set[str]) -> None:
    """The module after those that it imports."""
    if name in seen:
        return
    seen.add(name)
    spec = find_spec(name)
    text = Path(str(spec.origin)).read_text(encoding="utf-8") if spec else ""
    module = _Module(name, text.splitlines(), ast.parse(text))
    for node in ast.walk(ast.Module(_acting(module.tree), [])):
        if isinstance(node, ast.Import) and any(alias.name.startswith("earthprior") for alias in node.names):
            raise RuntimeError(f"{name} imports a module of the package by its name, line {node.lineno}")
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            source = str(node.module)
            for alias in node.names:
                if alias.asname not in (None, alias.name) or not hasattr(import_module(source), "__file__"):
                    raise RuntimeError(f"{name} renames what it imports, line {node.lineno}")
                if find_spec(source) and _is_module(source, alias.name):
                    raise RuntimeError(f"{name} imports the module {source}.{alias.name}, line {node.lineno}")
            _collect(source, modules, seen)
    modules.append(module)


def _is_own(node: ast.ImportFrom) -> bool:
    return (node.module or "").split(".")[0] == "earthprior"


def _is_module(package: str, name: str) -> bool:
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / f"{name}.py").is_file() for folder in folders)


def _acting(tree: ast.Module) -> list[ast.stmt]:
    """The statements of a module that run: not those for type checkers."""
    return [node for node in tree.body if not _for_types(node)]


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _without_own_imports(module: _Module) -> str:
    """The source, comments kept, without its docstring and what only the package can import."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (_is_own(node) or node.module == "__future__"):
            left_out |= _lines(node)
    for node in module.tree.body:
        if _for_types(node):
            left_out |= _lines(node)
    if ast.get_docstring(module.tree) is not None:
        left_out |= _lines(module.tree.body[0])
    kept = [line for number, line in enumerate(module.lines, 1) if number not in left_out]
    return "\n".join(kept).strip() + "\n"


def _lines(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module's top level gives a meaning of its own."""
    for node in _acting(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
