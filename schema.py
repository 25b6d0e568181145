"""Typed dataclasses <-> nested plain data <-> YAML: what knows nothing of the sections in config.py."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path

import yaml


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line naming the option, the value and the remedy."""


class OneProcessError(UserError):
    """A UserError that only one process of several has, so that this process must print it itself."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Kind and text of an error as one line of at most `limit` characters, to be quoted in a UserError."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML itself would silently let win."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"key '{key}' is given twice (line {node.start_mark.line + 1}); remove one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, seen: tuple[Path, ...]) -> dict:
    path = path.resolve()
    if path in seen:
        raise UserError(
            f"_base_: '{path}' inherits from itself through {' -> '.join(p.name for p in seen)}; break the cycle"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise UserError(
            f"--config '{path}' cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except UserError as error:
        raise UserError(f"--config '{path}': {error}") from None
    except Exception as error:  # PyYAML's constructors raise nearly any kind on strange tags
        raise UserError(f"--config '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    raw = _mapping(raw, f"--config '{path}'")
    base = raw.pop("_base_", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"_base_: {base!r} in '{path}' is not a path; give one file name")
    return merge(read_yaml(path.parent / base, (*seen, path)), raw)


def _mapping(raw, where: str) -> dict:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{where} must hold 'key: value' lines, not {type(raw).__name__} {raw!r}")
    return raw


def merge(base: dict, change: dict) -> dict:
    """`change` over `base`: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(override: str) -> dict:
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


def find_field(section: type, name: str) -> dataclasses.Field:
    """The field that a key such as `hnet.d_model` or `training.lr_scales.decoder` names or lies in.

    Raises:
        KeyError: the section has no such field.
    """
    first, _, rest = name.partition(".")
    found = {field.name: field for field in dataclasses.fields(section)}[first]
    subsection = found.default_factory
    if rest and dataclasses.is_dataclass(subsection):
        return find_field(typing.cast(type, subsection), rest)
    return found


def build(cls, raw, where: str):
    raw = _mapping(raw, f"section '{where.rstrip('.')}'")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            remedy = f"did you mean '{where}{near[0]}'?" if near else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown key '{where}{key}'; {remedy}")
    return cls(**{key: _coerce(value, hints[key], where + key) for key, value in raw.items()})


def _coerce(value, hint, key: str):
    """`value` as the annotated type, or a UserError naming the key."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key + ".")
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        try:
            return _coerce_one(value, option, key)
        except TypeError:
            continue
    raise UserError(f"{key}: {value!r} is not {_describe(hint)}")


def _coerce_one(value, hint, key: str):
    if typing.get_origin(hint) is list and isinstance(value, list):
        return [_coerce(item, typing.get_args(hint)[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, key + ".")
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {
            str(name): _coerce(item, typing.get_args(hint)[1], f"{key}.{name}")
            for name, item in value.items()
        }
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value)
    if hint is type(None) and value is None or hint in (str, int, bool, list) and type(value) is hint:
        return value
    raise TypeError


def _number(value) -> float:
    """A finite float; YAML 1.1 reads 1e-4 (without a dot) as text, so text that spells a number counts as one."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise TypeError from None
    if number != number or number in (float("inf"), float("-inf")):
        raise TypeError
    return number


def _describe(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(typing.get_type_hints(hint))}}}"
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return f"'name: value' pairs with {_describe(typing.get_args(hint)[1])}"
    names = {
        float: "a finite number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        list: "a list",
    }
    return "null" if hint is type(None) else names[hint]


def flatten(nested: dict, where: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, with lists as text: the form that experiment trackers take."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{where}{key}."))
        else:
            flat[where + key] = str(value) if isinstance(value, list) else value
    return flat
