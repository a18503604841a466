"""YAML as people write it by hand: what is given twice, or a key that is no text, is an error; and `1e-4` can be a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

import yaml

from tunesmith.errors import UsageError

MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
NO_TEXT = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}
"""What YAML 1.1 takes a key without quotes for, by the end of its tag: `on` and `no`, 1, null or ~, 2026-01-01."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which `1e-4` would be a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: IO[str] | str, name: str, *, exponents: bool = True) -> Any:
    """The one document in a text. name: what messages call it; exponents: whether `1e-4` is a number.

    Raises: UsageError with both lines for a key that is given twice in one mapping, or a value by a dotted name too
        (`train.steps: 3` beside `train: {steps: 4}`), and with its line for a key that is no text; yaml.YAMLError.
    """
    loader = _Loader(text) if exponents else yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, name, [])
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(node: yaml.Node, name: str, above: list[yaml.Node]) -> None:
    """Every mapping by itself, and the lists in it. above: the nodes around it, among which an alias can name it."""
    if node in above:
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, name, [*above, node])
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            _check_key(key, name)
        keys = [(key.value, key.start_mark.line + 1) for key, _ in _pairs(node)]
        for given in (keys, list(_values(node, "", above))):
            seen: dict[str, int] = {}
            for key, line in given:
                if key in seen:
                    raise UsageError(f'{name}: "{key}" appears in line {seen[key]} and again in line {line}; keep one')
                seen[key] = line
        for _, value in node.value:
            _check(value, name, [*above, node])


def _check_key(key: yaml.Node, name: str) -> None:
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise UsageError(f"{name}: the key in line {line} is a list or a mapping, expected a name")
    if key.tag not in (TEXT, MERGE):
        read_as = NO_TEXT.get(key.tag.rpartition(":")[2], "no text")
        shown = f"key {key.value}" if key.value else "empty key"
        raise UsageError(
            f'{name}: the {shown} in line {line} is read as {read_as}, expected a name; as a name it needs quotes: "{key.value}"'
        )


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Its keys and what they name; what is merged in may be given again."""
    return ((key, value) for key, value in node.value if key.tag != MERGE)


def _values(node: yaml.MappingNode, prefix: str, above: list[yaml.Node]) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every value in a mapping and the mappings in it."""
    for key, value in _pairs(node):
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value not in above:
            yield from _values(value, f"{name}.", [*above, node])
        else:
            yield name, key.start_mark.line + 1
