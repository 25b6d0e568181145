"""`Grid`: rows and columns, of the cells of a latent, of its tokens, or of the pixels of an image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# As configurations, manifests and command lines have it: the side of a square, or [height, width]
Size = int | Sequence[int]


class Grid(NamedTuple):
    """Rows and columns."""

    rows: int
    columns: int

    @classmethod
    def of(cls, size: Size) -> "Grid":
        """The grid of a size."""
        if isinstance(size, int):
            return cls(size, size)
        rows, columns = size
        return cls(rows, columns)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.rows * self.columns

    @property
    def is_square(self) -> bool:
        """Whether there are as many rows as columns."""
        return self.rows == self.columns

    @property
    def plain(self) -> int | list[int]:
        """Plain data, which `of` inverts: one number for a square."""
        return self.rows if self.is_square else [self.rows, self.columns]

    def coarsen(self, factor: int) -> "Grid":
        """The grid of the blocks of factor x factor cells; the factor divides both sides."""
        return Grid(self.rows // factor, self.columns // factor)

    def is_multiple_of(self, factor: int) -> bool:
        """Whether the factor divides both sides."""
        return self.rows % factor == 0 and self.columns % factor == 0

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def is_size(value: Any) -> bool:
    """Whether plain data is a size: a whole number above 0, or a list of two."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side > 0 for side in sides)
