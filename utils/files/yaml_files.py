"""YAML files: read without running anything, duplicate keys refused; written atomically in the order given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.options import one_line

if TYPE_CHECKING:
    from yaml import MappingNode, Node

MERGE = "tag:yaml.org,2002:merge"  # the key "<<", which is no key of its own
MOST_VALUES = 100_000  # with every alias written out: a few lines of aliases to aliases would otherwise fill the memory
MOST_LEVELS = 40
MOST_BITS = 4_000  # of a whole number: beyond, Python refuses to print it
# What PyYAML's constructors raise for a scalar under a tag that it does not fit (!!bool perhaps, !!int "").
_MISFITS = (ValueError, TypeError, RecursionError, AttributeError, KeyError, IndexError, OverflowError)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        what: what it describes, for the errors: "model", "data".

    Raises:
        UserError: the file is absent, no YAML, no mapping, has a key twice, or its aliases make it huge or endless.
    """
    import yaml  # only networks and data that are described by a file need it

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in a mapping; YAML's own loader silently takes the last."""

        def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE)
                if twice := [key for key, count in keys.items() if count > 1]:
                    raise UserError(f"{path}: the key {repr(str(twice[0]))[:60]} stands twice (line {node.start_mark.line + 1} and below)")
            return super().construct_mapping(node, deep)

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
    """Check that a document is finite and of a sensible size with every alias written out.

    Raises:
        ValueError: it is not.
    """
    measured: dict[int, tuple[int, int]] = {}
    above: set[int] = set()

    def measure(node: Any) -> tuple[int, int]:
        """Return the number of values and of levels."""
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
