"""The table of all configuration keys: official section and key names, with type, default, role and meaning.

The type of a key includes what its value must be. One of the four functions below gives its role: what the
key shapes. `rewrite` is a rule of spellings.py, which is applied before the type is checked. What must hold
between several keys stands in config.py. docs/configuration.md shows the table.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import layouts
import spellings
from grid import Grid
from schema import (
    Constraint,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rewrite,
    at_least,
    field_with,
    of_length,
)

T = TypeVar("T")
Role = Literal["network", "process", "training", "free"]

# -------------------------------------------------------------------------------- what a key shapes: its role


def network(default: T, meaning: str, rewrite: Rewrite | None = None) -> T:
    """A key that shapes the tensors of the network. Resuming and sampling must agree on it."""
    return field_with(default, role="network", meaning=meaning, rewrite=rewrite)


def process(default: T, meaning: str, rewrite: Rewrite | None = None) -> T:
    """A key that shapes what is computed with these tensors. Resuming and sampling must agree on it."""
    return field_with(default, role="process", meaning=meaning, rewrite=rewrite)


def training(default: T, meaning: str, rewrite: Rewrite | None = None) -> T:
    """A key that shapes the course of training. A resumed run must agree on it; sampling may differ."""
    return field_with(default, role="training", meaning=meaning, rewrite=rewrite)


def free(default: T, meaning: str, rewrite: Rewrite | None = None) -> T:
    """A key that a resumed run may change, and sampling too: length, paths, logging, evaluation."""
    return field_with(default, role="free", meaning=meaning, rewrite=rewrite)


# -------------------------------------------------------------------------------------------------- the table

# Names that a module of --import may add to. What they stand for is in models/router.py, diffusion/process.py,
# models/embeddings.py and training/losses.py
ROUTERS = ["learned", "hnet", "uniform", "random", "contrast"]
CONTROL_ROUTERS = ["uniform", "random", "contrast"]  # those that learn nothing
OBJECTIVES = ["gaussian", "flow"]
CONDITIONS = ["scalar", "vector-N"]  # N stands for a number above 0
TERMS = ["align"]
VARIANCE_OBJECTIVES = ["gaussian"]  # those that can learn a variance


def one_of(names: list[str]) -> Constraint:
    """One of a list of names that can grow."""
    remedy = "; name the module that adds another with --import"
    return Constraint(f"one of {', '.join(names)}", lambda value: value in names, remedy)


def form_of_kind(kind: str) -> str:
    """The form that the name of a condition's kind has, such as vector-N for vector-768."""
    return re.sub(r"-[1-9]\d*", "-N", kind)


def kind_among(names: list[str]) -> Constraint:
    """One of a list of names that can grow, with a number in place of each N."""

    def is_known(value: str) -> bool:
        return "N" not in value.split("-") and (value in names or form_of_kind(value) in names)

    known = one_of(names)
    return Constraint(f"{known.text}, with a number for N", is_known, known.remedy)


COLUMN_NAME = "[a-z][a-z0-9_]{0,63}"  # of a column of the features

Seed = Annotated[int, at_least(0), Constraint("below 2**63", lambda value: value < 2**63)]
EmaDecay = Annotated[
    float,
    Constraint(
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        remedy="; at 1 the EMA would keep the first weights for ever; try 0.9999",
    ),
]
EmaStd = Annotated[
    float, Constraint("above 0 and below 0.28, which is nearly uniform", lambda value: 0 < value < 0.28)
]
GradientNorm = Annotated[
    float, Constraint("greater than 0", lambda value: value > 0, remedy="; try null for no limit")
]
Share = Annotated[float, Constraint("in [0, 1]", lambda value: 0 <= value <= 1)]
GuidanceScale = Annotated[
    float, Constraint("at least 1, or 0 for samples without a class", lambda value: value == 0 or value >= 1)
]


