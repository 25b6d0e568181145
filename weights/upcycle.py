"""The weights that a run starts from, out of another model: the same network, or a static DiT that becomes a DC-DiT.

Upcycling (DC-DiT, section on upcycling) keeps what a pretrained DiT knows. Blocks, timestep and label weights are copied, the
positions are resampled to single latent cells, and the scaffold around the blocks is new; `model.upcycle` says how it starts.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn

from config import Config, UserError, config_from_dict, differences, downsample_factors, parse_layout, to_dict
from models import build_model
from models.dc_dit import DCDiT
from models.dit import DiT
from models.embeddings import sincos_positions
from models.init import zero_layers
from weights.checkpoint import load_checkpoint

# What a DiT and the DC-DiT made of it have in common.
SHARED = ("model.hnet.d_model", "model.hnet.num_heads", "model.mlp_ratio", "model.timestep_divisor", "training.learn_sigma",
          "training.class_dropout_prob", "data.num_classes", "data.latent_channels", "data.image_size", "data.latent_stride",
          "diffusion.noise_schedule", "diffusion.diffusion_steps")  # fmt: skip

SILU_MEAN, SILU_STD = 0.2066, 0.5596  # of silu(x), x standard normal


def initial_state(config: Config) -> dict:
    """The state of a new run that starts from `training.init_from`: step 0, model, ema, and a report by tensor name.

    Raises:
        UserError: unreadable file, or a model that the configured one cannot be made of.
    """
    path = config.training.init_from
    loaded = load_checkpoint(path, "training.init_from")
    own = config_from_dict(loaded["config"])
    torch.manual_seed(config.training.seed)
    model, source = build_model(config), build_model(own)
    source.load_state_dict(loaded["ema"])
    if isinstance(source, DiT) and isinstance(model, DCDiT):
        check_shared(config, own)
        factor = config.training.downsample_factor_start or config.training.downsample_factor
        report = upcycle(
            source,
            model,
            config.model.upcycle.scaffold,
            config.model.upcycle.router,
            downsample_factors(factor),
        )
    else:
        report = take_over(source, model, path)
    state = model.state_dict()
    return {"step": 0, "model": state, "ema": state, "report": report}


def check_shared(config: Config, own: Config) -> None:
    """UserError unless the DiT's configuration `own` agrees with that of the DC-DiT where it must."""
    different = [key for key in differences(to_dict(config), to_dict(own)) if key.startswith(SHARED)]
    if len({parse_layout(c.model.hnet.arch_layout).main_blocks for c in (config, own)}) > 1:
        different.append("model.hnet.arch_layout")
    if different:
        raise UserError(
            f"training.init_from: '{config.training.init_from}' is a DiT with another {', '.join(different)}; make them equal"
        )


def take_over(source: nn.Module, model: nn.Module, path: str) -> dict[str, str]:
    """All weights of a network with the same tensors."""
    ours, theirs = model.state_dict(), source.state_dict()
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise UserError(
            f"training.init_from: '{path}' holds another network than the configuration describes; "
            "give a model with its shapes, or a static DiT of its width and blocks"
        )
    model.load_state_dict(theirs)
    return dict.fromkeys(ours, "copied")


@torch.no_grad()
def upcycle(
    source: DiT, model: DCDiT, scaffold: str, router: str, downsample_factor: float
) -> dict[str, str]:
    """Put a DiT's weights into a freshly built DC-DiT of the same width and blocks.

    Args:
        scaffold: "dit" or "fresh". router: "balanced" or "fresh". downsample_factor: N at the first step.

    Returns:
        "copied", "resampled: how" or "new: how" for each tensor of the DC-DiT.
    """
    ours, theirs = model.state_dict(), source.state_dict()
    report = dict.fromkeys(ours, "new")
    for name in ours:
        if name.startswith(("blocks.", "t_embedder.", "y_embedder.")):
            ours[name].copy_(theirs[name])
            report[name] = "copied"
    side = int(len(model.pos_embed) ** 0.5)
    from_the_cell_on = (
        scaffold == "dit" and source.patch <= 2
    )  # as `embed_in_3x3` lays the patch; else around the cell
    offset = 0.0 if from_the_cell_on else (1 - source.patch) / 2
    model.pos_embed.copy_(sincos_positions(model.pos_embed.shape[1], side, 1 / source.patch, offset))
    report["pos_embed"] = f"resampled: {source.patch} cells per step of the DiT's grid"
    if scaffold == "dit":
        report |= start_stem(source, model)
        report |= start_head(source, model)
    if router == "balanced":
        report |= balance_router(model, downsample_factor)
    return report


