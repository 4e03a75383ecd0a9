"""YAML files: read safely, with duplicate keys refused; written atomically, in the order given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.options import one_line

if TYPE_CHECKING:
    from yaml import MappingNode, Node

MERGE = "tag:yaml.org,2002:merge"  # the key "<<", which may be repeated
MOST_VALUES = 100_000  # with all aliases expanded: a few lines of aliases to aliases could fill the memory
MOST_LEVELS = 40
MOST_BITS = 4_000  # of a whole number; Python refuses to print larger ones
# What PyYAML's constructors raise for a scalar that does not fit its tag (!!bool perhaps, !!int "").
_MISFITS = (ValueError, TypeError, RecursionError, AttributeError, KeyError, IndexError, OverflowError)


def read_yaml(path: Path, what: str, notes: list[str] | None = None) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        what: what it describes, for error messages: "model", "data".
        notes: receives a line for each key that stands twice with equal values; without it, that is refused too.

    Raises:
        UserError: the file is missing, not YAML, not a mapping, has a key twice with different values, or its aliases make it
            huge or endless.
    """
    import yaml  # needed only for networks and data that a file describes

    class Loader(yaml.SafeLoader):
        """Notes or refuses keys that stand twice, of which YAML's own loader silently takes the last."""

        def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                seen: dict[Any, tuple[int, Any]] = {}
                for key_node, value_node in node.value:
                    if key_node.tag == MERGE:
                        continue
                    key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
                    if key in seen:
                        self.stands_twice(key, (*seen[key], line, value_node))
                    seen[key] = line, value_node
            return super().construct_mapping(node, deep)

        def stands_twice(self, key: Any, places: tuple[int, Any, int, Any]) -> None:
            """Note a key that stands twice with equal values; refuse one with different ones."""
            line, value, again, other = places
            where = f"the key {repr(str(key))[:60]} stands twice, in lines {line} and {again}"
            if notes is None:
                raise UserError(f"{path}: {where}")
            if self.construct_object(value, deep=True) != self.construct_object(other, deep=True):
                raise UserError(f"{path}: {where}, with different values")
            notes.append(f"{where}, with equal values")

        def construct_yaml_int(self, node: Any) -> int:
            value = super().construct_yaml_int(node)
            if value.bit_length() > MOST_BITS:
                raise ValueError(f"a number of {value.bit_length()} bits (line {node.start_mark.line + 1})")
            return int(value)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    content: Any = None
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if isinstance(node, yaml.SequenceNode):
                content = []
            elif node is not None:
                _check_size(node)
                content = loader.construct_document(node)
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise UserError(f"no {what} file {path}") from None
    except UserError:
        raise
    except (yaml.YAMLError, *_MISFITS) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(str(error))[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, not {'nothing' if content is None else type(content).__name__}")
    return content


def _check_size(root: Node) -> None:
    """Raise ValueError unless a document is finite and of a sensible size with all aliases expanded."""
    measured: dict[int, tuple[int, int]] = {}
    above: set[int] = set()

    def measure(node: Any) -> tuple[int, int]:
        """Return the numbers of values and levels."""
        if isinstance(node.value, str):
            return 1, 1
        if id(node) in above:
            raise ValueError(f"an alias refers to what it stands in (line {node.start_mark.line + 1})")
        if id(node) not in measured:
            above.add(id(node))
            parts = [measure(part) for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            above.remove(id(node))
            measured[id(node)] = 1 + sum(values for values, _ in parts), 1 + max((levels for _, levels in parts), default=0)
        return measured[id(node)]

    values, levels = measure(root)
    if values > MOST_VALUES:
        raise ValueError(f"{values:.3g} values with its aliases written out; at most {MOST_VALUES:,} are read")
    if levels > MOST_LEVELS:
        raise ValueError(f"{levels} levels deep; at most {MOST_LEVELS} are read")


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a YAML file atomically, in the order given."""
    import yaml

    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
