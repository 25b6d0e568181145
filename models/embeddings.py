"""Conditioning and positions: timestep, class label with the null label, and fixed 2-D sin-cos positions."""

import math

import torch
from torch import Tensor, nn

from grid import Grid

FREQUENCIES = 128  # sinusoidal features per timestep: 128 cosines and 128 sines


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
