"""Configuration: typed sections <-> YAML, with the official section and key names.

`load_config(path, overrides)` reads a YAML file (with `_base_` inheritance), applies `section.key=value` overrides, checks
every name, type and combination, and returns a `Config`. Every mistake is a UserError: one line that names the key, the value
and the remedy.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from schema import OneProcessError, UserError, build, flatten, merge, one_line, parse_override, read_yaml

__all__ = ["OneProcessError", "UserError", "flatten", "one_line"]  # passed on for those above


# ------------------------------------------------------------------------------------------------------------- sections


@dataclass
class HNetConfig:
    arch_layout: list = field(
        default_factory=lambda: ["c2", ["D12"], "c2"]
    )  # [encoder, [main network], decoder]
    d_model: list[int] = field(default_factory=lambda: [768, 768])  # per stage; equal at all stages
    num_heads: list[int] = field(default_factory=lambda: [12, 12])
    tie_embeddings: bool = False  # of the official files; only false has a meaning here
    enc_dec_dim_factor: list[int | None] | None = None  # encoder width = d_model[0] // factor[0]
    dechunk_kernel_sigma: float = 1.0  # in latent cells; 2.0 at 512 px
    fp32_router_dechunk: bool | str = (
        True  # router, residual projection, dechunk in float32 under autocast too; or "tf32"
    )


@dataclass
class UpcycleConfig:
    """How training.init_from turns a static DiT into a DC-DiT; see weights/upcycle.py."""

    scaffold: str = "dit"  # stem, encoder, decoder and head start from the DiT's own layers; or "fresh"
    router: str = (
        "balanced"  # its last layer starts so that 1 token in N is kept from the first step on; or "fresh"
    )


@dataclass
class ModelConfig:
    name: str = "DC-DiT"
    mlp_ratio: float = 4.0
    init: str = "adaln_zero"  # or "released": what the official code really does
    attention: str = "auto"  # or "flash", "varlen", "sdpa"
    patch_size: int | None = (
        None  # null: a DC-DiT; P: a static DiT on patches of P x P cells, with hnet's main network only
    )
    timestep_divisor: int = (
        128  # frequency k of the timestep is 10000^(-k / divisor); 127: as in diffusers' DiT
    )
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    hnet: HNetConfig = field(default_factory=HNetConfig)


@dataclass
class FractionRange:
    """Any fraction from min to max, uniformly."""

    min: float
    max: float


@dataclass
class TrainingConfig:
    epochs: int = 80
    max_steps: int | None = None  # optimizer steps; when set, replaces epochs
    global_batch_size: int = 256  # per micro-step over all processes
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    precision: str = (
        "auto"  # or "bf16", "fp32"; auto: as accelerate launch says, and if it says nothing bf16 on CUDA
    )
    compile: bool = False  # torch.compile of transformer blocks, encoder and decoder
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    ratio_loss_weight: float = 0.03
    ratio_batch_size: int | None = 16  # null: the whole local batch is one group
    downsample_factor: float | list[float] = 4.0  # N: about 1 token in N is kept
    downsample_factor_start: float | list[float] | None = None
    downsample_factor_warmup_steps: int = 0
    multi_budget_training: bool = False
    multi_budget_drop_fractions: list[float] | FractionRange = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3]
    )
    multi_budget_start_step: int | None = None  # null: downsample_factor_warmup_steps
    seed: int = 0
    profile: bool = False
    profile_steps: list[int] = field(default_factory=lambda: [10, 20])
    resume_from_ckpt: str | None = None  # start a new run from this checkpoint
    init_from: str | None = (
        None  # start with the weights of this model; a static DiT becomes a DC-DiT as model.upcycle says
    )
    frozen: list[str] = field(default_factory=list)  # parameters whose names begin so do not change ...
    frozen_steps: int = 0  # ... in this many first steps
    lr_scales: dict[str, float] = field(
        default_factory=dict
    )  # factor on the learning rate by beginning of the name
    max_skipped_steps: int = 10  # so many non-finite steps in a row end the run
    rank_timeout: float = 600.0  # seconds after which a process that is dead or hangs ends the others


@dataclass
class DataConfig:
    feature_path: str = "features"
    image_size: int = 256  # pixels
    num_classes: int = 1000
    num_workers: int = 32  # loader processes per training process
    vae: str = "ema"  # "ema", "mse" or a local diffusers folder; decodes samples
    latent_stride: int = 8  # pixels per latent cell
    latent_channels: int = 4


@dataclass
class DiffusionConfig:
    noise_schedule: str = "linear"  # or "squaredcos_cap_v2"
    diffusion_steps: int = 1000
    cfg_channels: int | str = (
        3  # latent channels that guidance changes: the first n (3: DiT's convention), or "all"
    )


@dataclass
class LoggingConfig:
    results_dir: str = "results"
    log_every: int = 100  # optimizer steps, as all below
    ckpt_every: int = 10000
    ckpt_keep: int = 5  # how many of the newest checkpoints stay on disk; 0 keeps all
    sample_every: int = 0  # sample grids from the EMA; 0: none
    sample_cfg_scale: float = 4.0
    trackers: list[str] = field(default_factory=list)  # "wandb", "tensorboard", ... (Accelerate's names)
    wandb_project: str = "Dynamic-Chunking-DiT"


@dataclass
class EvaluationConfig:
    """Evaluation of the EMA during training; see evaluation/in_training.py."""

    every: int = 0  # optimizer steps; 0: none
    num_samples: int = 2048
    reference: str | None = None  # ADM .npz, folder of images, or what evaluate.py --make-reference wrote
    features: str = "inception"  # or a TorchScript file, or the folder of a timm model
    inception_weights: str | None = None  # file; null: torch-fidelity's download
    cfg_scale: float = 1.0
    num_sampling_steps: int = 50  # of DDIM
    batch_size: int = 32  # per process


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ckpt: str | None = None  # checkpoint to sample from when --ckpt is not given

    @property
    def is_static(self) -> bool:
        """Whether the network is a static DiT, which has no router."""
        return self.model.patch_size is not None

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
        return self.model.hnet.d_model[-1]

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.d_model // self.model.hnet.num_heads[1]

    @property
    def encoder_width(self) -> int:
        """Width E of the convolutions: d_model over the reduction factor of the outer stage."""
        factors = self.model.hnet.enc_dec_dim_factor
        return self.d_model // (factors[0] if factors and factors[0] else 1)


class Layout(typing.NamedTuple):
    """What `arch_layout` says: numbers of convolution blocks, and a letter (d or D) per transformer block."""

    encoder_blocks: int
    main_blocks: str
    decoder_blocks: int


# ------------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file (none: all defaults), apply `section.key=value` overrides, and check the result.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a combination that cannot work.
    """
    return config_from_dict(read_yaml(Path(path), ()) if path else {}, overrides)