def start_stem(source: DiT, model: DCDiT) -> dict[str, str]:
    """The encoder's output at a cell becomes the DiT's embedding of the patch that starts there, but for its length.

    The convolution blocks start as the identity, and the last one widens by an exact factorisation. RMSNorm fixes the length
    of the embedding to the one that it has on white noise.
    """
    kernel = embed_in_3x3(source.x_embedder.weight)  # (D, C, 3, 3)
    report = pass_through(model.encoder, "encoder")
    narrow = model.x_embedder.out_channels
    if narrow == len(kernel):
        model.x_embedder.weight.copy_(kernel)
        model.x_embedder.bias.copy_(source.x_embedder.bias)
    else:
        u, s, v = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
        rank = min(narrow, len(s))
        zero_layers(model.x_embedder, widen := model.encoder.blocks[-1].skip_proj)
        model.x_embedder.weight[:rank].copy_((s[:rank, None].sqrt() * v[:rank]).view(rank, *kernel.shape[1:]))
        widen.weight[:, :rank, 0, 0].copy_(u[:, :rank] * s[:rank].sqrt())
        widen.bias.copy_(source.x_embedder.bias)
        last = len(model.encoder.blocks) - 1
        report |= {
            f"encoder.blocks.{last}.skip_proj.{x}": "resampled: widens the stem" for x in ("weight", "bias")
        }
    length = (kernel.square().sum((1, 2, 3)) + source.x_embedder.bias.square()).mean().sqrt()
    model.encoder.norm.weight.fill_(length)
    report["encoder.norm.weight"] = "new: length of the DiT's embedding of noise"
    return report | {f"x_embedder.{x}": "resampled: patch kernel in a 3 x 3 one" for x in ("weight", "bias")}


def embed_in_3x3(kernel: Tensor) -> Tensor:
    """A patch kernel (D, C, P, P) as a 3 x 3 one: patches of 2 from the centre on, larger ones shrunk to 3 cells."""
    size = kernel.shape[-1]
    if size > 2:
        return nn.functional.adaptive_avg_pool2d(kernel, 3) * (
            size * size / 9
        )  # about the same answer to a constant
    out = kernel.new_zeros(*kernel.shape[:2], 3, 3)
    out[:, :, 1 : 1 + size, 1 : 1 + size] = kernel
    return out


def start_head(source: DiT, model: DCDiT) -> dict[str, str]:
    """Where decoder and transformer are equally wide: the first output is the DiT's, averaged over each patch.

    A convolution cannot know its place in the patch; what differs within one is left to the residual path.
    """
    if model.final_layer.linear.in_features != len(source.x_embedder.weight):
        return {}
    report = pass_through(model.decoder, "decoder")
    cells = source.patch**2
    model.final_layer.linear.weight.copy_(source.final_layer.linear.weight.unflatten(0, (cells, -1)).mean(0))
    model.final_layer.linear.bias.copy_(source.final_layer.linear.bias.unflatten(0, (cells, -1)).mean(0))
    model.final_layer.adaLN_modulation.load_state_dict(source.final_layer.adaLN_modulation.state_dict())
    report |= {f"final_layer.adaLN_modulation.1.{x}": "copied" for x in ("weight", "bias")}
    return report | {f"final_layer.linear.{x}": "resampled: mean over the patch" for x in ("weight", "bias")}


def pass_through(stack: nn.Module, name: str) -> dict[str, str]:
    """Let the blocks of a convolution stack start as their skip connections."""
    zero_layers(*(block.conv2 for block in stack.blocks))
    return {
        f"{name}.blocks.{k}.conv2.{x}": "new: zero"
        for k in range(len(stack.blocks))
        for x in ("weight", "bias")
    }


def balance_router(model: DCDiT, downsample_factor: float) -> dict[str, str]:
    """Choose the last bias so that about 1 token in N scores above one half, on any input.

    Before the last layer is silu(GroupNorm(.)), about silu of standard normals, so the score's mean and deviation follow from
    the layer's weights.
    """
    layer = model.router.residual_scorer[-1]
    quantile = NormalDist().inv_cdf(1 - 1 / downsample_factor)
    layer.bias.fill_(-(SILU_MEAN * layer.weight.sum() + quantile * SILU_STD * layer.weight.norm()))
    return {"router.residual_scorer.3.bias": "new: keeps 1 in N at the start"}
