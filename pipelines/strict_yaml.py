"""YAML in which nothing changes silently: the core schema of YAML 1.2, as DVC reads and writes it, and no key twice.

PyYAML's own loader reads YAML 1.1, in which ``1e-3`` is a text, ``010`` is 8, ``1:30`` is 90 and ``no`` is false, and takes
the last of two keys that are the same. Here ``1e-3`` is a number, the others are what they look like, and a key that comes
twice is refused.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from runtime.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"
_TAGS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
_DIGITS = 100
"""Of a whole number, at most: Python itself refuses to read thousands of them."""


class _Loader(yaml.SafeLoader):
    """The core schema alone. Its tables are its own, so that none of PyYAML's further types is known."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML has it)
    yaml_constructors = {}  # noqa: RUF012

    def scalar(self, node: Any) -> Any:
        """A value of one of ``_TAGS``. Raises ConstructorError, with the place, if it is not what its tag says."""
        kind, text = node.tag.rpartition(":")[2], self.construct_scalar(node)
        if not _TAGS[kind].fullmatch(text) or (kind == "int" and len(text) > _DIGITS):
            raise ConstructorError(None, None, f"{text[:_DIGITS]!r} is no {kind} that can be used", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # Python has inf and nan without the dot

    def mapping(self, node: Any) -> dict[Any, Any]:
        """A mapping with all that is merged into it."""
        return self.construct_mapping(node, deep=True)

    def sequence(self, node: Any) -> list[Any]:
        """A list."""
        return self.construct_sequence(node, deep=True)

    def text(self, node: Any) -> str:
        """A text."""
        return self.construct_scalar(node)

    def refuse_keys_given_twice(self, root: Node) -> None:
        """Raises ConstructorError, with the place, for a mapping below ``root`` that has a key twice."""
        seen, pending = set[int](), [root]
        while pending:
            node = pending.pop()
            if id(node) in seen or not isinstance(node, MappingNode | SequenceNode):
                continue
            seen.add(id(node))
            if isinstance(node, SequenceNode):
                pending += node.value
                continue
            lines: dict[Any, int] = {}
            for key, value in node.value:
                pending.append(value)
                if isinstance(key, ScalarNode):
                    named = (_MERGE, "") if key.tag == _MERGE else self.construct_object(key)
                    if named in lines:
                        said = f"the key {key.value!r} was given in line {lines[named]} already; leave one of the two out"
                        raise ConstructorError(None, None, said, key.start_mark)
                    lines[named] = key.start_mark.line + 1


for _kind, _pattern in _TAGS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)
    _Loader.yaml_constructors[f"tag:yaml.org,2002:{_kind}"] = _Loader.scalar
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])
_Loader.yaml_constructors |= {
    "tag:yaml.org,2002:map": _Loader.mapping,
    "tag:yaml.org,2002:seq": _Loader.sequence,
    "tag:yaml.org,2002:str": _Loader.text,
    None: _Loader.construct_undefined,
}


def read(path: Path) -> Any:
    """The values in a YAML file: mappings, lists, texts, numbers, truth values and nulls.

    Raises:
        UserError: it cannot be read, is no UTF-8 or no YAML, or holds a key twice; the line is named. So is what an
            experiment of DVC's would lose (:func:`_shared`), where one is running.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run priorhole in the folder that holds it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        loader.refuse_keys_given_twice(node)
        if "DVC_EXP_NAME" in os.environ:
            for shared in _shared(node):
                raise UserError(
                    f"{path}: {shared}, so 'dvc exp run --set-param' can lose a change; use aliases behind << alone"
                )
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{path}{line} is not valid YAML: {' '.join(str(error.problem).split())}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid YAML for priorhole: it is nested too deeply, or in itself") from error


def shared_mappings(path: Path) -> list[str]:
    """What a change by DVC (``dvc exp run --set-param``) can lose, one text each; none where all changes are kept.

    DVC changes the nodes of a file and writes it anew. A mapping that stands in two places by its alias, or in what two
    places merge, is one node: the change of one place is undone, or made, by the other. Scalars and lists are safe.
    """
    node = _Loader(path.read_text(encoding="utf-8")).get_single_node()
    return [] if node is None else list(_shared(node))


def _shared(root: Node) -> Iterator[str]:
    """The mappings below ``root`` that stand in two places."""
    seen: dict[int, str] = {}
    pending = [(root, "")]
    while pending:
        node, path = pending.pop()
        if not isinstance(node, MappingNode):
            continue
        if id(node) in seen:
            yield f"{path} and {seen[id(node)] or 'the whole'} are one and the same (line {node.start_mark.line + 1})"
            continue
        seen[id(node)] = path
        found = _with_merged(node, frozenset())
        pending += [(value, f"{path}.{key}" if path else key) for key, value in reversed(found.items())]


def _with_merged(node: MappingNode, inside: frozenset[int]) -> dict[str, Node]:
    """A mapping's values by key, with those that it merges; ``inside`` are the mappings that are being merged into."""
    found: dict[str, Node] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            sources = value.value if isinstance(value, SequenceNode) else [value]
            for source in reversed(sources):
                if isinstance(source, MappingNode) and id(source) not in inside:
                    found |= _with_merged(source, inside | {id(node)})
    return found | {str(key.value): value for key, value in node.value if key.tag != _MERGE}