@dataclass
class HNetConfig:
    """Blocks and widths: of the scaffold (encoder, router, decoder) and of the main network."""

    arch_layout: list = network(
        ["c2", ["D12"], "c2"],
        "encoder, main network, decoder; c2: 2 convolution blocks, D12: 12 transformer blocks",
        layouts.only_lists,
    )
    d_model: Annotated[list[PositiveInt], of_length(2)] = network(
        [768, 768], "width of the scaffold and of the main network, which must be equal", spellings.one_stage
    )
    num_heads: Annotated[list[PositiveInt], of_length(2)] = process(
        [12, 12], "attention heads; the main network has the second number", spellings.one_stage
    )
    tie_embeddings: Literal[False] = process(
        False, "stands in the official files, whose code never reads it", spellings.never_read
    )
    enc_dec_dim_factor: Annotated[list[PositiveInt | None], of_length(2)] | None = network(
        None,
        "[factor, null]: the encoder and the decoder have width d_model / factor; null: d_model",
        spellings.one_reduction,
    )
    dechunk_kernel_sigma: NonNegativeFloat = process(
        1.0, "width of the smoothing kernel in latent cells; 2 at 512 pixels; 0: no smoothing"
    )
    fp32_router_dechunk: bool | Literal["tf32"] = process(
        True,
        "router, residual projection and dechunk stay in float32 under autocast; tf32: with TF32 products",
    )


@dataclass
class UpcycleConfig:
    """How training.init_from turns a static DiT into a DC-DiT; see weights/upcycle.py."""

    scaffold: Literal["dit", "fresh"] = training(
        "dit", "dit: stem, encoder, decoder and head start from the layers of the DiT; fresh: at random"
    )
    router: Literal["balanced", "fresh"] = training(
        "balanced", "balanced: the router keeps 1 token in N from the first step; fresh: it starts at random"
    )


