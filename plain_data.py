"""Nested plain data, as a YAML file or a checkpoint holds it: read, merged, flattened and compared."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from schema import UserError, as_mapping

# Keys, as `section.key`, that hold a text, each with whether it may also be null
TextKeys = Mapping[str, bool]
NO_KEYS: TextKeys = MappingProxyType({})

# YAML's names of two types
TEXT, NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"key '{name}' is given twice (line {node.start_mark.line + 1}); remove one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, text_keys: TextKeys = NO_KEYS, children: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, merged over the file that its `_base_` names.

    Args:
        text_keys: in these, 2024 and on are the texts "2024" and "on".
        children: the files that inherit from this one, from which it must not inherit itself.
    """
    path = path.resolve()
    if path in children:
        chain = " -> ".join(child.name for child in children)
        raise UserError(f"_base_: '{path}' inherits from itself through {chain}; break the cycle")
    raw = as_mapping(_load_yaml(path, {**text_keys, "_base_": True}), f"--config '{path}'")
    base = raw.pop("_base_", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"_base_: {base!r} in '{path}' is not a path; give one file name")
    return merge(read_yaml(path.parent / base, text_keys, (*children, path)), raw)


def _load_yaml(path: Path, text_keys: TextKeys) -> Any:
    try:
        return _parse(path.read_text(encoding="utf-8"), text_keys)
    except OSError as error:
        with_ending = path.with_name(f"{path.name}.yaml")
        remedy = f"did you mean '{with_ending}'?" if with_ending.is_file() else "give the path of a YAML file"
        raise UserError(f"--config '{path}' cannot be read ({error.strerror}); {remedy}") from None
    except UserError as error:
        raise UserError(f"--config '{path}': {error}") from None
    except Exception as error:  # PyYAML's constructors raise nearly any kind on strange tags
        reason = " ".join(str(error).split())
        remedy = "; a text with ': ' or ' #' needs quotes" if "mapping values" in reason else ""
        raise UserError(f"--config '{path}' is not valid YAML: {reason}{remedy}") from None


def _parse(text: str, text_keys: TextKeys, path: str = "") -> Any:
    """YAML as plain data, where the keys that hold a text get it as it is written.

    Args:
        path: the key that the YAML is the value of; empty for a whole file.
    """
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_with_texts(node, text_keys, path))
    finally:
        loader.dispose()


def _with_texts(node: yaml.Node, text_keys: TextKeys, path: str) -> yaml.Node:
    """The node of a key, with the values of text keys in it as texts."""
    if path in text_keys and isinstance(node, yaml.ScalarNode) and node.tag != NULL:
        return yaml.ScalarNode(TEXT, node.value)
    prefix = f"{path}." if path else ""
    is_section = any(key.startswith(prefix) for key in text_keys)
    if isinstance(node, yaml.MappingNode) and is_section:
        node.value = [
            (name, _with_texts(value, text_keys, f"{prefix}{name.value}")) for name, value in node.value
        ]
    return node


def parse_override(override: str, text_keys: TextKeys) -> dict:
    """ "section.key=value" as nested plain data. The value of a text key is what stands there, the rest is YAML."""
    name, equals, text = override.partition("=")
    key = name.strip()
    if not equals or not key:
        raise UserError(f"--set '{override}' must have the form section.key=value")
    try:
        value = _parse(text, text_keys, key)
    except Exception:  # as in a file
        if key not in text_keys:
            raise UserError(f"--set '{override}': '{text}' is not a valid YAML value") from None
        value = text
    typed = text.strip()
    if key in text_keys and not _is_quoted(typed):
        # YAML reads null, and takes ' #1' for a comment
        is_null = value is None and (text_keys[key] or not typed)
        value = None if is_null else typed
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def merge(base: dict, change: dict) -> dict:
    """`change` over `base`: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(nested: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, with lists as text: the form that experiment trackers take."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat


def differences(first: dict, second: dict, prefix: str = "") -> list[str]:
    """Keys, as `section.key`, in which two configurations in plain data differ."""
    keys = []
    for key in sorted(first.keys() | second.keys()):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            keys += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            keys.append(prefix + key)
    return keys
