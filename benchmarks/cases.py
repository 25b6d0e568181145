"""What is measured: a configuration's model with weights that leave no term at zero, inputs, and a fixed keep mask."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Config, downsample_factors, load_config
from models import build_model, reference
from models.dc_dit import DCDiT
from models.ops.precision import allow_tf32
from models.router import force_ends
from models.types import Routing

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class Case:
    """A model and a batch."""

    config: Config
    model: nn.Module
    inputs: tuple[Tensor, Tensor, Tensor]  # x_t (B, C, S, S), t (B,), labels (B,)
    noise: Tensor  # (B, C, S, S)
    prob: Tensor  # (B, L): what the router is made to say; exchange it for another mask
    bf16: bool

    @property
    def sigma(self) -> float:
        return self.config.model.hnet.dechunk_kernel_sigma

    def autocast(self):
        return (
            torch.autocast(self.prob.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        )

    def kept(self) -> tuple[float, float]:
        """Mean and mean square of the kept tokens per image."""
        counts = (self.prob > 0.5).sum(1).double()
        return counts.mean().item(), counts.square().mean().item()


def make_case(
    config: Config, batch: int, device: torch.device, bf16: bool, share: float | None = None
) -> Case:
    """A model on the device with a batch; `share` of the tokens is kept (None: 1 / N of the configuration).

    TF32 is on or off for the whole process, the textbook version included, as the configuration has it in training: off.
    """
    allow_tf32(config.model.hnet.fp32_router_dechunk == "tf32")
    torch.manual_seed(0)
    with device:  # filling the weights of a large model on the host takes longer than measuring it
        model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    shape = (batch, config.data.latent_channels, config.latent_size, config.latent_size)
    x, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    t = torch.randint(config.diffusion.diffusion_steps, (batch,), device=device)
    labels = torch.randint(config.data.num_classes, (batch,), device=device)
    share = share or 1 / downsample_factors(config.training.downsample_factor)
    prob = fixed_probabilities(batch, config.latent_size**2, share, device)
    case = Case(config, model, (x, t, labels), noise, prob, bf16)
    if isinstance(model, DCDiT):
        model.router.register_forward_hook(lambda module, inputs, routing: pin(routing, case.prob))
    return case


def fixed_probabilities(batch: int, length: int, share: float, device: torch.device) -> Tensor:
    """(B, L): above one half for about `share` of the tokens, at random places; samples differ in their counts."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(batch, length, generator=generator) < share
    half = torch.rand(batch, length, generator=generator).clamp(0.002, 0.998) / 2
    return force_ends(torch.where(kept, half + 0.5, half)).to(device)


def pin(routing: Routing, prob: Tensor) -> Routing:
    """The router's result with other values, and with the same gradient: every variant gets the same mask."""
    prob = prob + (routing.prob - routing.prob.detach())
    natural = prob > 0.5
    return Routing(prob, natural, natural)


def plain_forward(case: Case, x: Tensor, t: Tensor, labels: Tensor):
    """The textbook model with the case's mask."""
    return reference.forward(
        case.model, case.sigma, x, t, labels, replace_routing=lambda routing: pin(routing, case.prob)
    )


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)
