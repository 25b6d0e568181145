"""Conditioning and positions: timestep, class, further conditions by name, and fixed 2-D sin-cos positions.

`CONDITIONS` names the kinds of further conditions.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config_keys import form_of_kind
from grid import Grid
from schema import one_line

FREQUENCIES = 128  # sinusoidal features per timestep: 128 cosines and 128 sines
SCALAR_RANGE = 1000  # timesteps that a scalar from 0 to 1 is spread over


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, D): sinusoidal features through a two-layer MLP (DiT, section 3.2).

    Frequency k of 128 is 10000^(-k / divisor); the divisor is 127 in the DiT of diffusers.
    """

    def __init__(self, width: int, divisor: int = FREQUENCIES):
        super().__init__()
        self.divisor = divisor
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        exponent = k / self.divisor
        frequency = torch.exp(-math.log(10000) * exponent)
        angle = t.float()[:, None] * frequency  # (B, 128)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features)


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D). With `has_null`, label `num_classes` stands for no condition."""

    def __init__(self, num_classes: int, width: int, has_null: bool):
        super().__init__()
        self.table = nn.Embedding(num_classes + has_null, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels)


def forms_of_value(shape: tuple[int, ...]) -> str:
    """What samples can be given for a condition of this shape, for messages."""
    if not shape:
        return "a number, or a .npy file with a number per sample"
    sides = ", ".join(str(side) for side in shape)
    return f"a .npy file of shape {shape}, or (n, {sides}) with a row per sample"


class Condition(nn.Module):
    """One condition beside the class: values (B, *shape) -> (B, D). A value of NaN stands for no condition.

    Args:
        width: D.
        sizes: the numbers in the name of the kind, such as 768 in vector-768.
    """

    # Of the value of one image; the numbers in the name of the kind follow it
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, width: int, *sizes: int):
        super().__init__()

    @classmethod
    def read(cls, text: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """What `--condition NAME=text` gives to samples: a value of this shape, or (n, *shape), a row per sample.

        Here text is the name of a .npy file or, where the shape is (), a number.

        Raises:
            ValueError: it is neither. A kind that opens other files may raise OSError.
        """
        if not shape:
            with contextlib.suppress(ValueError):
                return float(text)
        try:
            return np.lib.format.open_memmap(text, mode="r")
        except Exception as error:  # NumPy and mmap raise many kinds on strange headers
            raise ValueError(f"cannot be read ({one_line(error)}); give {forms_of_value(shape)}") from None

    def start(self) -> None:
        """Initialise what should not start as linear layers do everywhere in the network."""

    def forward(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class ScalarCondition(Condition):
    """Scalars (B,), of about 0 to 1 -> (B, D), by features and an MLP like the timestep's."""

    def __init__(self, width: int):
        super().__init__(width)
        self.embedder = TimestepEmbedder(width)
        self.null = nn.Parameter(torch.zeros(width))

    def start(self) -> None:
        for name in ("mlp.0.weight", "mlp.2.weight"):
            nn.init.normal_(self.embedder.get_parameter(name), std=0.02)
        nn.init.normal_(self.null, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        embedded = self.embedder(SCALAR_RANGE * values.float().nan_to_num())
        return torch.where(values.isnan()[:, None], self.null, embedded)


class VectorCondition(Condition):
    """Vectors (B, N), whose numbers have a deviation of about 1 -> (B, D), by an MLP."""

    def __init__(self, width: int, size: int):
        super().__init__(width)
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.zeros(width))

    def start(self) -> None:
        nn.init.normal_(self.null, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        is_null = values.isnan().any(1, keepdim=True)
        embedded = self.mlp(values.float().nan_to_num())
        return torch.where(is_null, self.null, embedded)


# The kinds that `data.conditions` can have; N stands for a number
CONDITIONS: dict[str, type[Condition]] = {"scalar": ScalarCondition, "vector-N": VectorCondition}


class ConditionKind(NamedTuple):
    """What a name such as "scalar" or "vector-768" stands for."""

    condition: type[Condition]
    sizes: tuple[int, ...]  # the numbers in the name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value of one image."""
        return (*self.condition.shape, *self.sizes)


def find_kind(name: str) -> ConditionKind:
    """The kind of this name, which the configuration has checked."""
    if name in CONDITIONS:
        return ConditionKind(CONDITIONS[name], ())
    sizes = tuple(int(digits) for digits in re.findall(r"-(\d+)", name))
    return ConditionKind(CONDITIONS[form_of_kind(name)], sizes)


class Conditioner(nn.Module):
    """Adds the further conditions to the sum of the timestep's and the class's embedding.

    Args:
        kinds: name -> a name of `CONDITIONS`, with numbers in place of N.
        width: D.
    """

    def __init__(self, kinds: Mapping[str, str], width: int):
        super().__init__()
        self.kinds = {name: find_kind(kind) for name, kind in kinds.items()}
        for name, kind in self.kinds.items():
            self.add_module(f"{name}_embedder", kind.condition(width, *kind.sizes))

    def condition(self, name: str) -> Condition:
        """The condition of a name."""
        condition = self.get_submodule(f"{name}_embedder")
        assert isinstance(condition, Condition)
        return condition

    def start(self) -> None:
        """Initialise every condition."""
        for name in self.kinds:
            self.condition(name).start()

    def forward(self, c: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Add the embedding of each value (B, ...) to c (B, D). A value that is not given is no condition."""
        values = values or {}
        for name, kind in self.kinds.items():
            value = values.get(name)
            if value is None:
                value = torch.full((len(c), *kind.shape), math.nan, device=c.device)
            c = c + self.condition(name)(value)
        return c


def sincos_positions(width: int, grid: Grid, spacing: float = 1.0, offset: float = 0.0) -> Tensor:
    """Fixed 2-D positions (cells, width): sin and cos of the column, then of the row.

    Row and column i lie at (i + offset) * spacing, which upcycling uses to resample a coarser grid.
    """
    # One axis: a sine and a cosine per frequency
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = (torch.arange(max(grid), dtype=torch.float64) + offset) * spacing
    angle = place[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (longer side, width / 2)

    # Both axes at every cell, in raster order
    column = axis[None, : grid.columns].expand(*grid, -1)
    row = axis[: grid.rows, None].expand(*grid, -1)
    positions = torch.cat([column, row], dim=-1)  # (rows, columns, width)
    return positions.flatten(0, 1).float()
