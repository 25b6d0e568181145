"""Configuration: YAML files and overrides become one checked `Config`. All keys stand in config_keys.py.

`load_config(path, overrides)` reads a YAML file (with `_base_` inheritance), applies `section.key=value`
overrides, checks every name, type and combination, and returns a `Config`. Every mistake is a UserError: one
line that names the key, the value and the remedy.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config_keys import (
    COLUMN_NAME,
    CONTROL_ROUTERS,
    TERMS,
    VARIANCE_OBJECTIVES,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FractionRange,
    HNetConfig,
    LoggingConfig,
    ModelConfig,
    Role,
    TrainingConfig,
    free,
)
from grid import Grid
from layouts import main_network_only, parse_layout, spell_layout
from plain_data import differences, flatten, merge, parse_override, read_yaml
from schema import (
    OneProcessError,
    UserError,
    build,
    is_text,
    leaves,
    one_line,
    options,
    printable,
    require,
)
from spellings import parse_schedule

# Passed on to the packages above.
__all__ = [
    "FractionRange",
    "OneProcessError",
    "TrainingConfig",
    "UserError",
    "differences",
    "flatten",
    "one_line",
    "parse_layout",
    "printable",
]


@dataclass
class Config:
    """All sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ckpt: str | None = free(None, "checkpoint to sample from when --ckpt is not given")

    @property
    def is_static(self) -> bool:
        """Whether the network is a static DiT, which has no router."""
        return self.model.patch_size is not None

    @property
    def process(self) -> dict[str, Any]:
        """What diffusion.build_process takes."""
        return {
            "objective": self.diffusion.objective,
            "prediction": self.diffusion.prediction,
            "noise_schedule": self.diffusion.noise_schedule,
            "diffusion_steps": self.diffusion.diffusion_steps,
            "learn_sigma": self.training.learn_sigma,
            "flow_shift": self.diffusion.flow_shift,
        }

    @property
    def has_learned_router(self) -> bool:
        """Whether training can change which tokens are kept."""
        return not self.is_static and self.model.router not in CONTROL_ROUTERS

    def allows_tf32(self, bf16: bool) -> bool:
        """Whether the network's products in float32 may run as TF32; `bf16`: whether its others are in bfloat16."""
        if self.model.hnet.fp32_router_dechunk == "tf32":
            return True
        return bf16 if self.training.tf32 == "auto" else self.training.tf32

    @property
    def columns(self) -> list[str]:
        """The columns of the features that training reads, beside the latents."""
        names = list(self.data.conditions)
        names += [str(settings["column"]) for settings in self.active_terms.values() if "column" in settings]
        return list(dict.fromkeys(names))

    @property
    def active_terms(self) -> dict[str, dict[str, Any]]:
        """The terms of the loss beside that of the diffusion that have a weight, with their settings."""
        ratio: dict[str, Any] = {"weight": self.training.ratio_loss_weight}
        terms = {"ratio": ratio, **self.training.terms}
        # A term without a weight is kept, so that its settings are found to be incomplete
        return {name: settings for name, settings in terms.items() if settings.get("weight") != 0}

    @property
    def latent_grid(self) -> Grid:
        """Rows and columns of the latent."""
        return self.data.image_grid.coarsen(self.data.latent_stride)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent."""
        return (self.data.latent_channels, *self.latent_grid)

    @property
    def token_grid(self) -> Grid:
        """Rows and columns of the tokens: those of the latent, or of the patches of a static DiT."""
        return self.latent_grid.coarsen(self.model.patch_size or 1)

    @property
    def tokens(self) -> int:
        """All tokens L of an image, kept or not."""
        return self.token_grid.cells

    @property
    def d_model(self) -> int:
        """Width D of the transformer blocks."""
        return self.model.hnet.d_model[-1]

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.d_model // self.model.hnet.num_heads[1]

    @property
    def encoder_width(self) -> int:
        """Width E of the convolutions: D over the reduction factor of the scaffold."""
        factors = self.model.hnet.enc_dec_dim_factor or [None, None]
        return self.d_model // (factors[0] or 1)


ROLES: dict[str, Role] = {leaf.name: leaf.field.metadata["role"] for leaf in leaves(Config)}
# Whether a key that holds a text may also be null
TEXT_KEYS = {leaf.name: type(None) in options(leaf.hint) for leaf in leaves(Config) if is_text(leaf.hint)}


def role_of(name: str) -> Role:
    """What a key, written `section.key`, shapes. A key below a list or a mapping has the role of the field.

    Raises:
        KeyError: there is no such key.
    """
    for key, role in ROLES.items():
        if name == key or name.startswith(f"{key}."):
            return role
    raise KeyError(name)


# ---------------------------------------------------------------------------------------- reading and writing


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (none: all defaults), apply `section.key=value` overrides, and check the result.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a combination that cannot work.
    """
    raw = read_yaml(Path(path), TEXT_KEYS) if path else {}
    return config_from_dict(raw, overrides)


