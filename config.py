"""Configuration: YAML files and overrides become one checked `Config`. All keys stand in config_keys.py.

`load_config(path, overrides)` reads a YAML file (with `_base_` inheritance), applies `section.key=value`
overrides, checks every name, type and combination, and returns a `Config`. Every mistake is a UserError: one
line that names the key, the value and the remedy.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from config_keys import (
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
from plain_data import differences, flatten, merge, parse_override, read_yaml
from schema import OneProcessError, UserError, build, leaves, one_line, printable, require

# Passed on to the packages above.
__all__ = [
    "FractionRange",
    "OneProcessError",
    "TrainingConfig",
    "UserError",
    "differences",
    "flatten",
    "one_line",
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

    def allows_tf32(self, bf16: bool) -> bool:
        """Whether the network's products in float32 may run as TF32; `bf16`: whether its others are in bfloat16."""
        if self.model.hnet.fp32_router_dechunk == "tf32":
            return True
        return bf16 if self.training.tf32 == "auto" else self.training.tf32

    @property
    def latent_size(self) -> int:
        """Side S of the square latent."""
        return self.data.image_size // self.data.latent_stride

    @property
    def token_side(self) -> int:
        """Tokens per side: S, or S / P for a static DiT."""
        return self.latent_size // (self.model.patch_size or 1)

    @property
    def tokens(self) -> int:
        """All tokens L of an image, kept or not."""
        return self.token_side**2

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
    raw = read_yaml(Path(path)) if path else {}
    return config_from_dict(raw, overrides)


def config_from_dict(raw: dict, overrides: Sequence[str] = ()) -> Config:
    """Build and check a Config from nested plain data (as in a checkpoint) with overrides."""
    for override in overrides:
        raw = merge(raw, parse_override(override))
    config = build(Config, raw)
    if config.is_static:
        switch_router_off(config.training)
    check_combinations(config)
    # Equal layouts get equal spellings
    config.model.hnet.arch_layout = spell_layout(parse_layout(config.model.hnet.arch_layout))
    return config


def switch_router_off(training: TrainingConfig) -> None:
    """A static DiT keeps every token: it has neither a ratio to train towards nor budgets."""
    training.ratio_loss_weight = 0.0
    training.multi_budget_training = False


