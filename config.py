"""Configuration: every key with its default, its role and its meaning; typed sections <-> YAML.

`load_config(path, overrides)` reads a YAML file (with `_base_` inheritance), applies `section.key=value` overrides, checks
every name, type and combination, and returns a `Config`. Every mistake is a UserError: one line that names the key, the value
and the remedy. The sections and keys of the official files keep their names.

The role of a key says what it shapes:

    network     the tensors of the network
    process     what is computed with these tensors: the diffusion process, heads, smoothing, precision of the router
    training    the course of training
    free        nothing that training learns

A resumed run may differ from its checkpoint in free keys only. Sampling must agree with the checkpoint in network and process.
"""

import copy
import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from schema import (
    OneProcessError,
    UserError,
    build,
    find_field,
    flatten,
    merge,
    one_line,
    parse_override,
    read_yaml,
)

__all__ = ["OneProcessError", "UserError", "flatten", "one_line"]  # passed on for those above

Role = Literal["network", "process", "training", "free"]
T = TypeVar("T")


def key(default: T, role: Role, meaning: str) -> T:
    """A field of a section. Every section gets its own copy of a default that is a list or a dict."""
    metadata = {"role": role, "meaning": meaning}
    made: Any = field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return made


def role_of(name: str) -> Role:
    """What a key, written `section.key`, shapes. A key below a list or a mapping has the role of the whole field."""
    return find_field(Config, name).metadata["role"]


# ------------------------------------------------------------------------------------------------------------- sections


@dataclass
class HNetConfig:
    """Layout and widths of the stages: the scaffold (encoder, router, decoder) and the main network."""

    arch_layout: list = key(
        ["c2", ["D12"], "c2"],
        "network",
        "[encoder, [main network], decoder]: c is a convolution block, D attention and MLP, d attention only",
    )
    d_model: list[int] = key(
        [768, 768], "network", "width of the scaffold and of the main network; both are equal"
    )
    num_heads: list[int] = key([12, 12], "process", "attention heads; the main network has the second number")
    tie_embeddings: bool = key(
        False, "process", "from the official files; only false has a meaning for images"
    )
    enc_dec_dim_factor: list[int | None] | None = key(
        None, "network", "[factor, null]: the encoder and the decoder have width d_model / factor"
    )
    dechunk_kernel_sigma: float = key(
        1.0, "process", "standard deviation of the smoothing, in latent cells; 2 at 512 pixels"
    )
    fp32_router_dechunk: bool | str = key(
        True,
        "process",
        "router, residual projection and dechunk stay in float32 under autocast; tf32: with TF32 products",
    )


@dataclass
class UpcycleConfig:
    """How training.init_from turns a static DiT into a DC-DiT; see weights/upcycle.py."""

    scaffold: str = key(
        "dit",
        "training",
        "dit: stem, encoder, decoder and head start from the layers of the DiT; fresh: at random",
    )
    router: str = key(
        "balanced",
        "training",
        "balanced: the router keeps 1 token in N from the first step on; fresh: it starts at random",
    )


