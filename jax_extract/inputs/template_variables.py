"""Which variables a chat template takes from its caller.

In: a template's syntax, as Jinja parses it. Out: the names that it reads and has not certainly set before. Jinja itself
counts every name that is set in a branch, and a user who gives a value to such a one would see nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def variables_of(syntax: Any) -> set[str]:
    """Names that a caller can give a value which the template reads."""
    from jinja2 import meta

    return set(meta.find_undeclared_variables(syntax)) & set(_asked(syntax.body, set()))


def _asked(statements: Iterable[Any], known: set[str]) -> Iterator[str]:
    """Names that are read while they are not `known` to be set; those that are set here join them."""
    from jinja2 import nodes

    for node in statements:
        if isinstance(node, nodes.If):
            branches = [node, *node.elif_]
            for branch in branches:
                yield from _read(branch.test, known)
            ways = [(way, set(known)) for way in (*(branch.body for branch in branches), node.else_)]
            for way, inner in ways:
                yield from _asked(way, inner)
            known |= set.intersection(*(inner for _, inner in ways))
        elif isinstance(node, nodes.For):
            yield from _read(node.iter, known)
            inner = known | {name.name for name in _names(node.target)} | {"loop"}
            if node.test is not None:
                yield from _read(node.test, inner)
            yield from _asked(node.body, inner)
            yield from _asked(node.else_, set(known))
        elif isinstance(node, nodes.Assign):
            yield from _read(node.node, known)
            known |= {name.name for name in _names(node.target) if name.ctx == "store"}
        else:
            yield from _read(node, known)


def _read(node: Any, known: set[str]) -> Iterator[str]:
    yield from (name.name for name in _names(node) if name.ctx == "load" and name.name not in known)


def _names(node: Any) -> Iterator[Any]:
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)
