"""Typed sections from nested plain data. Knows nothing of the sections in config_keys.py.

A section is a dataclass. The annotation of a field is a type, a choice or a union of these, with constraints
beside it:

    epochs: PositiveInt
    init: Literal["adaln_zero", "released"]
    num_samples: Annotated[int, at_least(4)]
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------- errors


class UserError(ValueError):
    """A mistake that the user can mend. The message is a line naming the option, the value and the remedy."""


class OneProcessError(UserError):
    """A UserError that only one of several processes has, so that this process must print it itself."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Kind and text of an error as one line of at most `limit` characters, to be quoted in a UserError."""
    return printable(f"{type(error).__name__}: {error}", limit)


def printable(text: str, limit: int = 160) -> str:
    """Foreign text as one line: terminal escapes are removed, and whatever cannot be printed becomes a space."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text)
    characters = [character if character.isprintable() else " " for character in text]
    return " ".join("".join(characters).split())[:limit]


def shown(value: Any) -> str:
    """A value as a YAML file has it: null, true, [c2, [D12], c2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        pairs = [f"{shown(name)}: {shown(content)}" for name, content in value.items()]
        return f"{{{', '.join(pairs)}}}"
    is_plain = not isinstance(value, str) or re.fullmatch(r"[\w./+-]+", value)
    return str(value) if is_plain else repr(value)


def require(condition: object, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


# ------------------------------------------------------------------------------------------------ constraints


class Constraint(NamedTuple):
    """What a value must be besides its type; the text completes "must be ..."."""

    text: str
    holds: Callable[[Any], bool]
    remedy: str = ""  # ends the error line


def above(bound: float) -> Constraint:
    return Constraint(f"greater than {bound}", lambda value: value > bound)


def at_least(bound: float) -> Constraint:
    return Constraint(f"at least {bound}", lambda value: value >= bound)


def of_length(count: int) -> Constraint:
    noun = "entry" if count == 1 else "entries"
    return Constraint(f"{count} {noun} long", lambda values: len(values) == count)


PositiveInt = Annotated[int, above(0)]
PositiveFloat = Annotated[float, above(0)]
NonNegativeInt = Annotated[int, at_least(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, Constraint("in [0, 1)", lambda value: 0 <= value < 1)]


# ----------------------------------------------------------------------------------------------------- fields


# A rule that brings other spellings of a value, as a file has it, to one form: (value, key) -> value
Rewrite = Callable[[Any, str], Any]


def field_with(default: T, rewrite: Rewrite | None = None, **metadata: Any) -> T:
    """A field of a section. Every section gets its own copy of a default that is a list or a mapping.

    Args:
        rewrite: is applied before the type is checked.
    """
    metadata["rewrite"] = rewrite
    field: Any = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field


class Leaf(NamedTuple):
    """A key that holds a value, not a section."""

    name: str  # training.epochs
    hint: Any  # its annotation
    field: dataclasses.Field


def leaves(section: type, prefix: str = "") -> Iterator[Leaf]:
    """All keys of a section and of the sections in it, in the order of the source."""
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{name}.")
        else:
            yield Leaf(name, hint, field)


# -------------------------------------------------------------------------------------- plain data -> section


class WrongType(Exception):
    """A value is not of a type."""


def build(section: type[T], raw: Any, prefix: str = "", refused: dict[str, UserError] | None = None) -> T:
    """A section from plain data. Keys that are missing have their defaults.

    Args:
        prefix: where the section stands, such as "model.hnet.".
        refused: gets the errors of keys with a wrong value, by name. These have their defaults, too. Without it
            the first such error is raised.

    Raises:
        UserError: unknown key, wrong type, or a constraint that does not hold.
    """
    raw = as_mapping(raw, f"section '{prefix.rstrip('.')}'")
    hints = typing.get_type_hints(section, include_extras=True)
    rules = {
        field.name: field.metadata.get("rewrite") for field in dataclasses.fields(typing.cast(Any, section))
    }
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in hints:
            raise UserError(f"unknown key '{prefix}{name}'; {_remedy(name, hints, section, prefix)}")
        key = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            values[name] = build(typing.cast(type, hints[name]), value, f"{key}.", refused)
            continue
        rewrite = rules[name]
        try:
            if rewrite is not None:
                value = rewrite(value, key)
            values[name] = _convert(value, hints[name], key)
        except UserError as error:
            if refused is None:
                raise
            refused[key] = error
    try:
        return section(**values)
    except TypeError:  # a key without a default is missing
        raise WrongType from None


def build_complete(section: type[T], raw: dict[str, Any], prefix: str) -> T:
    """A section from plain data, whose keys without a default must be given. Raises UserError as `build`."""
    for field in dataclasses.fields(typing.cast(Any, section)):
        has_default = field.default is not dataclasses.MISSING
        require(field.name in raw or has_default, f"{prefix}{field.name}: is missing; give it")
    return build(section, raw, prefix)


def known_part(section: type, raw: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """Plain data without the keys that neither a section nor those in it have, and the names of these keys."""
    if not isinstance(raw, dict):
        return raw, []
    hints = typing.get_type_hints(section, include_extras=True)
    known = {}
    unknown = []
    for name, value in raw.items():
        if name not in hints:
            unknown.append(f"{prefix}{name}")
            continue
        if dataclasses.is_dataclass(hints[name]):
            value, below = known_part(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
            unknown += below
        known[name] = value
    return known, unknown


def as_mapping(raw: Any, where: str) -> dict:
    """A mapping as it is, and nothing as an empty one. UserError for anything else."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{where} must hold 'key: value' lines, not {type(raw).__name__} {raw!r}")
    return raw


def _remedy(name: Any, known: dict, section: type, prefix: str) -> str:
    """The key that is probably meant: of this name in a section below, or of a similar name here."""
    below = [leaf.name for leaf in leaves(section, prefix) if leaf.name.endswith(f".{name}")]
    other_names: dict[str, str] = getattr(section, "OTHER_NAMES", {})
    if name in other_names:
        return f"did you mean '{prefix}{other_names[name]}'?"
    similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    meant = below or [prefix + key for key in similar]
    return f"did you mean '{meant[0]}'?" if meant else f"known keys: {', '.join(known)}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotated type, or a UserError naming the key, with what may be meant instead."""
    try:
        return _convert_to_any(value, hint, key)
    except WrongType:
        pass
    remedy = ""
    if value is None and is_text(hint):
        remedy = "; a name needs quotes: 'null'"
    for reading in _readings(value):
        if _fits(reading, hint, key):
            remedy = f"; try {shown(reading)}"
            break
    typed = repr(value) if isinstance(value, str) else shown(value)
    raise UserError(f"{key}: {typed} is not {describe(hint)}{remedy}")


def _fits(value: Any, hint: Any, key: str) -> bool:
    try:
        _convert_to_any(value, hint, key)
    except (WrongType, UserError):
        return False
    return True


# Texts that mean true or false elsewhere
TRUE = ("true", "yes", "y", "on", "1")
FALSE = ("false", "no", "n", "off", "0")


def _readings(value: Any) -> Iterator[Any]:
    """What a value of the wrong type may mean: 'yes' true, '1e5' 100000, '0.2,0.4' a list, 4 one or two entries."""
    if isinstance(value, (list, dict)) or value is None:
        return
    word = str(value).strip().lower()
    yield word
    if word == "none":
        yield None
        return
    if word in TRUE + FALSE:
        yield word in TRUE
    yield _number(word)
    if "," in word:
        parts = str(value).strip("[]() ").split(",")
        yield [_number(part.strip()) for part in parts]
    yield [value]
    yield [value, value]


def _number(text: str) -> Any:
    """The number that a text spells, a whole one if it can be; otherwise the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _convert_to_any(value: Any, hint: Any, key: str) -> Any:
    """The value as one of the types of a union, or as the type itself. WrongType if it is none of them."""
    for option in options(hint):
        with contextlib.suppress(WrongType):
            return _convert_to_one(value, option, key)
    raise WrongType


def _convert_to_one(value: Any, hint: Any, key: str) -> Any:
    """The value as a type that is no union. WrongType lets the next type of a union try."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    # A type with constraints, or one of several words
    if origin is Annotated:
        converted = _convert_to_one(value, arguments[0], key)
        for constraint in arguments[1:]:
            message = f"{key}: {converted!r} must be {constraint.text}{constraint.remedy}"
            require(constraint.holds(converted), message)
        return converted
    if origin is Literal and (type(value), value) in [(type(choice), choice) for choice in arguments]:
        return value
    # Lists, mappings and sections
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{key}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, f"{key}.")
    # Single values
    if hint is float:
        return _finite_number(value)
    if hint is type(None) and value is None:
        return None
    if hint in (str, int, bool, list) and type(value) is hint:
        return value
    raise WrongType


def options(hint: Any) -> tuple:
    """The types of a union; a tuple of the type itself otherwise."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def is_text(hint: Any) -> bool:
    """Whether a value of this type is a text or one of several words, if it is not null."""
    return all(option in (str, type(None)) or _is_word(option) for option in options(hint))


def _is_word(hint: Any) -> bool:
    """Whether this is one of several words."""
    choices = typing.get_args(hint)
    return typing.get_origin(hint) is Literal and all(isinstance(choice, str) for choice in choices)


def _finite_number(value: Any) -> float:
    """A finite float, also from text that spells one: YAML 1.1 reads 1e-4 (without a dot) as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise WrongType
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise WrongType from None
    if not math.isfinite(number):
        raise WrongType
    return number


# A type in an error line, alone and as the entries of a list.
NAMES = {
    float: ("a finite number", "finite numbers"),
    int: ("a whole number", "whole numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    list: ("a list", "lists"),
    type(None): ("null", "null"),
}


def describe(hint: Any, plural: bool = False) -> str:
    """A type with its constraints, for people: "a whole number (greater than 0) or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(options(hint)) > 1:
        return " or ".join(describe(option, plural) for option in arguments)
    if origin is Annotated:
        constraints = ", ".join(constraint.text for constraint in arguments[1:])
        return f"{describe(arguments[0], plural)} ({constraints})"
    if origin is Literal:
        choices = [str(choice).lower() if choice is False else choice for choice in arguments]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        return f"a list of {describe(arguments[0], plural=True)}"
    if origin is dict:
        return f"'name: value' pairs with {describe(arguments[1], plural=True)}"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(typing.get_type_hints(hint))}}}"
    return NAMES[hint][plural]
