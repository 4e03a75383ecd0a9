"""YAML files: read without running anything, duplicate keys refused; written atomically in the order given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.checkpoint import write_text
from utils.errors import UserError

MERGE = "tag:yaml.org,2002:merge"  # the key "<<", which is no key of its own


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        what: what it describes, for the errors: "model", "data".

    Raises:
        UserError: the file is absent, no YAML, no mapping, or has a key twice.
    """
    import yaml  # only networks and data that are described by a file need it

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in a mapping; YAML's own loader silently takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
            if twice := [key for key in keys if isinstance(key, str | int) and keys.count(key) > 1]:
                raise UserError(f"{path}: the key '{twice[0]}' stands twice (line {node.start_mark.line + 1} and below)")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"no {what} file {path}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, not {'nothing' if content is None else type(content).__name__}")
    return content


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a YAML file atomically, in the order given."""
    import yaml

    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
