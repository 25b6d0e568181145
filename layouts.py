"""The layout of the blocks, [encoder, [main network], decoder]: read, spelled, and mended after a mistake."""

import itertools
import re
from typing import Any, NamedTuple

from schema import UserError, shown

KEY = "model.hnet.arch_layout"
# Where nothing tells how many blocks are meant
DEFAULT = {"c": 2, "D": 12}
MOST_BLOCKS = 999


class Layout(NamedTuple):
    """Numbers of convolution blocks, and a letter per transformer block: D with MLP, d attention only."""

    encoder_blocks: int
    main_blocks: str
    decoder_blocks: int


def parse_layout(layout: list) -> Layout:
    """Read [encoder, [main network], decoder] such as ["c2", ["D12"], "c2"]. C means c, as in the official code.

    Raises:
        UserError: another nesting, another letter, or no blocks; the message ends with the nearest layout.
    """
    mistake = _mistake(layout)
    if mistake:
        nearest = shown(nearest_layout(layout))
        # Without an encoder and a decoder, it is a static DiT that is wanted
        hint = ", with model.patch_size 1 for a DiT without chunking" if len(layout) == 1 else ""
        raise UserError(f"{KEY}: {shown(layout)} {mistake}; try {nearest}{hint}")
    encoder, (main,), decoder = layout
    return Layout(_count(encoder), _expand(main), _count(decoder))


def only_lists(value: Any, key: str) -> Any:
    """A list as it is. UserError for anything else, such as the text c2,D12,c2."""
    if isinstance(value, list):
        return value
    raise UserError(
        f"{key}: {shown(value)} must be [encoder, [main network], decoder]; "
        f"try {shown(nearest_layout(str(value).split(',')))}"
    )


def spell_layout(layout: Layout) -> list:
    """The shortest spelling that `parse_layout` reads as this layout."""
    runs = [f"{letter}{len(list(run))}" for letter, run in itertools.groupby(layout.main_blocks)]
    return [f"c{layout.encoder_blocks}", ["".join(runs)], f"c{layout.decoder_blocks}"]


def main_network_only(layout: list) -> list:
    """The layout of a static DiT, which has no encoder and decoder: what stands in their place is not checked."""
    if len(layout) == 1 and isinstance(layout[0], str):
        layout = ["c2", layout, "c2"]
    if len(layout) != 3:
        return layout
    return [_nearest_convolutions(layout[0]), layout[1], _nearest_convolutions(layout[2])]


# -------------------------------------------------------------------------------------------------- a string


def _expand(text: str) -> str:
    """ "D2d1" -> "DDd"."""
    return "".join(letter * int(count) for letter, count in re.findall(r"([a-zA-Z])(\d+)", text))


def _count(text: str) -> int:
    """ "c1c2" -> 3."""
    return sum(int(count) for count in re.findall(r"\d+", text))


def _mistake_in_string(text: Any, place: str, letters: str, elsewhere: str) -> str:
    """Why a string of blocks cannot stand in this place; empty if it can."""
    if not isinstance(text, str):
        return f"has {shown(text)} {place}, which is not text such as {letters[0]}2"
    others = re.findall(rf"[{'cC' if 'd' in letters else 'dD'}]\d+", text)
    if others:
        return f"has {others[0]} {place}; {elsewhere}"
    unknown = re.sub(rf"[{letters}]\d+", " ", text).strip()
    known = "".join(re.findall(rf"[{letters}]\d+", text))
    if unknown or " " in text:
        reading = f", which the official code reads as {known}" if known else ""
        return f"has '{text}' {place}{reading}; only {letters[0]}<number> and {letters[1]}<number> are blocks"
    blocks = _count(known)
    if blocks == 0:
        return f"has no blocks {place} ('{text}')"
    return f"has {blocks} blocks {place}, more than {MOST_BLOCKS}" if blocks > MOST_BLOCKS else ""


# ------------------------------------------------------------------------------------------------- a mistake


def _mistake(layout: list) -> str:
    """Why a layout cannot be read; empty if it can."""
    if len(layout) == 1 and isinstance(layout[0], str):
        return "is the DiT without chunking of the official code, which has a stem and a last norm of its own"
    if len(layout) != 3 or not isinstance(layout[1], list):
        return "must be [encoder, [main network], decoder]"
    encoder, main, decoder = layout
    if len(main) == 3:
        return "has more than one chunking stage, and only one is supported"
    if len(main) != 1:
        return f"has {shown(main)} for a main network, which must be one string such as [D12]"
    only_main = "transformer blocks stand in the main network only"
    only_scaffold = "convolutions stand in the encoder and the decoder only"
    return (
        _mistake_in_string(encoder, "in the encoder", "cC", only_main)
        or _mistake_in_string(main[0], "in the main network", "Dd", only_scaffold)
        or _mistake_in_string(decoder, "in the decoder", "cC", only_main)
    )


def nearest_layout(layout: list) -> list:
    """A layout that works, with as much of this one as can stand in it."""
    encoder, main, decoder = layout if len(layout) == 3 else (None, layout, None)
    # Of several stages, the outer encoder and decoder and the innermost main network
    if isinstance(main, list) and len(main) == 3:
        main = main[1]
    if isinstance(main, list) and len(main) == 3:
        main = main[1]
    # Several strings, which were meant as one
    if isinstance(main, list):
        main = "".join(str(part) for part in main if isinstance(part, (str, int)))
    return [_nearest_convolutions(encoder), [_nearest_transformer(main)], _nearest_convolutions(decoder)]


def _nearest_convolutions(text: Any) -> str:
    """The convolution blocks in a string, or as many as it has of something else."""
    blocks = _count("".join(re.findall(r"[cC]\d+", str(text)))) or _count(str(text))
    return f"c{_clip(blocks) if _has_number(text) else DEFAULT['c']}"


def _nearest_transformer(text: Any) -> str:
    """The transformer blocks in a string, or as many as it has of something else."""
    known = "".join(re.findall(r"[dD]\d+", str(text)))
    if 0 < _count(known) <= MOST_BLOCKS:
        return known
    return f"D{_clip(_count(str(text))) if _has_number(text) else DEFAULT['D']}"


def _has_number(text: Any) -> bool:
    return isinstance(text, (str, int)) and re.search(r"\d", str(text)) is not None


def _clip(blocks: int) -> int:
    return min(max(blocks, 1), MOST_BLOCKS)
