"""What is measured: a model whose weights leave no term at zero, a batch, and a fixed keep mask."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from config import Config, load_config
from models import build_model, reference
from models.dc_dit import DCDiT
from models.dit import DiT
from models.flops import TokenCounts
from models.ops.precision import allow_tf32
from models.tail_drop import drop_tail, force_ends, keep_top
from models.types import DenoiserOutput, Routing
from sampling.half_weights import with_half_weights

CONFIGS = Path(__file__).parent.parent / "configs"


class Case(NamedTuple):
    """A configuration of `configs/` at a batch size."""

    model: str
    batch: int
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.model, f"batch {self.batch}", *self.overrides])

    def config(self) -> Config:
        """The configuration."""
        return load(self.model, *self.overrides)

    @property
    def columns(self) -> dict[str, str | int]:
        """The columns of a table that name the case."""
        return {"model": ", ".join([self.model, *self.overrides]), "batch": self.batch}


@dataclass(frozen=True)
class Setup:
    """Where, in which precision and for how long to measure."""

    device: torch.device
    bf16: bool  # bfloat16 autocast
    seconds: float  # measured time per row of a table, without warm-up
    tf32: bool = False  # whether products in float32 may run as TF32


@dataclass
class Workload:
    """A model and a batch."""

    config: Config
    model: DCDiT | DiT
    x: Tensor  # (B, C, S, S) latents
    t: Tensor  # (B,)
    labels: Tensor  # (B,)
    noise: Tensor  # (B, C, S, S)
    prob: Tensor  # (B, L): the boundary probability that the router's output is replaced by
    bf16: bool

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of a forward pass."""
        return self.x, self.t, self.labels

    @property
    def dc_dit(self) -> DCDiT:
        """The model, which must be a DC-DiT."""
        return cast(DCDiT, self.model)

    @property
    def sampled_model(self) -> nn.Module:
        """The model as sampling evaluates it."""
        has_copies = self.bf16 and self.prob.is_cuda
        return with_half_weights(self.model, torch.bfloat16) if has_copies else self.model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the network."""
        return torch.autocast(self.prob.device.type, torch.bfloat16, enabled=self.bf16)

    @contextlib.contextmanager
    def masked(self, prob: Tensor) -> Iterator[None]:
        """Within a `with` block, keep the tokens with a probability above one half in `prob`."""
        before = self.prob
        self.prob = prob
        try:
            yield
        finally:
            self.prob = before

    def textbook_forward(self, x: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        """What the model computes, in the textbook version, on the same weights and the same mask."""
        return reference.forward(self.dc_dit, x, t, labels, replace_routing=self.replace_probability)

    def replace_probability(self, routing: Routing) -> Routing:
        """The router's output with fixed values and its own gradient: every implementation gets one mask."""
        zero = routing.prob - routing.prob.detach()
        prob = self.prob + zero
        boundary = prob > 0.5
        return Routing(prob, boundary, boundary)

    def fix_routing(self, router: nn.Module, inputs: tuple, routing: Routing) -> Routing:
        """A hook of the router: the same, then the budget that the router was given."""
        _, drop, tokens, _ = inputs
        fixed = self.replace_probability(routing)
        if drop is not None:
            return fixed._replace(keep=drop_tail(fixed.prob, fixed.boundary, drop))
        return fixed if tokens is None else fixed._replace(keep=keep_top(fixed.prob, tokens))


def load(name: str, *overrides: str) -> Config:
    """A configuration of `configs/` by its name."""
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def downsampling(config: Config) -> float:
    """N of the configuration: about one token in N is kept."""
    return config.training.downsample_factor


def build_workload(config: Config, batch: int, setup: Setup) -> Workload:
    """A model on the device with a random batch, of whose tokens about one in N is kept.

    TF32 is switched for the whole process, and so for the textbook version too: on if the setup or the
    configuration asks for it.
    """
    allow_tf32(setup.tf32 or config.allows_tf32(setup.bf16))

    # On the device, because filling the weights of a large model on the host takes longer than measuring it
    device = setup.device
    torch.manual_seed(0)
    with device:
        model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)

    # The batch
    shape = (batch, *config.latent_shape)
    x = torch.randn(shape, device=device)
    noise = torch.randn(shape, device=device)
    t = torch.randint(config.diffusion.diffusion_steps, (batch,), device=device)
    labels = torch.randint(config.data.num_classes, (batch,), device=device)

    # The mask
    prob = fixed_probabilities(batch, config.latent_grid.cells, 1 / downsampling(config), device)
    workload = Workload(config, model, x, t, labels, noise, prob, setup.bf16)
    if isinstance(model, DCDiT):
        model.router.register_forward_hook(workload.fix_routing)
    return workload


def fixed_probabilities(batch: int, length: int, share: float, device: torch.device) -> Tensor:
    """(B, L): above one half for about `share` of the tokens, at random places and in different numbers."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(batch, length, generator=generator) < share
    half = torch.rand(batch, length, generator=generator).clamp(0.002, 0.998) / 2
    return force_ends(torch.where(kept, half + 0.5, half)).to(device)


def varied_masks(workload: Workload) -> list[Tensor]:
    """Masks (B, L) that keep about one token in N, and never the same number of tokens T, as in training.

    On a GPU there are many: its allocator meets new shapes in every step. A CPU has no time for that.
    """
    batch, length = workload.prob.shape
    device = workload.prob.device
    number = 16 if device.type == "cuda" else 2
    masks = []
    for factor in torch.linspace(0.95, 1.05, number).tolist():
        masks.append(fixed_probabilities(batch, length, factor / downsampling(workload.config), device))
    return masks


def token_counts(prob: Tensor) -> TokenCounts:
    """Mean and mean square of the tokens per image that a mask (B, L) keeps."""
    counts = (prob > 0.5).sum(1).double()
    return TokenCounts(counts.mean().item(), counts.square().mean().item())