@dataclass
class ModelConfig:
    """The network."""

    name: str = key("DC-DiT", "training", "name of the run in its folder and its log")
    mlp_ratio: float = key(4.0, "network", "hidden width of the MLPs over their width")
    init: str = key(
        "adaln_zero",
        "training",
        "adaln_zero: block modulation and residual projection start at zero; released: as the official code really starts",
    )
    attention: str = key(
        "auto", "training", "attention kernel: flash, varlen, sdpa, or auto for the fastest that works"
    )
    patch_size: int | None = key(
        None,
        "network",
        "P: a static DiT on patches of P x P latent cells, with the main network only; null: a DC-DiT",
    )
    timestep_divisor: int = key(
        128,
        "process",
        "frequency k of the timestep embedding is 10000^(-k / divisor); 127 as in the DiT of diffusers",
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
    """The course of training; one optimizer step takes gradient_accumulation_steps batches."""

    epochs: int = key(80, "free", "passes over the features")
    max_steps: int | None = key(None, "free", "length in optimizer steps, in place of epochs")
    global_batch_size: int = key(256, "training", "images per batch over all processes")
    learning_rate: float = key(1e-4, "training", "learning rate of AdamW after the warmup")
    lr_warmup_steps: int = key(
        0, "training", "optimizer steps in which the learning rate rises linearly from 0"
    )
    weight_decay: float = key(0.0, "training", "weight decay of AdamW")
    ema_decay: float = key(
        0.9999, "training", "share of the old average that the EMA of the weights keeps in each step"
    )
    max_grad_norm: float = key(1.0, "training", "gradients are scaled down to this norm")
    gradient_accumulation_steps: int = key(1, "training", "batches per optimizer step")
    gradient_checkpointing: bool = key(
        False, "training", "recompute blocks in the backward pass to save memory"
    )
    precision: str = key(
        "auto",
        "training",
        "bf16, fp32, or auto: what accelerate launch says, and bf16 on CUDA where it says nothing",
    )
    compile: bool = key(
        False,
        "free",
        "torch.compile of transformer blocks, encoder and decoder; needs a C++ compiler on a CPU",
    )
    class_dropout_prob: float = key(
        0.1,
        "network",
        "share of labels that become the null label, which guidance needs; 0: there is no null label",
    )
    learn_sigma: bool = key(True, "network", "the network predicts the variance of the reverse process too")
    ratio_loss_weight: float = key(0.03, "training", "weight of the ratio loss")
    ratio_batch_size: int | None = key(
        16, "training", "samples over which the ratio loss averages its shares; null: the whole local batch"
    )
    downsample_factor: float | list[float] = key(
        4.0, "training", "N: the router learns to keep about 1 token in N"
    )
    downsample_factor_start: float | list[float] | None = key(
        None, "training", "N at step 0, from which it moves linearly to downsample_factor; null: no warmup"
    )
    downsample_factor_warmup_steps: int = key(
        0, "training", "optimizer steps that N takes to reach downsample_factor"
    )
    multi_budget_training: bool = key(
        False,
        "training",
        "drop a random fraction of the kept tokens in each step, so that one model serves many budgets",
    )
    multi_budget_drop_fractions: list[float] | FractionRange = key(
        [0.0, 0.1, 0.2, 0.3],
        "training",
        "fractions to draw from: a list, or {min, max} for any fraction between them",
    )
    multi_budget_start_step: int | None = key(
        None, "training", "first optimizer step that drops tokens; null: downsample_factor_warmup_steps"
    )
    seed: int = key(0, "training", "seed of weights, batches and noise")
    profile: bool = key(False, "free", "write a trace of torch.profiler into the folder")
    profile_steps: list[int] = key(
        [10, 20], "free", "[first, last] optimizer step of the trace, counted from 1"
    )
    resume_from_ckpt: str | None = key(
        None, "free", "start a new run from the weights and the optimizer of this checkpoint"
    )
    init_from: str | None = key(
        None,
        "free",
        "start with the weights of this model; a static DiT becomes a DC-DiT as model.upcycle says",
    )
    frozen: list[str] = key(
        [], "training", "parameters whose names begin with one of these do not change for frozen_steps"
    )
    frozen_steps: int = key(0, "training", "optimizer steps during which the frozen parameters do not change")
    lr_scales: dict[str, float] = key(
        {}, "training", "{beginning of a parameter's name: factor on its learning rate}"
    )
    max_skipped_steps: int = key(
        10, "free", "number of steps in a row with a non-finite loss or gradient that ends training"
    )
    rank_timeout: float = key(600.0, "free", "seconds after which a dead or hanging process ends the others")


@dataclass
class DataConfig:
    """Images, their latents, and the autoencoder between them."""

    feature_path: str = key("features", "free", "folder that extract_features.py wrote")
    image_size: int = key(256, "network", "side of an image in pixels")
    num_classes: int = key(1000, "network", "number of labels, without the null label")
    num_workers: int = key(32, "free", "loader processes per training process")
    vae: str = key("ema", "free", "autoencoder that decodes samples: ema, mse, or a local diffusers folder")
    latent_stride: int = key(8, "network", "pixels per latent cell; must agree with the features")
    latent_channels: int = key(4, "network", "channels of a latent; must agree with the features")


@dataclass
class DiffusionConfig:
    """The diffusion process and its guidance."""

    noise_schedule: str = key("linear", "process", "schedule of beta")
    diffusion_steps: int = key(1000, "process", "timesteps of the forward process")
    cfg_channels: int | str = key(
        3, "training", "latent channels that guidance changes: the first n, which is 3 in DiT, or all"
    )


@dataclass
class LoggingConfig:
    """What a run writes, and how often; all intervals are in optimizer steps."""

    results_dir: str = key("results", "free", "folder in which a run without --output makes its own")
    log_every: int = key(100, "free", "interval of log lines and metrics")
    ckpt_every: int = key(10000, "free", "interval of checkpoints")
    ckpt_keep: int = key(5, "free", "number of the newest checkpoints that stay on disk; 0 keeps all")
    sample_every: int = key(0, "free", "interval of sample grids from the EMA; 0: none")
    sample_cfg_scale: float = key(4.0, "free", "guidance scale of the sample grids")
    trackers: list[str] = key([], "free", "wandb, tensorboard or another tracker that Accelerate knows")
    wandb_project: str = key("Dynamic-Chunking-DiT", "free", "project in wandb")


@dataclass
class EvaluationConfig:
    """Evaluation of the EMA during training; see evaluation/in_training.py."""

    every: int = key(0, "free", "interval in optimizer steps; 0: none")
    num_samples: int = key(
        2048, "free", "number of samples to compare with the reference; precision and recall need 4"
    )
    reference: str | None = key(
        None, "free", "ADM .npz, folder of images, or a file that evaluate.py --make-reference wrote"
    )
    features: str = key("inception", "free", "inception, a TorchScript file, or the folder of a timm model")
    inception_weights: str | None = key(
        None, "free", "file with the weights of Inception; null: the download of torch-fidelity"
    )
    cfg_scale: float = key(1.0, "free", "guidance scale")
    num_sampling_steps: int = key(50, "free", "steps of the DDIM sampler")
    batch_size: int = key(32, "free", "samples per batch and process")


@dataclass
class Config:
    """The whole configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ckpt: str | None = key(None, "free", "checkpoint to sample from when --ckpt is not given")

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
