"""Configuration: what loads, what is refused, and how a mistake is reported."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import config_keys
from config import (
    Config,
    UserError,
    config_from_dict,
    differences,
    flatten,
    is_read,
    load_config,
    parse_layout,
    role_of,
    to_dict,
    to_yaml,
    validate_processes,
)
from models import build_model
from schema import Leaf, describe, leaves
from training.resume import changed_keys

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
MANUAL = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

OFFICIAL_B = """\
model:
  hnet:
    arch_layout: ["c2", ["D12"], "c2"]
    d_model: [768, 768]
    num_heads: [12, 12]
    enc_dec_dim_factor: [4, null]
    fp32_router_dechunk: true
training:
  multi_budget_training: true
  multi_budget_drop_fractions: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
  multi_budget_start_step: 50000
  downsample_factor: 4.0
  ratio_loss_weight: 0.03
data:
  feature_path: "../imagenet/features_train/"
  image_size: 256
"""

# Parameters with the table of positions: a frozen parameter in the official code, a buffer here.
OFFICIAL_SIZES = {"S": 34_760_457, "B": 137_129_481, "L": 469_612_553, "XL": 689_589_513}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refusal(function, *args) -> str:
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------- what loads


def test_defaults():
    config = load_config()
    assert config == Config()
    assert (config.latent_grid, config.d_model, config.encoder_width) == ((32, 32), 768, 768)
    assert config.model.hnet.arch_layout == ["c2", ["D12"], "c2"] and config.model.init == "adaln_zero"
    assert config.training.learning_rate == 1e-4 and config.training.ratio_batch_size == 16
    assert config.training.multi_budget_drop_fractions == [0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\ntraining:\ndata: {}\n"])
def test_missing_and_empty_sections_are_defaults(tmp_path, text):
    assert load_config(write(tmp_path, "a.yaml", text)) == Config()


def test_official_file_loads_unchanged(tmp_path):
    config = load_config(write(tmp_path, "DCDiT-B-N4.yaml", OFFICIAL_B))
    assert config.encoder_width == 192
    assert config.training.multi_budget_start_step == 50000
    assert config.data.feature_path == "../imagenet/features_train/"
    assert config.training.downsample_factor_start is None


def test_every_official_key_is_known():
    keys = {
        "model": "name mlp_ratio",
        "model.hnet": "arch_layout d_model num_heads tie_embeddings enc_dec_dim_factor dechunk_kernel_sigma "
        "fp32_router_dechunk",
        "training": "epochs global_batch_size learning_rate weight_decay ema_decay max_grad_norm "
        "gradient_accumulation_steps class_dropout_prob learn_sigma ratio_loss_weight ratio_batch_size "
        "downsample_factor downsample_factor_start downsample_factor_warmup_steps multi_budget_training "
        "multi_budget_drop_fractions multi_budget_start_step profile profile_steps resume_from_ckpt",
        "data": "feature_path image_size num_classes num_workers",
        "diffusion": "objective prediction flow_shift noise_schedule diffusion_steps",
        "logging": "results_dir log_every ckpt_every wandb_project",
    }
    known = {leaf.name for leaf in leaves(Config)}
    assert full_keys(keys) < known


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_files(file):
    config = load_config(file)
    with torch.device("meta"):
        model = build_model(config)
    name, _, rest = file.stem.partition("-")
    if name != "DCDiT":
        return
    size, factor, *pixels = rest.split("-")
    assert config.model.name == f"DC-DiT-{rest}"
    assert config.training.downsample_factor == float(factor[1:])
    assert (config.data.image_size, config.model.hnet.dechunk_kernel_sigma) == (
        (512, 2.0) if pixels else (256, 1.0)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == OFFICIAL_SIZES[size] - 32 * 32 * config.d_model


def test_inheritance(tmp_path):
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        "a.yaml",
        "training: {epochs: 7, seed: 1, multi_budget_drop_fractions: [0.1, 0.2]}\nckpt: x.pt\n",
    )
    write(tmp_path / "sub", "b.yaml", "_base_: ../a.yaml\ntraining: {seed: 2}\n")
    child = write(
        tmp_path,
        "c.yaml",
        f"_base_: {tmp_path}/sub/b.yaml\ntraining: {{multi_budget_drop_fractions: [0.5]}}\nckpt: null\n",
    )
    config = load_config(child)
    assert (config.training.epochs, config.training.seed, config.ckpt) == (7, 2, None)
    assert config.training.multi_budget_drop_fractions == [0.5]  # lists are replaced, not joined


def test_inheritance_cycles_are_named(tmp_path):
    itself = write(tmp_path, "a.yaml", "_base_: a.yaml\n")
    assert "a.yaml' inherits from itself" in refusal(load_config, itself)
    write(tmp_path, "b.yaml", "_base_: c.yaml\n")
    pair = write(tmp_path, "c.yaml", "_base_: b.yaml\n")
    message = refusal(load_config, pair)
    assert "_base_" in message and "c.yaml -> b.yaml" in message


def test_overrides():
    overrides = [
        "training.learning_rate=3e-4",
        "data.image_size=512",
        "model.hnet.d_model=[384, 384]",
        "model.hnet.num_heads=[6,6]",
        "training.max_steps=5",
        "training.max_steps=null",
        "ckpt=a=b.pt",
        "logging.trackers=[wandb]",
        "training.multi_budget_training=true",
    ]
    config = load_config(None, overrides)
    assert config.training.learning_rate == 3e-4 and config.training.max_steps is None
    assert config.data.image_size == 512 and config.d_model == 384
    assert (
        config.ckpt == "a=b.pt"
        and config.logging.trackers == ["wandb"]
        and config.training.multi_budget_training is True
    )


@pytest.mark.parametrize(
    "text, number", [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("'0.5'", 0.5), ("2", 2.0), ("1E+1", 10.0)]
)
def test_numbers_as_text(tmp_path, text, number):
    """YAML 1.1 reads 1e-4 as text; a learning rate is a number all the same."""
    value = load_config(
        write(tmp_path, "a.yaml", f"training: {{learning_rate: {text}}}\n")
    ).training.learning_rate
    assert type(value) is float and value == number


# What files of the official code may say, and the same in this repository's words.
OFFICIAL_SPELLINGS = [
    ("model.hnet.arch_layout=[C1, [D2], C1c2]", "model.hnet.arch_layout=[c1, [D2], c3]"),
    ("model.hnet.arch_layout=[c2, [D1D02d1], c2]", "model.hnet.arch_layout=[c2, [D3d1], c2]"),
    ("model.hnet.d_model=384", "model.hnet.d_model=[384, 384]"),
    ("model.hnet.num_heads=6", "model.hnet.num_heads=[6, 6]"),
    ("model.hnet.d_model=[768, 768, 768]", "model.hnet.d_model=[768, 768]"),
    ("model.hnet.num_heads=[12, 6, 6]", "model.hnet.num_heads=[12, 6]"),
    ("model.hnet.enc_dec_dim_factor=2", "model.hnet.enc_dec_dim_factor=[2, null]"),
    ("logging.trackers=null", "logging.trackers=[]"),
    ("training.frozen=None", "training.frozen=[]"),
    ("training.lr_scales=null", "training.lr_scales={}"),
    ("training.learning_rate='1e-4'", "training.learning_rate=1e-4"),
    ("training.learn_sigma=yes", "training.learn_sigma=true"),
    ("training.precision=no", "training.precision=fp32"),
    ("training.precision=bfloat16", "training.precision=bf16"),
    ("model.hnet.enc_dec_dim_factor=[2]", "model.hnet.enc_dec_dim_factor=[2, null]"),
    ("model.hnet.enc_dec_dim_factor=[2, 0, 1]", "model.hnet.enc_dec_dim_factor=[2, null]"),
    ("model.hnet.enc_dec_dim_factor=[]", "model.hnet.enc_dec_dim_factor=null"),
    ("model.hnet.enc_dec_dim_factor=[null, null]", "model.hnet.enc_dec_dim_factor=null"),
    ("model.hnet.enc_dec_dim_factor=[1, null]", "model.hnet.enc_dec_dim_factor=null"),
    ("model.hnet.tie_embeddings=true", "model.hnet.tie_embeddings=false"),
    ("model.hnet.tie_embeddings=maybe", "model.hnet.tie_embeddings=false"),
    ("training.downsample_factor=[4]", "training.downsample_factor=4"),
    ("training.downsample_factor=[4, 4]", "training.downsample_factor=4"),
    ("training.downsample_factor_start=[2]", "training.downsample_factor_start=2"),
    ("training.max_grad_norm=.inf", "training.max_grad_norm=null"),
    ("training.ratio_loss_weight=-0.5", "training.ratio_loss_weight=0"),
]


@pytest.mark.parametrize(
    "official, own", OFFICIAL_SPELLINGS, ids=[official for official, _ in OFFICIAL_SPELLINGS]
)
def test_official_spellings_have_one_form(official, own):
    """So that a checkpoint and a configuration that mean the same do not contradict each other."""
    config = load_config(None, [official])
    assert config == load_config(None, [own])
    assert config_from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.downsample_factor=1", "training.ratio_loss_weight=-1"],
        ["training.multi_budget_drop_fractions=[]"],
        ["training.profile_steps=[20, 10]"],
        ["training.profile_steps=[]"],
        ["training.class_dropout_prob=1.0"],
        ["model.patch_size=2", "training.downsample_factor=1"],
    ],
)
def test_values_without_an_effect_are_accepted(overrides):
    load_config(None, overrides)


@pytest.mark.parametrize("text", ["1e400", "Infinity", "inf", ".inf", "'.inf'", "+.inf", "1.0e+400", "null"])
def test_no_limit_on_gradients(tmp_path, text):
    file = write(tmp_path, "a.yaml", f"training: {{max_grad_norm: {text}}}\n")
    assert load_config(file).training.max_grad_norm is None
    assert load_config(None, [f"training.max_grad_norm={text}"]).training.max_grad_norm is None


# What a user may call a folder or a file
NAMES = [
    "/path/Q #1",
    "2024",
    "007",
    "1e3",
    "1.50",
    "on",
    "No",
    "a: b",
    "[a]",
    "{a}",
    "2024-01-01",
    "*x",
    "- a",
    "'s",
]


@pytest.mark.parametrize("name", [*NAMES, "null", "~"])
def test_a_text_on_the_command_line_is_taken_as_typed(name):
    assert load_config(None, [f"data.feature_path={name}"]).data.feature_path == name
    assert load_config(None, [f"data.feature_path= {name} "]).data.feature_path == name
    assert (
        load_config(None, [f"data.feature_path='{name.replace(chr(39), 2 * chr(39))}'"]).data.feature_path
        == name
    )


def test_null_on_the_command_line():
    """Where null is a value of its own, a file of this name needs quotes or a folder before it."""
    assert load_config(None, ["ckpt=a.pt", "ckpt=null"]).ckpt is None
    assert load_config(None, ["ckpt=a.pt", "ckpt="]).ckpt is None
    assert load_config(None, ["ckpt='null'"]).ckpt == "null"
    assert load_config(None, ["evaluation.reference=2024"]).evaluation.reference == "2024"
    assert "null is not text" in refusal(load_config, None, ["data.feature_path="])


@pytest.mark.parametrize(
    "name", ["2024", "007", "1e3", "1.50", "on", "No", "2024-01-01", "'a: b'", "'/path/Q #1'"]
)
def test_a_text_in_a_file_is_taken_as_written(tmp_path, name):
    file = write(tmp_path, "a.yaml", f"data:\n  feature_path: {name}  # a comment\nckpt: {name}\n")
    config = load_config(file)
    assert config.data.feature_path == config.ckpt == name.strip("'")
    assert load_config(write(tmp_path, "b.yaml", to_yaml(config))) == config


def test_a_text_with_a_colon_in_a_file(tmp_path):
    file = write(tmp_path, "a.yaml", "data:\n  feature_path: a: b\n")
    assert "a text with ': ' or ' #' needs quotes" in refusal(load_config, file)


def test_numbers_beside_texts_stay_numbers(tmp_path):
    """Also where both refer to one value."""
    file = write(tmp_path, "a.yaml", "_base_: 1\ndata: {image_size: &size 128, feature_path: *size}\n")
    write(tmp_path, "1", "training: {seed: 3}\n")
    config = load_config(file)
    assert (config.data.image_size, config.data.feature_path, config.training.seed) == (128, "128", 3)
    assert load_config(None, ["data={image_size: 64, feature_path: 64}"]).data.feature_path == "64"


# Values that only a key that is switched off has. `switch` turns it on
UNREAD_VALUES = [
    ("training.multi_budget_drop_fractions", ["null", "[1.0]", "[]", "{min: .5, max: .1}", "x"],
     ["model.patch_size=null", "training.multi_budget_training=true"]),
    ("training.multi_budget_start_step", ["-1", "x"],
     ["model.patch_size=null", "training.multi_budget_training=true"]),
    ("training.profile_steps", ["null", "[]", "[20, 10]", "7"], ["training.profile=true"]),
    ("training.ratio_batch_size", ["0"], ["model.patch_size=null", "training.ratio_loss_weight=0.1"]),
    ("training.epochs", ["null", "0"], ["training.max_steps=null"]),
    ("training.frozen_steps", ["null"], ["training.frozen=[router]"]),
    ("model.upcycle.scaffold", ["x"], ["training.init_from=a.pt"]),
    ("model.upcycle.router", ["x"], ["training.init_from=a.pt"]),
    ("model.hnet.enc_dec_dim_factor", ["[5, 7]"], ["model.patch_size=null"]),
    ("model.hnet.dechunk_kernel_sigma", ["-1"], ["model.patch_size=null"]),
    ("model.hnet.arch_layout", ["[D2]", "[D1, [D2], x]"], ["model.patch_size=null"]),
    ("model.hnet.d_model", ["[5, 768]"], ["model.patch_size=null"]),
    ("model.router", ["x"], ["model.patch_size=null"]),
    ("model.min_tokens", ["1", "5000"], ["model.patch_size=null"]),
    ("model.residual_projection", ["x"], ["model.patch_size=null"]),
    ("training.downsample_factor_points", ["x", "0:4,0:2", "0:1", "0:2,1001:3"],
     ["model.patch_size=null", "training.ratio_loss_weight=0.1"]),
    ("diffusion.flow_shift", ["0"], ["diffusion.objective=flow"]),
    ("logging.sample_cfg_scale", ["null"], ["logging.sample_every=1"]),
    ("logging.wandb_project.x", ["1"], ["logging.trackers=[wandb]"]),
    ("evaluation.num_samples", ["3"], ["evaluation.every=1", "evaluation.reference=a"]),
    ("evaluation.reference", ["null"], ["evaluation.every=1"]),
    ("evaluation.features.x", ["1"], ["evaluation.every=1", "evaluation.reference=a"]),
    ("evaluation.inception_weights.x", ["1"], ["evaluation.every=1", "evaluation.reference=a"]),
    ("evaluation.cfg_scale", ["0.5"], ["evaluation.every=1", "evaluation.reference=a"]),
    ("evaluation.num_sampling_steps", ["0"], ["evaluation.every=1", "evaluation.reference=a"]),
    ("evaluation.batch_size", ["0"], ["evaluation.every=1", "evaluation.reference=a"]),
]  # fmt: skip
OFF = ["training.max_steps=10", "training.ratio_loss_weight=0", "model.patch_size=2"]


@pytest.mark.parametrize("key, values, on", UNREAD_VALUES, ids=[key for key, *_ in UNREAD_VALUES])
def test_a_key_that_is_not_read_is_not_checked(key, values, on):
    for value in values:
        config = load_config(None, [*OFF, f"{key}={value}"])
        assert config_from_dict(to_dict(config)) == config
        assert key.removesuffix(".x") in refusal(load_config, None, [*OFF, f"{key}={value}", *on])


def test_every_key_that_is_switched_off_is_tried():
    off = load_config(None, OFF)
    unread = {leaf.name for leaf in leaves(Config) if not is_read(off, leaf.name)}
    # Of these two, a static DiT reads one entry
    assert {key.removesuffix(".x") for key, *_ in UNREAD_VALUES} == unread | {
        "model.hnet.arch_layout",
        "model.hnet.d_model",
    }


def test_an_unread_key_is_no_reason_to_refuse_a_resumed_run():
    config = load_config(None, ["training.multi_budget_drop_fractions=[0.5]", "training.frozen_steps=3"])
    assert changed_keys(config, to_dict(Config())) == []
    multi_budget = load_config(None, ["training.multi_budget_training=true"])
    keys = ["training.multi_budget_drop_fractions", "training.multi_budget_training"]
    assert changed_keys(config, to_dict(multi_budget)) == keys


def test_an_objective_of_the_user_may_read_the_shift():
    config_keys.OBJECTIVES.append("mine")
    try:
        config = load_config(None, ["diffusion.objective=mine", "diffusion.flow_shift=3"])
        other = load_config(None, ["diffusion.objective=mine"])
        assert changed_keys(config, to_dict(other)) == ["diffusion.flow_shift"]
        refusal(load_config, None, ["diffusion.objective=mine", "diffusion.flow_shift=x"])
    finally:
        config_keys.OBJECTIVES.remove("mine")


def test_an_unread_key_keeps_a_value_that_could_be_read():
    config = load_config(
        None, ["training.multi_budget_drop_fractions=[0.5]", "training.profile_steps=[3, 4]"]
    )
    assert config.training.multi_budget_drop_fractions == [0.5] and config.training.profile_steps == [3, 4]


def test_round_trip(tmp_path):
    overrides = ["training.downsample_factor_start=2", "diffusion.cfg_channels=all"]
    config = load_config(CONFIGS / "DCDiT-XL-N16-512.yaml", overrides)
    assert config_from_dict(to_dict(config)) == config
    assert load_config(write(tmp_path, "a.yaml", to_yaml(config))) == config
    assert differences(to_dict(config), to_dict(config)) == []
    other = config_from_dict(to_dict(config), ["training.seed=3", "model.hnet.dechunk_kernel_sigma=1"])
    assert differences(to_dict(config), to_dict(other)) == [
        "model.hnet.dechunk_kernel_sigma",
        "training.seed",
    ]


def test_a_config_does_not_share_lists_with_another():
    Config().training.multi_budget_drop_fractions.append(0.9)
    assert Config().training.multi_budget_drop_fractions == [0, 0.1, 0.2, 0.3]


def test_layouts():
    assert parse_layout(["c2", ["D12"], "c3"]) == (2, "D" * 12, 3)
    assert parse_layout(["c1c1", ["d1D2d1"], "c1"]) == (2, "dDDd", 1)


# ------------------------------------------------------------------------------------------------------ roles

FREE = {
    "training": "epochs max_steps deterministic compile profile profile_steps resume_from_ckpt init_from "
    "max_skipped_steps rank_timeout",
    "data": "feature_path num_workers vae",
    "logging": "results_dir log_every ckpt_every ckpt_keep sample_every sample_cfg_scale trackers "
    "wandb_project",
    "evaluation": "every num_samples reference features inception_weights cfg_scale num_sampling_steps "
    "batch_size",
}
MUST_AGREE = {
    "model": "mlp_ratio min_tokens patch_size residual_projection router timestep_divisor",
    "model.hnet": "arch_layout d_model num_heads tie_embeddings enc_dec_dim_factor dechunk_kernel_sigma "
    "fp32_router_dechunk",
    "training": "class_dropout_prob learn_sigma",
    "data": "image_size num_classes latent_stride latent_channels conditions",
    "diffusion": "objective prediction flow_shift noise_schedule diffusion_steps",
}


def full_keys(names_of: dict[str, str]) -> set[str]:
    return {f"{section}.{name}" for section, names in names_of.items() for name in names.split()}


def keys_with_role(*roles: str) -> set[str]:
    defaults = to_dict(Config())
    # An empty mapping would have no key of its own
    defaults["training"]["lr_scales"] = None
    defaults["training"]["terms"] = None
    defaults["training"]["averages"] = None
    defaults["data"]["conditions"] = None
    return {key for key in flatten(defaults) if role_of(key) in roles}


def test_free_keys_are_those_that_a_resumed_run_may_change():
    assert keys_with_role("free") == full_keys(FREE) | {"ckpt"}


def test_network_and_process_are_what_sampling_must_share_with_the_checkpoint():
    assert keys_with_role("network", "process") == full_keys(MUST_AGREE)


def test_the_other_keys_shape_the_course_of_training():
    named = full_keys(FREE) | full_keys(MUST_AGREE) | {"ckpt"}
    others = keys_with_role("network", "process", "training", "free") - named
    assert keys_with_role("training") == others
    assert len(others) == 34


def test_keys_of_the_network_are_those_that_change_its_tensors():
    small = [
        "model.hnet.arch_layout=[c1,[D1],c1]",
        "model.hnet.d_model=[64,64]",
        "model.hnet.num_heads=[1,1]",
    ]
    changes = {
        "model.mlp_ratio": "2",
        "model.patch_size": "2",
        "model.router": "hnet",
        "model.residual_projection": "false",
        "model.hnet.arch_layout": "[c1,[D2],c1]",
        "model.hnet.d_model": "[128,128]",
        "model.hnet.enc_dec_dim_factor": "[2,null]",
        "training.class_dropout_prob": "0",
        "training.learn_sigma": "false",
        "data.image_size": "128",
        "data.num_classes": "7",
        "data.latent_stride": "16",
        "data.latent_channels": "8",
        "data.conditions": "{score: scalar}",
    }
    assert keys_with_role("network") == set(changes)
    process = {
        "model.timestep_divisor": "127",
        "model.min_tokens": "9",
        "model.hnet.num_heads": "[2,2]",
        "model.hnet.dechunk_kernel_sigma": "2",
        "model.hnet.fp32_router_dechunk": "false",
    }
    shapes = tensor_shapes(load_config(None, small))
    for key, value in changes.items():
        assert tensor_shapes(load_config(None, [*small, f"{key}={value}"])) != shapes, key
    for key, value in process.items():
        assert tensor_shapes(load_config(None, [*small, f"{key}={value}"])) == shapes, key


def tensor_shapes(config: Config) -> dict[str, tuple]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}


def test_keys_below_a_field_have_its_role():
    assert role_of("training.lr_scales.decoder.blocks") == "training"
    assert role_of("training.multi_budget_drop_fractions.min") == "training"
    with pytest.raises(KeyError):
        role_of("training.no_such_key")


# ------------------------------------------------------------------------------------------------- the manual


def manual_row(leaf: Leaf) -> str:
    """What docs/configuration.md says of a key, made of its type, default, role and meaning."""
    default = yaml.safe_dump(leaf.field.default_factory(), default_flow_style=True)
    value = default.splitlines()[0]  # YAML ends a single value with a line of dots
    kind = describe(leaf.hint).removeprefix("a ").replace("finite ", "")
    return f"| `{leaf.name}` | {kind} | `{value}` | {role_of(leaf.name)} | {leaf.field.metadata['meaning']} |"


def test_the_manual_has_every_key_in_order():
    rows = [line for line in MANUAL.split("## Keys")[1].splitlines() if line.startswith("| `")]
    assert rows == [manual_row(leaf) for leaf in leaves(Config)]


def test_the_manual_has_every_shipped_file():
    names = set()
    for pattern in re.findall(r"\| `([A-Za-z]+[^ ]*\.yaml)` \|", MANUAL):
        names |= {file.name for file in CONFIGS.glob("*.yaml") if matches(pattern, file.name)}
    assert names == {file.name for file in CONFIGS.glob("*.yaml")}


def matches(pattern: str, name: str) -> bool:
    """`DiT-{S,B}-{2,4}.yaml` matches DiT-S-4.yaml: braces hold alternatives, a star anything."""
    expression = (
        re.escape(pattern).replace(r"\{", "(").replace(r"\}", ")").replace(",", "|").replace(r"\*", "[^-]*")
    )
    return re.fullmatch(expression, name) is not None


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_the_manual_has_the_sizes_of_the_shipped_files(size):
    config = load_config(CONFIGS / f"DCDiT-{size}-N4.yaml")
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in build_model(config).parameters()) / 1e6
    blocks = len(parse_layout(config.model.hnet.arch_layout).main_blocks)
    shape = f"{config.d_model} / {blocks} / {config.model.hnet.num_heads[1]}"
    assert f"| `DCDiT-{size}-{{N4,N16}}.yaml` | {shape} | {millions:.1f} M |" in MANUAL


# -------------------------------------------------------------------------------------------- what is refused

MISTAKES = [
    # unknown keys
    ("training: {learning_rates: 1}",
     "unknown key 'training.learning_rates'; did you mean 'training.learning_rate'?"),
    ("training: {epoch: 1}", "did you mean 'training.epochs'?"),
    ("model: {hnet: {dmodel: [1, 1]}}", "did you mean 'model.hnet.d_model'?"),
    ("trainings: {}", "unknown key 'trainings'; did you mean 'training'?"),
    ("zzz: 1", "unknown key 'zzz'; known keys: model, training, data, diffusion, logging, evaluation, ckpt"),
    ("1: 2", "unknown key '1'"),
    # wrong types
    ("training: {learn_sigma: 'false'}", "training.learn_sigma: 'false' is not true or false"),
    ("training: {learn_sigma: 0}", "training.learn_sigma: 0 is not true or false"),
    ("training: {epochs: 1.5}", "training.epochs: 1.5 is not a whole number"),
    ("training: {epochs: '3'}", "training.epochs: '3' is not a whole number"),
    ("training: {epochs: true}", "training.epochs: true is not a whole number"),
    ("training: {epochs: null}", "training.epochs: null is not a whole number"),
    ("training: {learning_rate: fast}", "training.learning_rate: 'fast' is not a finite number"),
    ("training: {learning_rate: true}", "training.learning_rate: true is not a finite number"),
    ("training: {learning_rate: .inf}", "training.learning_rate: inf is not a finite number"),
    ("training: {weight_decay: .nan}", "training.weight_decay: nan is not a finite number"),
    ("training: {max_grad_norm: 0}",
     "training.max_grad_norm: 0.0 must be greater than 0; try null for no limit"),
    ("training: {max_grad_norm: .nan}", "training.max_grad_norm: nan is not a finite number"),
    (f"training: {{learning_rate: 1{'0' * 400}}}", "is not a finite number"),
    ("training: {downsample_factor: [x]}", "training.downsample_factor: 'x' is not a finite number"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: 0.5}",
     "training.multi_budget_drop_fractions: 0.5 is not a list"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: [0, x]}",
     "training.multi_budget_drop_fractions[1]: 'x' is not a finite number"),
    ("data: {feature_path: null}", "data.feature_path: null is not text; a name needs quotes: 'null'"),
    ("data: {feature_path: [a]}", "data.feature_path: [a] is not text"),
    ("model: {hnet: 3}", "section 'model.hnet' must hold 'key: value' lines, not int 3"),
    ("training: [1]", "section 'training' must hold 'key: value' lines, not list"),
    ("- 1\n", "must hold 'key: value' lines, not list"),
    ("just text", "must hold 'key: value' lines, not str"),
    ("ckpt: [3]", "ckpt: [3] is not text or null"),
    # YAML itself
    ("a: [1", "is not valid YAML"),
    ("training: {seed: 1, seed: 2}", "key 'seed' is given twice (line 1); remove one"),
    ("ckpt: a\nckpt: b", "key 'ckpt' is given twice"),
    ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("_base_: [a.yaml]", "_base_: ['a.yaml'] in"),
    ("_base_: nowhere.yaml", "nowhere.yaml' cannot be read (No such file or directory)"),
    # layouts
    ("model: {hnet: {arch_layout: [D12]}}",
     "try [c2, [D12], c2], with model.patch_size 1 for a DiT without chunking"),
    ("model: {hnet: {arch_layout: [[D12]]}}",
     "must be [encoder, [main network], decoder]; try [c2, [D12], c2]"),
    ("model: {hnet: {arch_layout: []}}", "must be [encoder, [main network], decoder]; try [c2, [D12], c2]"),
    ("model: {hnet: {arch_layout: [c2, D12, c2]}}",
     "must be [encoder, [main network], decoder]; try [c2, [D12], c2]"),
    ("model: {hnet: {arch_layout: [c2, [], c2]}}",
     "has [] for a main network, which must be one string such as [D12]; try [c2, [D12], c2]"),
    ("model: {hnet: {arch_layout: [c2, [c2, [D12], c2], c2]}}",
     "has more than one chunking stage, and only one is supported; try [c2, [D12], c2]"),
    ("model: {hnet: {arch_layout: [c2, [m4], c2]}}",
     "has 'm4' in the main network; only D<number> and d<number> are blocks; try [c2, [D4], c2]"),
    ("model: {hnet: {arch_layout: [c2, [12D], c2]}}", "has '12D' in the main network; only"),
    ("model: {hnet: {arch_layout: [c2, [D], c2]}}", "has 'D' in the main network; only"),
    ("model: {hnet: {arch_layout: [c2, [D2x3], c2]}}",
     "has 'D2x3' in the main network, which the official code reads as D2; only"),
    ("model: {hnet: {arch_layout: [c2, [t2], c2]}}", "has 't2' in the main network; only"),
    ("model: {hnet: {arch_layout: [c2, [D2m4], c2]}}",
     "has 'D2m4' in the main network, which the official code reads as D2; only"),
    ("model: {hnet: {arch_layout: [D2, [D2], c2]}}",
     "has D2 in the encoder; transformer blocks stand in the main network only; try [c2, [D2], c2]"),
    ("model: {hnet: {arch_layout: [c2, [D2], d1]}}", "transformer blocks stand in the main network only"),
    ("model: {hnet: {arch_layout: [c2, [c2], c2]}}",
     "has c2 in the main network; convolutions stand in the encoder and the decoder only; try [c2, [D2], c2]"),
    ("model: {hnet: {arch_layout: [c0, [D2], c2]}}",
     "has no blocks in the encoder ('c0'); try [c1, [D2], c2]"),
    ("model: {hnet: {arch_layout: [c2, [2], c2]}}",
     "has 2 in the main network, which is not text such as D2; try [c2, [D2], c2]"),
    # widths
    ("model: {hnet: {d_model: [100, 100]}}",
     "model.hnet.d_model: 100 is not a multiple of 32, which the GroupNorms need"),
    ("model: {hnet: {enc_dec_dim_factor: [5, null]}}",
     "enc_dec_dim_factor: 5 makes the encoder 153 wide, which is not a multiple of 32 as the GroupNorms need"),
    ("model: {hnet: {enc_dec_dim_factor: [4, 2]}}",
     "[4, 2] reduces the main network, which cannot work; try [4, null]"),
    ("model: {hnet: {enc_dec_dim_factor: [-4, null]}}",
     "model.hnet.enc_dec_dim_factor[0]: -4 must be greater than 0"),
    ("model: {hnet: {num_heads: [7, 7]}}", "model.hnet.num_heads: 7 does not divide d_model 768"),
    ("model: {hnet: {num_heads: [12, 0]}}", "model.hnet.num_heads[1]: 0 must be greater than 0"),
    ("model: {hnet: {num_heads: []}}", "model.hnet.num_heads: [] must be 2 entries long"),
    ("model: {hnet: {d_model: []}}", "model.hnet.d_model: [] must be 2 entries long"),
    ("model: {hnet: {d_model: [384, 768]}}", "must be equal at both entries; try [768, 768]"),
    ("model: {hnet: {d_model: [768, 768, 512]}}",
     "has entries for more than one chunking stage, and only one is supported; try [768, 768]"),
    ("model: {hnet: {dechunk_kernel_sigma: -1}}",
     "model.hnet.dechunk_kernel_sigma: -1.0 must be at least 0"),
    ("model: {init: zero}", "model.init: 'zero' is not one of adaln_zero, released"),
    ("model: {attention: xformers}", "model.attention: 'xformers' is not one of auto, flash, varlen, sdpa"),
    ("model: {mlp_ratio: 0}", "model.mlp_ratio: 0.0 must be greater than 0"),
    # training
    ("training: {downsample_factor: 1}", "training.downsample_factor: 1.0 must be greater than 1"),
    ("training: {downsample_factor: 1, ratio_loss_weight: 0, init_from: a.pt}", "must be greater than 1"),
    ("training: {downsample_factor: 0.5}", "must be at least 1"),
    ("training: {downsample_factor: []}", "training.downsample_factor: [] is not a finite number"),
    ("training: {downsample_factor: [4, 8]}",
     "training.downsample_factor: [4, 8] has numbers for more than one chunking stage"),
    ("training: {downsample_factor_start: 1}",
     "training.downsample_factor_start: 1.0 must be greater than 1"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: []}",
     "training.multi_budget_drop_fractions: [] has no fraction to draw"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: [0, 1]}",
     "multi_budget_drop_fractions[1]: 1.0 must be in [0, 1)"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: [-0.1]}",
     "-0.1 must be in [0, 1)"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: {min: 0.1}}",
     "(in [0, 1)) or {min, max}"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: {min: 0.1, mx: 0.2}}",
     "unknown key 'training.multi_budget_drop_fractions.mx'"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: {min: 0, max: 1}}",
     "1.0 must be in [0, 1)"),
    ("training: {multi_budget_training: true, multi_budget_drop_fractions: {min: 0.3, max: 0.2}}",
     "min 0.3 is above max 0.2; exchange them"),
    ("training: {class_dropout_prob: 1.1}", "training.class_dropout_prob: 1.1 must be in [0, 1]"),
    ("training: {ema_decay: 1}", "at 1 the EMA would keep the first weights for ever; try 0.9999"),
    ("training: {ema_decay: 1.5}", "training.ema_decay: 1.5 must be in [0, 1)"),
    ("training: {epochs: 0}", "training.epochs: 0 must be greater than 0"),
    ("training: {max_steps: 0}", "training.max_steps: 0 must be greater than 0"),
    ("training: {ratio_batch_size: 0}", "training.ratio_batch_size: 0 must be greater than 0"),
    ("training: {learning_rate: -1}", "training.learning_rate: -1.0 must be greater than 0"),
    ("training: {seed: -1}", "training.seed: -1 must be at least 0"),
    ("training: {seed: 9223372036854775808}", "training.seed: 9223372036854775808 must be below 2**63"),
    ("training: {profile: true, profile_steps: []}", "training.profile_steps: [] must be [first, last]"),
    ("training: {profile: true, profile_steps: [5, 2]}", "must be [first, last] with 1 <= first <= last"),
    # data, diffusion, logging
    ("data: {image_size: 250}", "data.image_size: 250 must be a multiple of data.latent_stride (8)"),
    ("data: {image_size: 250}", "try 248"),
    ("data: {image_size: 8}", "hold at least 2 latent cells; try 16"),
    ("{data: {latent_stride: 0}, model: {patch_size: 2}}", "data.latent_stride: 0 must be greater than 0"),
    ("data: {image_size: 0}", "data.image_size: 0 must be greater than 0"),
    ("data: {num_classes: 0}", "data.num_classes: 0 must be greater than 0"),
    ("data: {num_workers: -1}", "data.num_workers: -1 must be at least 0"),
    ("diffusion: {noise_schedule: cosine}",
     "diffusion.noise_schedule: 'cosine' is not one of linear, squaredcos_cap_v2"),
    ("diffusion: {diffusion_steps: 0}", "diffusion.diffusion_steps: 0 must be greater than 0"),
    ("diffusion: {diffusion_steps: 10}",
     "diffusion.diffusion_steps: 10 puts a beta of the linear schedule at 1 or above"),
    ("diffusion: {cfg_channels: 5}", "diffusion.cfg_channels: 5 must be 'all' or a number from 1 to 4"),
    ("diffusion: {cfg_channels: some}",
     "diffusion.cfg_channels: 'some' is not a whole number (greater than 0) or all"),
    ("logging: {log_every: 0}", "logging.log_every: 0 must be greater than 0"),
    ("logging: {ckpt_keep: -1}", "logging.ckpt_keep: -1 must be at least 0"),
    ("logging: {sample_every: 1, sample_cfg_scale: 0.5}", "logging.sample_cfg_scale: 0.5 must be at least 1, or 0"),
    ("evaluation: {every: 10}", "evaluation.reference: is needed with evaluation.every"),
    ("evaluation: {every: 1, reference: a, num_samples: 3}", "evaluation.num_samples: 3 must be at least 4"),
    ("evaluation: {every: 1, reference: a, cfg_scale: 0.5}", "evaluation.cfg_scale: 0.5 must be at least 1"),
    ("evaluation: {every: 1, reference: a, batch_size: 0}", "evaluation.batch_size: 0 must be greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize("text, part", MISTAKES, ids=[text[:60] for text, _ in MISTAKES])
def test_mistakes(tmp_path, text, part):
    assert part in refusal(load_config, write(tmp_path, "a.yaml", text))


# More values that are refused with a suggestion
TYPED = [
    # Layouts
    *[f"model.hnet.arch_layout={text}" for text in (
        "[D2]", "[c2]", "[m4]", "[D2m4]", "[12D]", "[[D12]]", "[c2, [D12]]", "[c2, D12, c2]", "[c2, [D2, d2], c2]",
        "[c2, [c2, [D12], c2], c2]", "[c2, [D2, [d1, [D12], d1], D2], c2]", "[D1, [D2], C1]", "[c1m2, [D2], c1]",
        "[c1, [D2m4], c1]", "[c1, ['D2 d1'], c1]", "[c1, [c2], c1]", "[c1, [C2D2], d1]", "[c0, [D0], c0]",
        "[c1, [D0d0], c1]", "[c1, [D1000], c1]", "[c2000, [D1], c1]", "[null, [null], {}]", "[c1, [[]], c1]",
        "c2,D12,c2", "D12", "12", "null", "[]", "[3, [4], 5]", "[c1, [T4], c1]", "[c, [D], c]", "{a: 1}",
    )],
    # Widths
    "model.hnet.d_model=100", "model.hnet.d_model=384,384", "model.hnet.d_model=[384, 100]",
    "model.hnet.d_model=[100, 100]", "model.hnet.d_model=[384, 768, 100]",
    "model.hnet.num_heads=7", "model.hnet.num_heads=[7, 7]", "model.hnet.num_heads=[2, 7]",
    "model.hnet.num_heads=[12, 12, 6]", "model.hnet.num_heads=[12, 5000]",
    "model.hnet.enc_dec_dim_factor=[4, 2]", "model.hnet.enc_dec_dim_factor=[null, 2]",
    "model.hnet.enc_dec_dim_factor=[5, null]", "model.hnet.enc_dec_dim_factor=[5000]",
    # Numbers, switches and words
    "training.epochs=1e2", "training.epochs=80.0", "training.max_steps='5'", "training.learn_sigma='yes'",
    "training.learn_sigma=0", "training.learn_sigma='False'", "training.precision=BF16", "model.init=RELEASED",
    "training.ema_decay=1.0", "training.max_grad_norm=0", "training.max_grad_norm=-1",
    "training.downsample_factor=[4, 8]", "training.downsample_factor=[1, 8]", "training.downsample_factor=[x, y]",
    "data.image_size=250", "data.image_size=8", "data.image_size=1", "diffusion.diffusion_steps=10",
    "diffusion.cfg_channels=ALL", "diffusion.cfg_channels='3'",
    "training.max_steps=None", "training.ratio_batch_size=none", "training.max_grad_norm=None",
    # Lists
    "logging.trackers=wandb", "training.frozen=router",
]  # fmt: skip
TYPED_TOGETHER = [
    ("model.patch_size=3", []),
    ("model.patch_size=2", ["data.image_size=264"]),
    ("data.image_size=250", ["model.patch_size=4"]),
    ("model.hnet.d_model=[770, 770]", ["model.hnet.num_heads=[7, 7]"]),
    ("model.hnet.d_model=[770, 770]", ["model.hnet.enc_dec_dim_factor=[4]"]),
    ("model.hnet.d_model=[770, 770]", ["model.patch_size=2"]),
    ("training.multi_budget_drop_fractions=0.2,0.4", ["training.multi_budget_training=true"]),
    ("training.multi_budget_drop_fractions=0.2", ["training.multi_budget_training=true"]),
    ("training.multi_budget_drop_fractions=[]", ["training.multi_budget_training=true"]),
    ("training.multi_budget_drop_fractions={min: .5, max: .1}", ["training.multi_budget_training=true"]),
    ("training.profile_steps=10,20", ["training.profile=true"]),
]


def suggestion(message: str) -> str | None:
    """What a message proposes to type in place of the value."""
    _, is_there, rest = message.partition("; try ")
    return re.split(", or |, with | for ", rest)[0] if is_there else None


@pytest.mark.parametrize("override, others", [*[(typed, []) for typed in TYPED], *TYPED_TOGETHER])
def test_every_suggestion_works(override, others):
    message = refusal(load_config, None, [*others, override])
    proposed = suggestion(message)
    assert proposed, message
    load_config(None, [*others, f"{override.partition('=')[0]}={proposed}"])


@pytest.mark.parametrize("text", [text for text, _ in MISTAKES])
def test_every_suggestion_for_a_file_works(tmp_path, text):
    file = write(tmp_path, "a.yaml", text)
    message = refusal(load_config, file)
    proposed = suggestion(message)
    key = message.partition(":")[0]
    if proposed and "[" not in key:
        load_config(file, [f"{key}={proposed}"])


@pytest.mark.parametrize(
    "override, part",
    [
        ("training.epochs", "--set 'training.epochs' must have the form section.key=value"),
        ("=3", "--set '=3' must have the form section.key=value"),
        ("training.epochs=[1", "--set 'training.epochs=[1': '[1' is not a valid YAML value"),
        ("training.epoch=3", "unknown key 'training.epoch'; did you mean 'training.epochs'?"),
        ("training.lr=1e-4", "unknown key 'training.lr'; did you mean 'training.learning_rate'?"),
        ("training.batch_size=8", "did you mean 'training.global_batch_size'?"),
        ("training.learn_sigma=y", "training.learn_sigma: 'y' is not true or false; try true"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'training.epochs'?"),
        ("model.d_model=[64, 64]", "unknown key 'model.d_model'; did you mean 'model.hnet.d_model'?"),
        ("training=3", "section 'training' must hold"),
        ("training.epochs.x=3", "training.epochs: {x: 3} is not a whole number"),
        ("training.learn_sigma=no way", "is not true or false"),
    ],
)
def test_bad_overrides(override, part):
    assert part in refusal(load_config, None, [override])


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(load_config, tmp_path / "nothing.yaml")
    assert "cannot be read" in refusal(load_config, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "is not valid YAML" in refusal(load_config, tmp_path / "binary.yaml")


def test_batches_and_processes():
    config = load_config(None, ["training.global_batch_size=96", "training.ratio_batch_size=16"])
    assert [validate_processes(config, n) for n in (1, 2, 3, 6)] == [96, 48, 32, 16]
    message = refusal(validate_processes, config, 5)
    assert "training.global_batch_size: 96 is not a multiple of the 5 processes; try 100" in message
    message = refusal(validate_processes, config, 4)
    assert (
        "training.ratio_batch_size: 16 does not divide the local batch of 24" in message
        and "try 12" in message
    )
    for harmless in ("training.ratio_batch_size=null", "training.ratio_loss_weight=0"):
        assert validate_processes(config_from_dict(to_dict(config), [harmless]), 4) == 24


def test_targets_by_timestep_need_groups():
    points = "training.downsample_factor_points=0:2,1000:8"
    changes = [points, "training.global_batch_size=64", "training.ratio_batch_size=16"]
    config = load_config(None, changes)
    assert validate_processes(config, 2) == 32
    assert "set training.ratio_batch_size to 2" in refusal(validate_processes, config, 4)
    without_groups = load_config(None, [*changes, "training.ratio_batch_size=null"])
    assert "set training.ratio_batch_size to 8" in refusal(validate_processes, without_groups, 1)


def test_a_file_without_its_ending(tmp_path):
    write(tmp_path, "a.yaml", "data: {image_size: 128}\n")
    assert f"did you mean '{tmp_path / 'a.yaml'}'?" in refusal(load_config, tmp_path / "a")