def config_from_dict(raw: dict, overrides: Sequence[str] = ()) -> Config:
    """Build and check a Config from nested plain data (as in a checkpoint) with overrides."""
    for override in overrides:
        raw = merge(raw, parse_override(override, TEXT_KEYS))
    refused: dict[str, UserError] = {}
    config = build(Config, raw, refused=refused)
    if config.is_static:
        switch_router_off(config.training)
        leave_scaffold_out(config.model.hnet)
    elif not config.has_learned_router:
        config.training.ratio_loss_weight = 0.0
    if config.diffusion.objective not in VARIANCE_OBJECTIVES:
        config.training.learn_sigma = False
    # A key that another one switches off is not read, so its value has not to be right
    for key, error in refused.items():
        if is_read(config, key):
            raise error
    check_combinations(config)
    # Equal layouts get equal spellings
    config.model.hnet.arch_layout = spell_layout(parse_layout(config.model.hnet.arch_layout))
    return config


def switch_router_off(training: TrainingConfig) -> None:
    """A static DiT keeps every token: it has neither a ratio to train towards nor budgets."""
    training.ratio_loss_weight = 0.0
    training.multi_budget_training = False


def leave_scaffold_out(hnet: HNetConfig) -> None:
    """A static DiT has the main network only, so that no entry for the encoder or the decoder is checked."""
    hnet.arch_layout = main_network_only(hnet.arch_layout)
    hnet.d_model = [hnet.d_model[-1]] * 2


# What switches keys off. A name that ends in a dot stands for all keys of a section
UNREAD: list[tuple[Callable[[Config], bool], tuple[str, ...]]] = [
    (
        lambda config: not config.training.multi_budget_training,
        ("training.multi_budget_drop_fractions", "training.multi_budget_start_step"),
    ),
    (lambda config: not config.training.profile, ("training.profile_steps",)),
    (
        lambda config: not config.training.ratio_loss_weight,
        ("training.ratio_batch_size", "training.downsample_factor_points"),
    ),
    (lambda config: config.training.max_steps is not None, ("training.epochs",)),
    (lambda config: not config.training.frozen, ("training.frozen_steps",)),
    (lambda config: config.training.init_from is None, ("model.upcycle.",)),
    (lambda config: config.diffusion.objective == "gaussian", ("diffusion.flow_shift",)),
    (
        lambda config: config.diffusion.objective == "flow",
        ("diffusion.prediction", "diffusion.noise_schedule"),
    ),
    (
        lambda config: config.is_static,
        ("model.router", "model.min_tokens", "model.residual_projection"),
    ),
    (lambda config: config.is_static, ("model.hnet.enc_dec_dim_factor", "model.hnet.dechunk_kernel_sigma")),
    (lambda config: not config.logging.sample_every, ("logging.sample_cfg_scale",)),
    (
        lambda config: not {"wandb", "all"} & set(config.logging.trackers),
        ("logging.wandb_project",),
    ),
    (
        lambda config: not config.evaluation.every,
        tuple(
            leaf.name for leaf in leaves(EvaluationConfig, "evaluation.") if leaf.name != "evaluation.every"
        ),
    ),
]


def is_read(config: Config, key: str) -> bool:
    """Whether a key, written `section.key`, has an effect beside the values of the other keys."""
    return not any(is_off(config) and key.startswith(keys) for is_off, keys in UNREAD)


