"""YAML files of settings, read without surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from stem_fast.common import DataError

MAX_TEXT = 1 << 22  # characters and values of a file, its aliases written out


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises DataError if it cannot be read, is damaged or no
    mapping, or names a key twice."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise DataError(f"{path}: is longer than a configuration file's {MAX_TEXT} characters.")
        content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise DataError(f"no configuration file {path}.") from None
    except OSError as error:
        raise DataError(f"configuration file {path} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise DataError(f"{path} is not valid YAML: it is nested too deeply.") from error
    except DataError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, no such date
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        got = str(content)
        got = f"{got[:60]!r} ..." if len(got) > 60 else repr(got)
        raise DataError(f"{path}: expected `key: value` lines, got {got}.")
    return content


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice (YAML would drop the first), and
    aliases of aliases that a few lines make a content of gigabytes with."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Values and characters of a node with its aliases written out."""
        if id(node) not in sizes:
            sizes[id(node)] = MAX_TEXT + 1  # for an alias of what it is itself in
            if isinstance(node, yaml.ScalarNode):
                size = len(node.value)
            elif isinstance(node, yaml.MappingNode):
                size = sum(self._measure(each, sizes) for pair in node.value for each in pair)
            else:
                size = sum(self._measure(each, sizes) for each in node.value)
            if size > MAX_TEXT:
                raise yaml.constructor.ConstructorError(
                    None, None, "with its aliases written out it is too long", node.start_mark
                )
            sizes[id(node)] = 1 + size
        return sizes[id(node)]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text, not a list or mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