def config_from_dict(raw: dict, overrides: typing.Sequence[str] = ()) -> Config:
    """Build and check a Config from nested plain data (as in a checkpoint) with overrides."""
    for override in overrides:
        raw = merge(raw, parse_override(override))
    config = build(Config, raw, "")
    validate(config)
    if config.is_static:
        switch_router_off(config.training)
    return config


def switch_router_off(training: TrainingConfig) -> None:
    """A static DiT keeps every token: it has nothing to train towards a ratio, and no budgets."""
    training.ratio_loss_weight, training.multi_budget_training = 0.0, False


def to_dict(config: Config) -> dict:
    """The configuration as nested plain data; `config_from_dict` inverts it."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(ours: dict, theirs: dict, where: str = "") -> list[str]:
    """Keys, as `section.key`, at which two configurations in plain data differ."""
    keys = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differences(a, b, f"{where}{key}.")
        elif a != b:
            keys.append(where + key)
    return keys


# --------------------------------------------------------------------------------------------------------------- checks


def parse_layout(layout: list) -> Layout:
    """Read `[encoder, [main], decoder]` such as ["c2", ["D12"], "c2"].

    c is a convolution block, D attention and MLP, d attention only.

    Raises:
        UserError: another nesting, another letter, or no blocks.
    """
    key = "model.hnet.arch_layout"
    if len(layout) != 3 or not isinstance(layout[1], list):
        raise UserError(f"{key}: {layout!r} must be [encoder, [main], decoder], e.g. [c2, [D12], c2]")
    if len(layout[1]) == 3:
        raise UserError(f"{key}: {layout!r} has more than one chunking stage, and only one is supported")
    if len(layout[1]) != 1:
        raise UserError(f"{key}: the main network {layout[1]!r} must be one string, e.g. [D12]")
    encoder, main, decoder = _blocks(layout[0], "c"), _blocks(layout[1][0], "dD"), _blocks(layout[2], "c")
    return Layout(len(encoder), main, len(decoder))


def _blocks(text, letters: str) -> str:
    """ "D2d1" -> "DDd"."""
    if not isinstance(text, str) or not re.fullmatch(rf"([{letters}][0-9]{{1,3}})+", text):
        wanted = " or ".join(f"'{letter}<number>'" for letter in letters)
        raise UserError(f"model.hnet.arch_layout: {text!r} must be {wanted}, e.g. '{letters[-1]}2'")
    blocks = "".join(letter * int(count) for letter, count in re.findall(r"([a-zA-Z])(\d+)", text))
    if not blocks:
        raise UserError(f"model.hnet.arch_layout: {text!r} has no blocks; give at least one")
    return blocks


def downsample_factors(value: float | list[float]) -> float:
    """N of the one stage; the official files may give it as a list."""
    return value[0] if isinstance(value, list) else value


def validate(config: Config) -> None:
    """Check everything that needs neither files nor the number of processes. Raises UserError."""
    data, logging = config.data, config.logging
    _positive(
        data, "data", "image_size", "num_classes", "latent_stride", "latent_channels"
    )  # the model's sizes follow
    _check_model(config)
    _check_training(config.training)
    _at_least(data, "data", 0, "num_workers")
    if data.image_size % data.latent_stride or config.latent_size < 2:
        raise UserError(
            f"data.image_size: {data.image_size} must be a multiple of data.latent_stride ({data.latent_stride}) and hold "
            f"at least 2 latent cells; try {max(2, round(data.image_size / data.latent_stride)) * data.latent_stride}"
        )
    _choice("diffusion.noise_schedule", config.diffusion.noise_schedule, ("linear", "squaredcos_cap_v2"))
    if config.diffusion.noise_schedule == "linear" and 0 < config.diffusion.diffusion_steps <= 20:
        raise UserError(
            f"diffusion.diffusion_steps: {config.diffusion.diffusion_steps} puts a beta of the linear schedule at 1 or above; "
            "take at least 21"
        )
    _positive(config.diffusion, "diffusion", "diffusion_steps")
    guided = config.diffusion.cfg_channels
    if guided != "all" and not (isinstance(guided, int) and 1 <= guided <= data.latent_channels):
        raise UserError(
            f"diffusion.cfg_channels: {guided!r} must be 'all' or a number from 1 to {data.latent_channels}"
        )
    _positive(logging, "logging", "log_every", "ckpt_every")
    _at_least(logging, "logging", 0, "ckpt_keep", "sample_every")
    _at_least(logging, "logging", 1.0, "sample_cfg_scale")
    _check_evaluation(config.evaluation)


def validate_processes(config: Config, processes: int) -> int:
    """Check the batch sizes for this number of processes; return the local batch size."""
    training = config.training
    if training.global_batch_size % processes:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of the {processes} processes; "
            f"try {-(-training.global_batch_size // processes) * processes}"
        )
    local = training.global_batch_size // processes
    group = training.ratio_batch_size
    if training.ratio_loss_weight > 0 and group and local % group:
        raise UserError(
            f"training.ratio_batch_size: {group} does not divide the local batch of {local} "
            f"({training.global_batch_size} over {processes} processes); try {_largest_divisor(local, group)}"
        )
    return local


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)


def _check_model(config: Config) -> None:
    model, hnet = config.model, config.model.hnet
    parse_layout(hnet.arch_layout)
    _choice("model.init", model.init, ("adaln_zero", "released"))
    if hnet.fp32_router_dechunk not in (True, False, "tf32"):
        raise UserError(
            f"model.hnet.fp32_router_dechunk: '{hnet.fp32_router_dechunk}' is not true, false or tf32"
        )
    _choice("model.attention", model.attention, ("auto", "flash", "varlen", "sdpa"))
    _choice("model.upcycle.scaffold", model.upcycle.scaffold, ("dit", "fresh"))
    _choice("model.upcycle.router", model.upcycle.router, ("balanced", "fresh"))
    _positive(model, "model", "mlp_ratio", "timestep_divisor")
    if model.patch_size is not None and (model.patch_size < 1 or config.latent_size % model.patch_size):
        raise UserError(
            f"model.patch_size: {model.patch_size} does not divide the latent's side of {config.latent_size}; "
            "try 2, 4 or 8, or null for a DC-DiT"
        )
    _positive(hnet, "model.hnet", "dechunk_kernel_sigma")
    if hnet.tie_embeddings:
        raise UserError(
            "model.hnet.tie_embeddings: true has no meaning for images; set it to false or leave it out"
        )
    factors = hnet.enc_dec_dim_factor if hnet.enc_dec_dim_factor is not None else [None, None]
    for key, values in (
        ("d_model", hnet.d_model),
        ("num_heads", hnet.num_heads),
        ("enc_dec_dim_factor", factors),
    ):
        if len(values) != 2:
            raise UserError(
                f"model.hnet.{key}: {values} must have 2 entries, for the scaffold and for the main network"
            )
    for key, values in (("d_model", hnet.d_model), ("num_heads", hnet.num_heads)):
        if min(values) < 1:
            raise UserError(f"model.hnet.{key}: {values} must be positive")
    if hnet.d_model[0] != hnet.d_model[1]:
        raise UserError(
            f"model.hnet.d_model: {hnet.d_model} must be equal at both entries; try {[hnet.d_model[1]] * 2}"
        )
    if factors[1] or (factors[0] or 0) < 0:
        raise UserError(f"model.hnet.enc_dec_dim_factor: {factors} must be [positive or null, null]")
    for name, width in (("d_model", config.d_model), ("d_model / enc_dec_dim_factor", config.encoder_width)):
        if not config.is_static and (width % 32 or width == 0):
            raise UserError(f"model.hnet.{name}: {width} is not a multiple of 32, which the GroupNorms need")
    if config.d_model % 4:
        raise UserError(
            f"model.hnet.d_model: {config.d_model} is not a multiple of 4, which the positions need"
        )
    if config.d_model % hnet.num_heads[1]:
        raise UserError(f"model.hnet.num_heads: {hnet.num_heads[1]} does not divide d_model {config.d_model}")


def _check_training(training: TrainingConfig) -> None:
    _positive(
        training, "training", "epochs", "global_batch_size", "learning_rate", "max_grad_norm", "gradient_accumulation_steps",
        "max_skipped_steps", "rank_timeout",
    )  # fmt: skip
    _choice("training.precision", training.precision, ("auto", "bf16", "fp32"))
    _at_least(
        training,
        "training",
        0,
        "lr_warmup_steps",
        "weight_decay",
        "downsample_factor_warmup_steps",
        "frozen_steps",
        "seed",
    )
    if training.seed >= 2**63:
        raise UserError(f"training.seed: {training.seed} must be below 2**63")
    for prefix, scale in training.lr_scales.items():
        if scale <= 0:
            raise UserError(
                f"training.lr_scales.{prefix}: {scale} must be greater than 0; training.frozen stops parameters"
            )
    _fraction("training.class_dropout_prob", training.class_dropout_prob)
    _fraction("training.ema_decay", training.ema_decay)
    for key in ("max_steps", "ratio_batch_size"):
        if getattr(training, key) is not None:
            _positive(training, "training", key)
    for key in ("downsample_factor", "downsample_factor_start"):
        value = getattr(training, key)
        if isinstance(value, list) and len(value) != 1:
            raise UserError(f"training.{key}: {value} must be one number, as there is one chunking stage")
        if value is not None and downsample_factors(value) <= 1:
            raise UserError(f"training.{key}: {value} must be greater than 1; N = 4 keeps about 1 token in 4")
    _check_drop_fractions("training.multi_budget_drop_fractions", training.multi_budget_drop_fractions)
    if training.init_from and training.resume_from_ckpt:
        raise UserError("training.init_from: the run already starts from training.resume_from_ckpt; give one")
    if training.multi_budget_start_step is not None:
        _at_least(training, "training", 0, "multi_budget_start_step")
    start_end = training.profile_steps
    if len(start_end) != 2 or not 1 <= start_end[0] <= start_end[1]:
        raise UserError(f"training.profile_steps: {start_end} must be [first, last] with 1 <= first <= last")


def _check_drop_fractions(key: str, fractions: list[float] | FractionRange) -> None:
    if not fractions:
        raise UserError(f"{key}: the list is empty; give fractions in [0, 1)")
    for fraction in fractions if isinstance(fractions, list) else (fractions.min, fractions.max):
        _fraction(key, fraction)
    if isinstance(fractions, FractionRange) and fractions.min > fractions.max:
        raise UserError(f"{key}: min {fractions.min} is above max {fractions.max}; exchange them")


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    _at_least(evaluation, "evaluation", 0, "every")
    _at_least(evaluation, "evaluation", 4, "num_samples")  # precision and recall look at the third neighbour
    _at_least(evaluation, "evaluation", 1.0, "cfg_scale")
    _positive(evaluation, "evaluation", "num_sampling_steps", "batch_size")
    if evaluation.every and evaluation.reference is None:
        raise UserError(
            "evaluation.reference: is needed with evaluation.every; `evaluate.py --make-reference` writes one"
        )


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}: '{value}' is not one of {', '.join(choices)}")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{key}: {value} is outside [0, 1)")


def _positive(section, where: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) <= 0:
            raise UserError(f"{where}.{key}: {getattr(section, key)} must be greater than 0")


def _at_least(section, where: str, least: float, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) < least:
            raise UserError(f"{where}.{key}: {getattr(section, key)} must be at least {least}")
