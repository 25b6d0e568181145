"""The loss: that of the diffusion, and terms beside it. `TERMS` names the kinds of terms.

A term is a function of what the network returned, the batch and the step. It may own weights, which are trained
with the network's and stay out of the EMA and of exported weights.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from config import Config, UserError, parse_layout
from data.features import Features
from grid import Grid
from models.packing import unpack
from models.types import DenoiserOutput, Routing
from schema import NonNegativeFloat, NonNegativeInt, PositiveInt, build_complete
from training import schedules
from training.batches import Batch


class Weighted(NamedTuple):
    """The value of a term in one micro-batch, and its weight in the loss."""

    weight: float
    value: Tensor  # () or per sample (B,)


def total_loss(parts: dict[str, Tensor], terms: Mapping[str, Weighted]) -> dict[str, Tensor]:
    """Combine the losses of a micro-batch (DC-DiT, training objective).

    Args:
        parts: of the diffusion loss, per sample (B,), from `diffusion.losses`.
        terms: beside it, by name.

    Returns:
        "loss": the scalar to train on. Then what it is made of: the parts and their sum "diffusion_loss" (B,), and
        each term as "NAME_loss".
    """
    diffusion_loss = functools.reduce(torch.add, parts.values())  # (B,)
    losses = {"loss": diffusion_loss.mean(), **parts, "diffusion_loss": diffusion_loss}
    for name, term in terms.items():
        mean = term.value.mean() if term.value.ndim else term.value
        losses["loss"] = losses["loss"] + term.weight * mean
        losses[f"{name}_loss"] = term.value
    return losses


# ------------------------------------------------------------------------------------------------- what a term is


@dataclass(kw_only=True)
class TermSettings:
    """What `training.terms` says of a term. Types and ranges are checked as those of configuration keys."""

    weight: NonNegativeFloat  # in the loss; 0 leaves the term out


class Term(nn.Module):
    """A term of the loss.

    Args:
        settings: those of the term.
        config: of the run.
        store: the features, whose opened columns are in every batch.

    Raises:
        UserError: a setting does not fit the network or the features; the text begins with its name, "block: ".
    """

    # A dataclass, whose fields are the settings. A field `column` names a column of the features to open
    settings_type: ClassVar[type[TermSettings]] = TermSettings
    # Indices of the transformer blocks whose tokens it reads in `output.hidden`
    blocks: tuple[int, ...] = ()

    def __init__(self, settings: Any, config: Config, store: Features):
        super().__init__()

    def forward(self, output: DenoiserOutput, batch: Batch, step: int) -> Tensor:
        """The value of the term, () or per sample (B,).

        Args:
            output: what the network returned.
            batch: on its device, without `images`.
            step: optimizer steps done.
        """
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------- ratio


class RatioTerm(Term):
    """The ratio loss, which is set by keys of its own: `training.ratio_loss_weight` and those beside it."""

    def __init__(self, settings: Any, config: Config, store: Features):
        super().__init__(settings, config, store)
        self.training_keys = config.training

    def forward(self, output: DenoiserOutput, batch: Batch, step: int) -> Tensor:
        keys = self.training_keys
        if keys.downsample_factor_points is None:
            factor = schedules.downsample_factor(step, keys)
            return ratio_loss(output.routing, factor, keys.ratio_batch_size)
        factors = schedules.downsample_factors(step, batch.t, keys)
        return ratio_loss_by_timestep(output.routing, factors, batch.t, keys.ratio_batch_size)


def ratio_loss(routing: Routing, downsample_factor: float, group_size: int | None = None) -> Tensor:
    """Push the kept share towards 1 in `downsample_factor` (H-Net, arXiv 2507.07955, equation 10).

    Args:
        routing: of a batch of B samples; the decision before tail dropping counts.
        downsample_factor: N > 1.
        group_size: samples over which the shares are averaged before the loss; divides B. None: all of them.

    Returns:
        Scalar: N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G)), F the kept share and G the mean probability of a
        group, averaged over groups. It is 1 when both are 1 / N, and can be below 1 elsewhere.
    """
    n = downsample_factor
    groups = 1 if group_size is None else len(routing.prob) // group_size
    # F and G of each group (groups,)
    kept = routing.boundary.float().view(groups, -1).mean(1)
    prob = routing.prob.float().view(groups, -1).mean(1)
    return ratio_of_groups(n, kept, prob)


def ratio_loss_by_timestep(
    routing: Routing, downsample_factors: Tensor, t: Tensor, group_size: int | None = None
) -> Tensor:
    """The ratio loss with a target that depends on the timestep.

    The samples of a process are sorted by timestep and cut into groups of neighbours. Each group has the ratio loss
    whose 1 / N is the mean of its samples' 1 / N(t). Images of similar noise thus share a target, and may still
    differ from each other. With one group per batch, only the mean over all timesteps has a target.

    Args:
        routing: as in `ratio_loss`.
        downsample_factors: N(t) > 1 of each sample (B,).
        t: (B,).
        group_size: samples of a group; divides B. None: all of them.
    """
    order = t.argsort(stable=True)
    size = len(order) if group_size is None else group_size
    # Target, F and G of each group (groups,)
    n = 1 / downsample_factors[order].reciprocal().view(-1, size).mean(1)
    kept = routing.boundary.float().mean(1)[order].view(-1, size).mean(1)
    prob = routing.prob.float().mean(1)[order].view(-1, size).mean(1)
    return ratio_of_groups(n, kept, prob)


def ratio_of_groups(n: Tensor | float, kept: Tensor, prob: Tensor) -> Tensor:
    """N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G)), averaged over groups: F and G (groups,) -> scalar."""
    balance = (n - 1) * kept * prob + (1 - kept) * (1 - prob)
    return (n / (n - 1) * balance).mean()


# ------------------------------------------------------------------------------------------------- alignment


@dataclass(kw_only=True)
class AlignSettings(TermSettings):
    """Settings of `AlignTerm`."""

    block: NonNegativeInt  # index of the transformer block whose tokens are aligned; 0: the first
    column: str  # of an encoder's tokens, (tokens, width) or (rows, columns, width) per image
    hidden: PositiveInt = 2048  # width of the projection's hidden layers


class AlignTerm(Term):
    """Representation alignment (REPA, arXiv 2410.06940): tokens of a block resemble those of a pretrained encoder.

    The value is minus the cosine similarity of the projected tokens and the encoder's, averaged over the kept
    tokens of each sample. The encoder's grid is resampled to the network's cells, of which the kept ones are taken.
    """

    settings_type = AlignSettings

    def __init__(self, settings: AlignSettings, config: Config, store: Features):
        super().__init__(settings, config, store)
        blocks = len(parse_layout(config.model.hnet.arch_layout).main_blocks)
        if settings.block >= blocks:
            raise UserError(f"block: {settings.block} is no block of the network; use 0 to {blocks - 1}")
        self.blocks = (settings.block,)
        self.column = settings.column
        self.cells = config.token_grid
        self.grid = encoder_grid(settings.column, store.columns[settings.column], self.cells)
        self.projection = nn.Sequential(
            nn.Linear(config.d_model, settings.hidden),
            nn.SiLU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.SiLU(),
            nn.Linear(settings.hidden, self.grid[2]),
        )

    def forward(self, output: DenoiserOutput, batch: Batch, step: int) -> Tensor:
        packing = output.packing
        (block,) = self.blocks
        projected = self.projection(output.hidden[block])  # (T, W)

        # The encoder's tokens at the cells of the kept ones
        tokens = batch.columns[self.column].float().view(-1, *self.grid)  # (B, rows, columns, W)
        encoded = F.interpolate(
            tokens.permute(0, 3, 1, 2), tuple(self.cells), mode="bilinear", antialias=True
        )
        cells = encoded.flatten(2).transpose(1, 2).flatten(0, 1)  # (B L, W)
        target = cells.index_select(0, packing.token_index)  # (T, W)

        # The mean over the kept tokens of each sample
        distance = self.distance(projected.float(), target)
        per_cell = unpack(distance[:, None], packing, self.cells.cells)  # (B, L, 1)
        return per_cell.sum((1, 2)) / packing.cu_seqlens.diff()

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """What is minimised for each token (T,): here minus the cosine of projected and target (T, W)."""
        return -F.cosine_similarity(projected, target, dim=1)


def encoder_grid(name: str, shape: tuple[int, ...], cells: Grid) -> tuple[int, int, int]:
    """Rows, columns and width of an encoder's tokens. Raises UserError for a column that holds none.

    Args:
        name: of the column.
        shape: of one image in it.
        cells: of the network, whose sides have the ratio of the image's.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        tokens, width = shape
        rows = round(math.sqrt(tokens * cells.rows / cells.columns))
        columns = tokens // max(rows, 1)
        if rows * columns == tokens and rows * cells.columns == columns * cells.rows:
            return rows, columns, width
    raise UserError(
        f"column: {name} holds {shape} per image, not the tokens of a grid over the image; "
        "give (tokens, width) without a class token, or (rows, columns, width)"
    )


