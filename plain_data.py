"""Nested plain data, as a YAML file or a checkpoint holds it: read, merged, flattened and compared."""

from pathlib import Path
from typing import Any

import yaml

from schema import UserError, as_mapping


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"key '{name}' is given twice (line {node.start_mark.line + 1}); remove one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, merged over the file that its `_base_` names.

    Args:
        children: the files that inherit from this one, from which it must not inherit itself.
    """
    path = path.resolve()
    if path in children:
        chain = " -> ".join(child.name for child in children)
        raise UserError(f"_base_: '{path}' inherits from itself through {chain}; break the cycle")
    raw = as_mapping(_load_yaml(path), f"--config '{path}'")
    base = raw.pop("_base_", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"_base_: {base!r} in '{path}' is not a path; give one file name")
    return merge(read_yaml(path.parent / base, (*children, path)), raw)


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        message = f"cannot be read ({error.strerror}); give the path of a YAML file"
        raise UserError(f"--config '{path}' {message}") from None
    except UserError as error:
        raise UserError(f"--config '{path}': {error}") from None
    except Exception as error:  # PyYAML's constructors raise nearly any kind on strange tags
        reason = " ".join(str(error).split())
        raise UserError(f"--config '{path}' is not valid YAML: {reason}") from None


def parse_override(override: str) -> dict:
    """ "section.key=value" as nested plain data."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set '{override}' must have the form section.key=value")
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except Exception:  # as in a file
        raise UserError(f"--set '{override}': '{text}' is not a valid YAML value") from None
    for part in reversed(name.strip().split(".")):
        value = {part: value}
    return value


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
