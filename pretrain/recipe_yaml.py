"""YAML as recipes and filter files mean it: safe, without the traps of YAML 1.1, and with every key once.

- `010` and `08` are the numbers ten and eight (1.1: octal), `1:30` and `2024-01-01` are text (1.1: 90, and a date).
- A key that is given twice in one mapping is refused with both lines; PyYAML keeps the last one and says nothing.
  What a merge key (`<<: *base`) brings may be replaced, which is what it is for.
- Aliases stand for a bounded number of values, and none for what holds it: nine lines can otherwise mean a billion.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pretrain.errors import RequestError

INTEGER, FLOAT, MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"
TIMESTAMP = "tag:yaml.org,2002:timestamp"
MOST_VALUES = 100_000
IN_OUR_WORDS = (  # what PyYAML says of YAML that users write now and then
    ("found unhashable key", "a list or a mapping is given as a key, but keys are names"),
    ("expected a mapping or list of mappings for merging", "<< brings the keys of a mapping, or of a list of mappings"),
    ("could not determine a constructor for the tag", "it has a tag (!...), but plain values are wanted"),
    ("but found another document", "a second document begins (---): keep one"),
    ("found character '\\t'", "a tab stands before a value: indent with spaces"),
)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises RequestError, which begins with `where`, for what weft reads nowhere.

    Raises ValueError, in one line, for what is not YAML.
    """
    try:
        loader = _Loader(text)
        loader.where = where
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_sentence(error, "\n" in text)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>",', "at").split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _sentence(error: yaml.MarkedYAMLError, lines: bool) -> str:
    """What PyYAML found, without its excerpt of the text; `lines`: whether there is more than one."""
    found = ", ".join(part for part in (error.context, error.problem) if part)
    said = next((ours for theirs, ours in IN_OUR_WORDS if theirs in found), found)
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}: {said}" if lines and mark else said


class _Loader(yaml.SafeLoader):
    where = ""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.flat: set[int] = set()  # mappings that were looked at

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and self._count(node, {}) > MOST_VALUES:
            raise RequestError(f"{self.where}: its aliases stand for more than {MOST_VALUES:,} values: write fewer")
        return node

    def _count(self, node: yaml.Node, counted: dict[int, int]) -> int:
        """Values of a node, those that aliases stand for too; `counted`: by node, 0 while one is being counted."""
        if id(node) not in counted:
            counted[id(node)] = 0
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
            counted[id(node)] = 1 + sum(self._count(part, counted) for part in parts)
        elif not counted[id(node)]:
            line = node.start_mark.line + 1
            raise RequestError(f"{self.where}: the value that begins in line {line} holds an alias of itself")
        return counted[id(node)]

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse repeated keys before merge keys are replaced by what they bring, which is done once a mapping."""
        if id(node) in self.flat:
            return
        self.flat.add(id(node))
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == MERGE else self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, (list, dict, set)):
                continue  # refused as a key when the mapping is made
            if key in lines:
                raise RequestError(f"{self.where}: {_twice(key, lines[key], line)}: keep one of them")
            lines[key] = line
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else super().construct_yaml_int(node)


def _twice(key: Any, first: int, second: int) -> str:
    if first == second:
        return f"{key!r} is given twice in line {first}" if first > 1 else f"{key!r} is given twice"
    return f"{key!r} is given twice (lines {first} and {second})"


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INTEGER, FLOAT, TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    INTEGER, re.compile(r"[-+]?(?:[0-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_constructor(INTEGER, _Loader.construct_yaml_int)
