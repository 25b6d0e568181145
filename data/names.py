"""Names of classes and files as text that is safe to show.

A name may hold line breaks, mark-up, and bytes that are not UTF-8, which Python keeps as lone surrogates. No
terminal, font or encoder takes all of them.
"""

import re

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
