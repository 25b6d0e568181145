"""Names of classes and files: as text that is safe to show, and compared between two sources.

A name may hold line breaks, mark-up, and bytes that are not UTF-8, which Python keeps as lone surrogates. No
terminal, font or encoder takes all of them.
"""

import re
from collections.abc import Sequence

# Characters of a name that are shown at most
LONGEST = 40
# What Markdown, HTML and TeX read as mark-up within a line
MARKUP = re.compile(r"[\\`*_\[\]<>&|$~]")


def short_name(name: str, longest: int = LONGEST) -> str:
    """A name as one short line: what cannot be printed is escaped, and a long end is left out."""
    text = one_line_name(name)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def one_line_name(name: str) -> str:
    """A whole name as one line: what cannot be printed is escaped."""
    return "".join(char if char.isprintable() else escape(char) for char in name)


def escape(char: str) -> str:
    r"""A line break becomes \n, and the byte that a lone surrogate stands for \xe9."""
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return rf"\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def markdown(name: str) -> str:
    """A short name for Markdown or HTML: mark-up is escaped by backslashes."""
    return MARKUP.sub(r"\\\g<0>", short_name(name))


# ----------------------------------------------------------------------------------- names of two sources


def repeats_numbers(names: Sequence[str]) -> bool:
    """Whether the names are only the numbers again, as those of features without names are."""
    return list(names) == [str(number) for number in range(len(names))]


def have_names(names: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """Whether both sources know the names of their classes, so that labels can be compared by name."""
    if not names or not others:
        return False
    for one, other in ((names, others), (others, names)):
        if repeats_numbers(one) and not set(one) <= set(other):
            return False
    return True


def renamed_label(names: Sequence[str] | None, others: Sequence[str] | None) -> int | None:
    """The first label that stands for another class in the other source; None if there is none, or no names."""
    if names is None or others is None or not have_names(names, others):
        return None
    for label, (name, other) in enumerate(zip(names, others)):
        if name != other:
            return label
    return None
