"""The code of lgmp without some of what it does, to see what that costs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def without(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The same function, compiled from its source, without the statements that mention any of `names`.

    Names are those of variables or attributes. A statement is the smallest one, but an `if` goes as a whole where its
    condition has such a name. So what is left is the very code that lgmp runs, whatever becomes of it. Raises
    ValueError where a name is not in there, since then nothing would be measured.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    dropper = _Dropper(names)
    dropper.visit(tree)
    if missing := set(names) - dropper.found:
        raise ValueError(f"{function.__qualname__} has no {', '.join(sorted(missing))}")
    scope = dict(function.__globals__)
    exec(compile(ast.fix_missing_locations(tree), f"<{function.__qualname__} without {names}>", "exec"), scope)
    made: Callable[..., Any] = scope[function.__name__]
    return made


class _Dropper(ast.NodeTransformer):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = set(names)
        self.found: set[str] = set()

    def visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.FunctionDef | ast.For | ast.While | ast.With | ast.Try | ast.Module):
            return self.generic_visit(node)
        if not isinstance(node, ast.stmt):
            return node
        named = self._names_in(node.test) if isinstance(node, ast.If) else self._names_in(node)
        self.found |= named
        if named:
            return None
        return self.generic_visit(node) if isinstance(node, ast.If) else node

    def _names_in(self, node: ast.AST) -> set[str]:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        names |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
        return names & self._names