# ------------------------------------------------------------------------------------------------- all terms

# The kinds of terms. "ratio" has keys of its own; the others are the names of `training.terms`
TERMS: dict[str, type[Term]] = {"ratio": RatioTerm, "align": AlignTerm}


class Terms:
    """The terms of a run that have a weight.

    Attributes:
        modules: the terms by name; their weights are those to train and to save.
        blocks: indices of the transformer blocks whose tokens they read.

    Raises:
        UserError: a setting is missing, unknown or of another type, or does not fit the run.
    """

    def __init__(self, config: Config, store: Features):
        self.modules = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        blocks: set[int] = set()
        for name, raw in config.active_terms.items():
            kind = TERMS[name]
            settings = build_complete(kind.settings_type, raw, f"training.terms.{name}.")
            try:
                term = kind(settings, config, store)
            except UserError as error:
                raise UserError(f"training.terms.{name}.{error}") from None
            self.modules[name] = term
            self.weights[name] = settings.weight
            blocks |= set(term.blocks)
        self.blocks = tuple(sorted(blocks))
        # What is called: the terms themselves, or what Accelerate makes of them
        self.prepared: dict[str, nn.Module] = dict(self.modules.items())
        # Those of them that own weights
        self.owners: list[nn.Module] = []

    def prepare(self, accelerator: Accelerator) -> None:
        """Give terms that own weights Accelerate's precision, and gradients of all processes."""
        for name, term in self.modules.items():
            if list(term.parameters()):
                self.prepared[name] = accelerator.prepare(term)
                self.owners.append(self.prepared[name])

    def __call__(self, output: DenoiserOutput, batch: Batch, step: int) -> dict[str, Weighted]:
        """The value of each term in a micro-batch; see `Term.forward`."""
        values = {}
        for name, term in self.prepared.items():
            values[name] = Weighted(self.weights[name], term(output, batch, step))
        return values