def to_dict(config: Config) -> dict:
    """The configuration as nested plain data; `config_from_dict` inverts it."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as the text of a YAML file."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# ------------------------------------------------------------------------ what must hold between several keys


def check_combinations(config: Config) -> None:
    """Check everything that needs neither files nor the number of processes. Raises UserError."""
    _check_sizes(config)
    _check_widths(config)
    _check_training(config.training)
    _check_diffusion(config.diffusion, config.data.latent_channels)
    _check_conditions(config)
    _check_ablations(config)
    evaluation = config.evaluation
    require(
        evaluation.reference or not evaluation.every,
        "evaluation.reference: is needed with evaluation.every; `evaluate.py --make-reference` writes one",
    )


def _check_sizes(config: Config) -> None:
    data, patch = config.data, config.model.patch_size
    # A whole number of cells, and of patches, along each side
    image, latent = data.image_grid, config.latent_grid
    sides = [_round_to(data.latent_stride * (patch or 1), side) for side in image]
    fitting = Grid.of([max(side, 2 * data.latent_stride) for side in sides])
    require(
        image.is_multiple_of(data.latent_stride) and min(latent) >= 2,
        f"data.image_size: {data.image_size} must be a multiple of data.latent_stride ({data.latent_stride}) "
        f"and hold at least 2 latent cells; try {fitting.plain}",
    )
    require(
        patch is None or latent.is_multiple_of(patch),
        f"model.patch_size: {patch} does not divide the latent's side of {latent.plain}; "
        f"try {_nearest_divisor(patch or 1, math.gcd(*latent))}, or null for a DC-DiT",
    )


def _check_widths(config: Config) -> None:
    hnet: HNetConfig = config.model.hnet
    parse_layout(hnet.arch_layout)
    width = config.d_model
    heads = hnet.num_heads[1]
    # The factor of the scaffold; one that leaves the encoder no width counts as the whole width
    factors = hnet.enc_dec_dim_factor or [1]
    factor = width if config.encoder_width == 0 else factors[0] or 1
    # What the width must be a multiple of
    if config.is_static:
        unit, part, multiple = 4, "positions", 4
    else:
        unit, part, multiple = 32, "GroupNorms", 32 * factor
    nearest = _round_to(math.lcm(multiple, heads), width)
    require(
        hnet.d_model == [width, width],
        f"model.hnet.d_model: {hnet.d_model} must be equal at both entries; try {[nearest, nearest]}",
    )
    require(
        width % unit == 0,
        f"model.hnet.d_model: {width} is not a multiple of {unit}, which the {part} need; "
        f"try {[nearest, nearest]}",
    )
    divisor = _nearest_divisor(heads, width)
    require(
        width % heads == 0,
        f"model.hnet.num_heads: {heads} does not divide d_model {width}; try {[divisor, divisor]}",
    )
    narrow = config.encoder_width
    require(
        config.is_static or (narrow > 0 and narrow % 32 == 0),
        f"model.hnet.enc_dec_dim_factor: {factor} makes the encoder {narrow} wide, which is not a multiple of 32 "
        f"as the GroupNorms need; try [{_nearest_divisor(factor, width // 32)}, null]",
    )


def _round_to(multiple: int, number: int) -> int:
    """The multiple that is nearest to a number; not 0."""
    return max(1, (number + multiple // 2) // multiple) * multiple


def _nearest_divisor(number: int, product: int) -> int:
    """The divisor of a product, up to 1024, that is nearest to a number."""
    divisors = [divisor for divisor in range(1, min(product, 1024) + 1) if product % divisor == 0]
    return min(divisors, key=lambda divisor: abs(divisor - number))


def _check_training(training: TrainingConfig) -> None:
    if training.multi_budget_training:
        _check_fractions(training.multi_budget_drop_fractions)
    require(
        not (training.init_from and training.resume_from_ckpt),
        "training.init_from: the run already starts from training.resume_from_ckpt; give one",
    )
    steps = training.profile_steps
    require(
        not training.profile or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
        f"training.profile_steps: {steps} must be [first, last] with 1 <= first <= last",
    )
    for name in training.terms:
        remedy = "its weight is training.ratio_loss_weight" if name == "ratio" else "see --import for another"
        require(name in TERMS, f"training.terms: '{name}' is not one of {', '.join(TERMS)}; {remedy}")
    # A factor of 1 keeps everything, towards which neither the ratio loss nor a balanced router can pull
    factors = {
        "downsample_factor": training.downsample_factor,
        "downsample_factor_start": training.downsample_factor_start,
    }
    for name, factor in factors.items():
        require(
            factor is None or factor > 1 or not (training.ratio_loss_weight or training.init_from),
            f"training.{name}: {factor} must be greater than 1, or training.ratio_loss_weight 0 "
            "and training.init_from null",
        )


def _check_fractions(fractions: list[float] | FractionRange) -> None:
    key = "training.multi_budget_drop_fractions"
    require(fractions, f"{key}: [] has no fraction to draw; give at least one; try [0.0, 0.3]")
    if isinstance(fractions, FractionRange):
        least, most = fractions.min, fractions.max
        require(
            least <= most,
            f"{key}: min {least} is above max {most}; exchange them; try {{min: {most}, max: {least}}}",
        )


def _check_diffusion(diffusion: DiffusionConfig, latent_channels: int) -> None:
    steps, guided = diffusion.diffusion_steps, diffusion.cfg_channels
    require(
        diffusion.noise_schedule != "linear" or steps > 20,
        f"diffusion.diffusion_steps: {steps} puts a beta of the linear schedule at 1 or above; try 21",
    )
    require(
        guided == "all" or guided <= latent_channels,
        f"diffusion.cfg_channels: {guided!r} must be 'all' or a number from 1 to {latent_channels}",
    )


def _check_conditions(config: Config) -> None:
    for name in config.data.conditions:
        require(
            re.fullmatch(COLUMN_NAME, name),
            f"data.conditions: {name!r} is no name of a column; use lower-case letters, digits and underscores",
        )
    require(
        not config.data.conditions or config.training.class_dropout_prob < 1,
        "data.conditions: are dropped with the class, so training.class_dropout_prob 1 would never show them; "
        "give one class, or try 0.1",
    )


def _check_ablations(config: Config) -> None:
    floor = config.model.min_tokens
    require(
        config.is_static or floor is None or floor <= config.tokens,
        f"model.min_tokens: {floor} is more than the {config.tokens} tokens of an image; try {config.tokens // 8}",
    )
    points = config.training.downsample_factor_points
    if points is None or not config.training.ratio_loss_weight:
        return
    key = f"training.downsample_factor_points: '{points}'"
    last = config.diffusion.diffusion_steps
    try:
        parsed = parse_schedule(points)
    except ValueError:
        raise UserError(f"{key} must be pairs t:N, e.g. 0:2,{last // 2}:4,{last}:8") from None
    timesteps = [t for t, _ in parsed]
    require(
        len(set(timesteps)) == len(timesteps) and max(timesteps) <= last,
        f"{key} must have timesteps from 0 to {last}, each once",
    )
    require(all(factor > 1 for _, factor in parsed), f"{key} must have factors greater than 1")


def validate_processes(config: Config, processes: int) -> int:
    """Check the batch sizes for this number of processes; return the local batch size."""
    batch, group = config.training.global_batch_size, config.training.ratio_batch_size
    multiple = -(-batch // processes) * processes
    require(
        batch % processes == 0,
        f"training.global_batch_size: {batch} is not a multiple of the {processes} processes; try {multiple}",
    )
    local = batch // processes
    if config.training.ratio_loss_weight > 0 and group and local % group:
        raise UserError(
            f"training.ratio_batch_size: {group} does not divide the local batch of {local} "
            f"({batch} over {processes} processes); try {largest_divisor(local, group)}"
        )
    _check_groups(config, local)
    return local


def _check_groups(config: Config, local: int) -> None:
    """One group of the ratio loss holds all timesteps, and only the mean of its targets counts."""
    training = config.training
    is_one_group = (training.ratio_batch_size or local) >= local
    if training.downsample_factor_points and training.ratio_loss_weight > 0 and is_one_group:
        raise UserError(
            "training.downsample_factor_points: needs groups of similar timesteps, and the local batch of "
            f"{local} is one group; set training.ratio_batch_size to {largest_divisor(local, max(1, local // 8))}"
        )


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)
