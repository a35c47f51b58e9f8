"""YAML as people write it: 1e-4 is a number; a key given twice, and a value inside itself, are mistakes."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from cepo.errors import InputError


def load(text: str) -> Any:
    """What `text` says. Raises InputError or yaml.YAMLError, RecursionError where it nests too deep."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    def construct_document(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)  # which refuses a node inside itself, and the usual way does not

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        merge = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"line {node.start_mark.line + 1}: expected each key once, got {key!r} twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