def to_dict(config: Config) -> dict:
    """The configuration as nested plain data; `config_from_dict` inverts it."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as the text of a YAML file."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# ----------------------------------------------------------------------------------- the layout of the blocks


class Layout(NamedTuple):
    """Numbers of convolution blocks, and a letter per transformer block: D with MLP, d attention only."""

    encoder_blocks: int
    main_blocks: str
    decoder_blocks: int


def parse_layout(layout: list) -> Layout:
    """Read [encoder, [main network], decoder] such as ["c2", ["D12"], "c2"]. C means c, as in the official code.

    Raises:
        UserError: another nesting, another letter, or no blocks.
    """
    key = "model.hnet.arch_layout"
    if len(layout) == 1 and isinstance(layout[0], str):
        raise UserError(
            f"{key}: [{layout[0]}] is the DiT without chunking of the official code, which has a stem and a last "
            f"norm of its own; the nearest is [c2, [{layout[0]}], c2] with model.patch_size 1"
        )
    is_nested = len(layout) == 3 and isinstance(layout[1], list)
    require(is_nested, f"{key}: {layout!r} must be [encoder, [main], decoder], e.g. [c2, [D12], c2]")
    encoder, main, decoder = layout
    require(len(main) != 3, f"{key}: {layout!r} has more than one chunking stage, and only one is supported")
    require(len(main) == 1, f"{key}: the main network {main!r} must be one string, e.g. [D12]")
    return Layout(
        encoder_blocks=len(_expand(encoder, "cC")),
        main_blocks=_expand(main[0], "dD"),
        decoder_blocks=len(_expand(decoder, "cC")),
    )


def spell_layout(layout: Layout) -> list:
    """The shortest spelling that `parse_layout` reads as this layout."""
    runs = [f"{letter}{len(list(run))}" for letter, run in itertools.groupby(layout.main_blocks)]
    return [f"c{layout.encoder_blocks}", ["".join(runs)], f"c{layout.decoder_blocks}"]


# What a string of blocks must be, and where blocks of the other kind belong
BLOCKS = {
    "cC": "must be 'c<number>', e.g. 'c2'; transformer blocks stand in the main network only",
    "dD": "must be 'd<number>' or 'D<number>', e.g. 'D2'; convolutions stand in encoder and decoder only",
}


def _expand(text: Any, letters: str) -> str:
    """ "D2d1" -> "DDd"."""
    if not isinstance(text, str) or not re.fullmatch(rf"([{letters}][0-9]{{1,3}})+", text):
        message = f"model.hnet.arch_layout: {text!r} {BLOCKS[letters]}"
        # The official code skips what it does not know
        known = "".join(re.findall(rf"[{letters}]\d+", str(text)))
        raise UserError(f"{message}; the official code reads it as '{known}'" if known else message)
    counts = re.findall(r"([a-zA-Z])(\d+)", text)
    blocks = "".join(letter * int(count) for letter, count in counts)
    require(blocks, f"model.hnet.arch_layout: {text!r} has no blocks; give at least one")
    return blocks


# ------------------------------------------------------------------------ what must hold between several keys


def check_combinations(config: Config) -> None:
    """Check everything that needs neither files nor the number of processes. Raises UserError."""
    _check_sizes(config)
    _check_widths(config)
    _check_training(config.training)
    _check_diffusion(config.diffusion, config.data.latent_channels)
    evaluation = config.evaluation
    require(
        evaluation.reference or not evaluation.every,
        "evaluation.reference: is needed with evaluation.every; `evaluate.py --make-reference` writes one",
    )


def _check_sizes(config: Config) -> None:
    data, patch = config.data, config.model.patch_size
    side = max(2, round(data.image_size / data.latent_stride))
    require(
        data.image_size % data.latent_stride == 0 and config.latent_size >= 2,
        f"data.image_size: {data.image_size} must be a multiple of data.latent_stride ({data.latent_stride}) "
        f"and hold at least 2 latent cells; try {side * data.latent_stride}",
    )
    require(
        patch is None or config.latent_size % patch == 0,
        f"model.patch_size: {patch} does not divide the latent's side of {config.latent_size}; "
        "try 2, 4 or 8, or null for a DC-DiT",
    )


def _check_widths(config: Config) -> None:
    hnet: HNetConfig = config.model.hnet
    parse_layout(hnet.arch_layout)
    width = config.d_model
    heads = hnet.num_heads[1]
    require(
        hnet.d_model == [width, width],
        f"model.hnet.d_model: {hnet.d_model} must be equal at both entries; try {[width, width]}",
    )
    for name, channels in (("d_model", width), ("d_model / enc_dec_dim_factor", config.encoder_width)):
        require(
            config.is_static or (channels > 0 and channels % 32 == 0),
            f"model.hnet.{name}: {channels} is not a multiple of 32, which the GroupNorms need",
        )
    require(width % 4 == 0, f"model.hnet.d_model: {width} is not a multiple of 4, which the positions need")
    require(width % heads == 0, f"model.hnet.num_heads: {heads} does not divide d_model {width}")


def _check_training(training: TrainingConfig) -> None:
    fractions = training.multi_budget_drop_fractions
    require(
        fractions or not training.multi_budget_training,
        "training.multi_budget_drop_fractions: [] has no fraction to draw; give at least one, e.g. [0.0, 0.3]",
    )
    if isinstance(fractions, FractionRange):
        require(
            fractions.min <= fractions.max,
            f"training.multi_budget_drop_fractions: min {fractions.min} is above max {fractions.max}; "
            "exchange them",
        )
    require(
        not (training.init_from and training.resume_from_ckpt),
        "training.init_from: the run already starts from training.resume_from_ckpt; give one",
    )
    steps = training.profile_steps
    require(
        not training.profile or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
        f"training.profile_steps: {steps} must be [first, last] with 1 <= first <= last",
    )
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


def _check_diffusion(diffusion: DiffusionConfig, latent_channels: int) -> None:
    steps, guided = diffusion.diffusion_steps, diffusion.cfg_channels
    require(
        diffusion.noise_schedule != "linear" or steps > 20,
        f"diffusion.diffusion_steps: {steps} puts a beta of the linear schedule at 1 or above; "
        "take at least 21",
    )
    require(
        guided == "all" or guided <= latent_channels,
        f"diffusion.cfg_channels: {guided!r} must be 'all' or a number from 1 to {latent_channels}",
    )


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
        divisor = max(number for number in range(1, group + 1) if local % number == 0)
        raise UserError(
            f"training.ratio_batch_size: {group} does not divide the local batch of {local} "
            f"({batch} over {processes} processes); try {divisor}"
        )
    return local