@dataclass
class ModelConfig:
    """The network."""

    name: str = training("DC-DiT", "name of the run in folders, logs and tables")
    mlp_ratio: PositiveFloat = network(4.0, "hidden width of an MLP over its width")
    init: Literal["adaln_zero", "released"] = training(
        "adaln_zero",
        "modulation and residual projection start at zero; released: as the official code really starts",
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = training(
        "auto", "attention kernel; auto: the fastest that works here"
    )
    router: Annotated[str, one_of(ROUTERS)] = network(
        "learned",
        "which tokens are kept; hnet compares neighbours; uniform (a grid), random and contrast learn nothing "
        "and keep 1 token in N",
    )
    min_tokens: Annotated[int, at_least(2)] | None = process(
        None,
        "keep at least this number of tokens per image, the first by the router's order; null: any number",
    )
    residual_projection: bool = network(
        True, "the decoder also gets a projection of the encoder's output; false: the kept tokens alone"
    )
    patch_size: PositiveInt | None = network(
        None, "P: a static DiT on patches of P x P latent cells, with the main network only; null: a DC-DiT"
    )
    timestep_divisor: PositiveInt = process(
        128, "frequency k of the timestep embedding is 10000^(-k / divisor); 127 as in the DiT of diffusers"
    )
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    hnet: HNetConfig = field(default_factory=HNetConfig)


@dataclass
class FractionRange:
    """Any fraction from min to max, uniformly."""

    min: Fraction
    max: Fraction


@dataclass
class TrainingConfig:
    """The course of training."""

    # What DiT and other training programs call a key, for error lines
    OTHER_NAMES = {
        "lr": "learning_rate",
        "batch_size": "global_batch_size",
        "global_seed": "seed",
        "mixed_precision": "precision",
    }

    epochs: PositiveInt = free(80, "passes over the features")
    max_steps: PositiveInt | None = free(None, "length in optimizer steps, in place of epochs")
    global_batch_size: PositiveInt = training(256, "images per batch over all processes")
    learning_rate: PositiveFloat = training(1e-4, "learning rate of AdamW after the warmup")
    lr_warmup_steps: NonNegativeInt = training(0, "optimizer steps in which the learning rate rises")
    weight_decay: NonNegativeFloat = training(0.0, "weight decay of AdamW")
    ema_decay: EmaDecay = training(0.9999, "share of the old EMA that a step keeps")
    ema_warmup: bool = training(
        False,
        "at step s the EMA keeps at most (1 + s) / (10 + s), so that short runs forget their first weights",
    )
    posthoc_ema_stds: list[EmaStd] = training(
        [],
        "relative lengths of averages that are tracked besides, e.g. [0.05, 0.1]; `weights.reconstruct` makes "
        "any length from them",
    )
    averages: dict[str, dict[str, bool | int | float | str]] = training(
        {},
        "averages of a module of --import by name, e.g. {mean: {start: 400}}; `--weights` takes one of them; see "
        "weights/averages.py",
        spellings.no_pairs,
    )
    max_grad_norm: GradientNorm | None = training(
        1.0,
        "longer gradients are scaled down to this norm; null: gradients of any length",
        spellings.no_limit,
    )
    gradient_accumulation_steps: PositiveInt = training(1, "batches per optimizer step")
    gradient_checkpointing: bool = training(False, "recompute blocks in the backward pass to save memory")
    precision: Literal["auto", "bf16", "fp32"] = training(
        "auto",
        "auto: as the checkpoint says that training resumes from; in a new run as accelerate launch says, which is "
        "no unless --mixed_precision is given; without a launcher bf16 on CUDA and on CPUs with AMX or AVX512-BF16 "
        "(there from a width of 128)",
        spellings.precision,
    )
    tf32: bool | Literal["auto"] = training(
        "auto",
        "the network's products in float32 may run as TF32 on CUDA; auto: where its others are in bfloat16; "
        "true is the same as --tf32",
    )
    deterministic: bool = free(
        False, "only GPU kernels that repeat their sums in one order; slower, and not needed on a CPU"
    )
    compile: bool = free(False, "torch.compile of blocks, encoder and decoder; the same as --compile")
    class_dropout_prob: Share = network(
        0.1,
        "share of labels that training replaces by the null label; 0: no null label, no guidance; "
        "1: a model without classes, for samples at scale 0",
    )
    learn_sigma: bool = network(True, "predict the variance of the reverse process, too")
    ratio_loss_weight: NonNegativeFloat = training(
        0.03, "weight of the ratio loss; 0: it is left out", spellings.not_negative
    )
    ratio_batch_size: PositiveInt | None = training(
        16, "samples over which the ratio loss averages its shares; null: the local batch"
    )
    terms: dict[str, dict[str, bool | int | float | str]] = training(
        {},
        "further terms of the loss by name, e.g. {align: {weight: 0.5, block: 2, column: dino}}; see "
        "training/losses.py",
        spellings.no_pairs,
    )
    downsample_factor: Annotated[float, at_least(1)] = training(
        4.0,
        "N: the router learns to keep about 1 token in N; above 1 where the ratio loss has a weight",
        spellings.one_number,
    )
    downsample_factor_start: Annotated[float, at_least(1)] | None = training(
        None, "N at step 0, from which it moves linearly; null: N is constant", spellings.one_number
    )
    downsample_factor_warmup_steps: NonNegativeInt = training(
        0, "optimizer steps from the first N to downsample_factor"
    )
    downsample_factor_points: str | None = training(
        None,
        "N by timestep, linear between points, e.g. 0:2,500:4,1000:8; the ratio loss then groups samples by "
        "timestep; null: downsample_factor at every timestep",
    )
    multi_budget_training: bool = training(False, "drop a random fraction of the kept tokens in each step")
    multi_budget_drop_fractions: list[Fraction] | FractionRange = training(
        [0.0, 0.1, 0.2, 0.3], "the fractions to draw from; {min, max}: any fraction between them"
    )
    multi_budget_start_step: NonNegativeInt | None = training(
        None, "first optimizer step that drops tokens; null: downsample_factor_warmup_steps"
    )
    seed: Seed = training(0, "seed of weights, batches and noise")
    profile: bool = free(False, "write traces of torch.profiler for profile_steps")
    profile_steps: list[NonNegativeInt] = free([10, 20], "first and last step to trace")
    resume_from_ckpt: str | None = free(None, "start a new run from this checkpoint")
    init_from: str | None = free(
        None, "start with the weights of this model; a static DiT is upcycled as model.upcycle says"
    )
    frozen: list[str] = training(
        [],
        "parameters whose names begin with these parts do not change for frozen_steps",
        spellings.no_entries,
    )
    frozen_steps: NonNegativeInt = training(0, "optimizer steps until the frozen parameters change")
    lr_scales: dict[str, PositiveFloat] = training(
        {}, "factors on the learning rate, by the first parts of a parameter's name", spellings.no_pairs
    )
    max_skipped_steps: PositiveInt = free(10, "number of non-finite steps in a row that ends training")
    rank_timeout: PositiveFloat = free(
        600.0, "seconds after which a process that is dead, or a loader that hangs, ends the run"
    )

    @property
    def longest_gradient(self) -> float:
        """`max_grad_norm` as a number."""
        return math.inf if self.max_grad_norm is None else self.max_grad_norm


@dataclass
class DataConfig:
    """Images and their latents."""

    feature_path: str = free("features", "folder that extract_features.py wrote")
    image_size: PositiveInt | Annotated[list[PositiveInt], of_length(2)] = network(
        256, "side of a square image in pixels, or [height, width]", spellings.one_side
    )
    num_classes: PositiveInt = network(1000, "number of labels, without the null label")
    num_workers: NonNegativeInt = free(32, "loader processes per training process")
    vae: str = free(
        "ema",
        "autoencoder that decodes samples, unless the features name it: ema, mse, pixels, pixels-4 for patches of "
        "4 x 4, or a local diffusers folder",
    )
    latent_stride: PositiveInt = network(8, "pixels per latent cell; must agree with the features")
    latent_channels: PositiveInt = network(4, "channels of a latent; must agree with the features")
    conditions: dict[str, Annotated[str, kind_among(CONDITIONS)]] = network(
        {},
        "columns of the features that condition the network beside the class, e.g. {aesthetic: scalar, caption: "
        "vector-768}; they are dropped with the class",
        spellings.no_pairs,
    )

    @property
    def image_grid(self) -> Grid:
        """Rows and columns of an image's pixels."""
        return Grid.of(self.image_size)


@dataclass
class DiffusionConfig:
    """The diffusion process and its guidance."""

    objective: Annotated[str, one_of(OBJECTIVES)] = process(
        "gaussian", "gaussian: DDPM's process; flow: the straight path, whose velocity is predicted"
    )
    prediction: Literal["epsilon", "velocity"] = process(
        "epsilon", "what the network predicts of the Gaussian process; flow: has no effect"
    )
    flow_shift: PositiveFloat = process(
        1.0, "above 1, more of the path of a flow is noisy, which large images need; gaussian: has no effect"
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = training(
        "uniform", "timesteps of training; logit_normal: mostly in the middle, as flows prefer"
    )
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = process(
        "linear", "schedule of the betas; flow: has no effect"
    )
    diffusion_steps: PositiveInt = process(1000, "number of timesteps")
    cfg_channels: PositiveInt | Literal["all"] = training(
        3, "guidance changes the first n latent channels, or all"
    )


@dataclass
class LoggingConfig:
    """What training writes; intervals are in optimizer steps."""

    results_dir: str = free("results", "where a run without --output makes its folder")
    log_every: PositiveInt = free(100, "interval of log lines")
    ckpt_every: PositiveInt = free(10000, "interval of checkpoints")
    ckpt_keep: NonNegativeInt = free(5, "number of the newest checkpoints that stay on disk; 0: all")
    sample_every: NonNegativeInt = free(0, "interval of sample grids from the EMA; 0: none")
    sample_cfg_scale: GuidanceScale = free(
        4.0, "guidance scale of the sample grids; 1 for a model without a null label"
    )
    trackers: list[str] = free(
        [], "wandb, tensorboard, or another tracker that Accelerate knows", spellings.no_entries
    )
    wandb_project: str = free("Dynamic-Chunking-DiT", "project in wandb")


@dataclass
class EvaluationConfig:
    """Evaluation of the EMA during training; see evaluation/in_training.py."""

    every: NonNegativeInt = free(0, "interval in optimizer steps; 0: none")
    # Precision and recall use the third neighbour
    num_samples: Annotated[int, at_least(4)] = free(2048, "number of samples")
    reference: str | None = free(
        None, "ADM .npz, folder of images, or a file of evaluate.py --make-reference"
    )
    features: str = free("inception", "inception, a TorchScript file, or the folder of a timm model")
    inception_weights: str | None = free(None, "file of Inception weights; null: torch-fidelity's download")
    cfg_scale: GuidanceScale = free(1.0, "guidance scale; 1 for a model without a null label")
    num_sampling_steps: PositiveInt = free(50, "DDIM steps")
    batch_size: PositiveInt = free(32, "samples per batch and process")
