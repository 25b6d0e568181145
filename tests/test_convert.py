"""Foreign weights: equal outputs, configurations that fit, and files that try to run code."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import config as configuration
import config_keys
import train
from config import UserError, config_from_dict, load_config, one_line, to_dict, to_yaml
from models import build_model
from sampling.generate import SamplingOptions, generate_images, load_trained
from weights import convert, foreign
from weights.checkpoint import load_checkpoint, save_checkpoint, save_weights
from weights.untrusted import Refused, read_untrusted

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "one_stage.safetensors"


def converted(source, output, *options) -> dict:
    convert.main([str(source), str(output), *options])
    return load_checkpoint(output)


def loaded_model(state: dict) -> torch.nn.Module:
    model = build_model(config_from_dict(state["config"]))
    model.load_state_dict(state["ema"])
    return model.eval()


# -------------------------------------------------------------------------------------------------------- DiT


@pytest.fixture(scope="module")
def diffusers_dit(tmp_path_factory):
    """A small random DiTTransformer2DModel and its folder; all blocks have one embedding, as in trained ones."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    folder = tmp_path_factory.mktemp("diffusers") / "dit"
    model.save_pretrained(folder / "transformer", safe_serialization=True)
    return model, folder


def dit_inputs():
    return torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 9, 10])


@pytest.mark.parametrize("folder", ["", "transformer"], ids=["pipeline", "model"])
def test_diffusers(diffusers_dit, tmp_path, folder):
    diffusers_model, source = diffusers_dit
    model = loaded_model(converted(source / folder, tmp_path / "dit.safetensors"))
    x, t, labels = dit_inputs()
    with torch.no_grad():
        expected = diffusers_model(x, timestep=t, class_labels=labels).sample
        torch.testing.assert_close(model(x, t, labels).prediction, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_diffusers_spaces_its_timesteps_differently(diffusers_dit, tmp_path):
    """The published DiT divides by 128; which of the two a model was trained with is the user's to say."""
    state = converted(diffusers_dit[1], tmp_path / "dit.safetensors")
    assert state["config"]["model"]["timestep_divisor"] == 127
    other = converted(diffusers_dit[1], tmp_path / "dit.safetensors", "--set", "model.timestep_divisor=128")
    inputs = dit_inputs()
    difference = (loaded_model(state)(*inputs).prediction - loaded_model(other)(*inputs).prediction).abs()
    assert difference[0].max() < 1e-6 and difference[2].max() > 1e-4


def test_the_configuration_of_diffusers_weights_can_be_given(diffusers_dit, tmp_path):
    """It replaces what the shapes and config.json tell."""
    first = converted(diffusers_dit[1], tmp_path / "dit.safetensors")
    config = config_from_dict(first["config"], ["model.name=given"])
    (tmp_path / "given.yaml").write_text(to_yaml(config))
    state = converted(
        diffusers_dit[1], tmp_path / "dit.safetensors", "--config", str(tmp_path / "given.yaml")
    )
    assert state["config"] == to_dict(config)
    assert_same_weights(state["ema"], first["ema"])


def published_names(state: dict) -> dict:
    """The tensors of a DiT under the names of the published checkpoints."""
    published_parts = {"x_embedder.": "x_embedder.proj.", "y_embedder.table.": "y_embedder.embedding_table."}
    renamed = {}
    for name, tensor in state.items():
        for part, published in published_parts.items():
            name = name.replace(part, published)
        renamed[name] = tensor[None] if name == "pos_embed" else tensor
    return renamed


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "with ema"])
def test_official_dit(tmp_path, wrapped):
    """A checkpoint of a published width tells its whole configuration."""
    config = load_config(ROOT / "configs" / "DiT-S-4.yaml", ["model.hnet.arch_layout=[c2,[D2],c2]"])
    model = build_model(config)
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    published = published_names(weights)
    some_names = {
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "t_embedder.mlp.2.weight",
        "blocks.1.attn.qkv.bias",
        "blocks.0.mlp.fc1.weight",
        "final_layer.adaLN_modulation.1.bias",
        "final_layer.linear.weight",
    }
    assert some_names < published.keys()
    torch.save({"ema": published, "opt": {}} if wrapped else published, tmp_path / "DiT.pt")
    state = converted(tmp_path / "DiT.pt", tmp_path / "DiT.safetensors")
    assert_same_weights(state["ema"], weights)
    found = config_from_dict(state["config"])
    assert found.latent_grid == (32, 32)
    assert found.token_grid == (8, 8)
    assert found.model.hnet.num_heads == [6, 6]
    assert found.model.mlp_ratio == 4.0
    assert found.model.timestep_divisor == 128
    assert found.training.learn_sigma is True
    assert found.data.num_classes == 1000


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ----------------------------------------------------------------------------------------------------- DC-DiT


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A checkpoint as the official code writes it, with a pickled `config.Config`."""
    ema = {}
    with safe_open(GOLDEN, "pt") as file:
        about = file.metadata()
        for key in file.keys():  # noqa: SIM118
            if key.startswith("state."):
                ema[key.removeprefix("state.")] = file.get_tensor(key)
    config = config_from_dict(
        {
            "model": {"hnet": json.loads(about["hnet"]), "mlp_ratio": float(about["mlp_ratio"])},
            "training": {"learn_sigma": json.loads(about["learn_sigma"].lower())},
            "data": {"image_size": int(about["input_size"]) * 8, "num_classes": int(about["num_classes"])},
        }
    )
    state = {
        "model": {name: tensor + 1 for name, tensor in ema.items()},
        "ema": ema,
        "opt": {"state": {}},
        "config": config,
    }
    path = tmp_path_factory.mktemp("official") / "0400000.pt"
    with pytest.MonkeyPatch.context() as patch:
        # The official classes live in a module `config`
        for section in vars(config_keys).values():
            if dataclasses.is_dataclass(section):
                patch.setattr(section, "__module__", "config")
                patch.setattr(configuration, section.__name__, section, raising=False)
        torch.save(state, path)
    return path


def test_official_dc_dit(official, tmp_path):
    plain = read_untrusted(official)["config"]
    assert type(plain) is dict and type(plain["model"]["hnet"]) is dict  # not the class that was pickled
    state = converted(official, tmp_path / "ours.safetensors")
    with safe_open(GOLDEN, "pt") as file:
        x, t, labels, want = (file.get_tensor(name) for name in ("in.x", "in.t", "in.y", "out.model"))
    with torch.no_grad():
        torch.testing.assert_close(loaded_model(state)(x, t, labels).prediction, want, atol=1e-5, rtol=1e-5)
    raw = converted(official, tmp_path / "raw.safetensors", "--weights", "model")
    assert torch.equal(raw["ema"]["norm.weight"], state["ema"]["norm.weight"] + 1)


def test_a_configuration_that_is_refused_can_be_replaced(official, tmp_path):
    """A key that a fork of the official code has added, or a value that this code refuses."""
    state = read_untrusted(official)
    plain = config_from_dict(state["config"])
    (tmp_path / "given.yaml").write_text(to_yaml(plain))
    changes = {"new_key": 3, "ema_decay": 1.0}
    for key, value in changes.items():
        config = to_dict(plain)
        config["training"][key] = value
        torch.save({**state, "config": config}, tmp_path / "fork.pt")
        message = refusal(tmp_path / "fork.pt", tmp_path / "out.safetensors")
        assert key in message and "--set or --config" in message
        converted(
            tmp_path / "fork.pt", tmp_path / "out.safetensors", "--config", str(tmp_path / "given.yaml")
        )


def test_to_safetensors_and_back(tiny_config, tiny_vae, tmp_path):
    config = load_config(tiny_config)
    model = build_model(config)
    ema = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    plain = {
        "step": 7,
        "config": to_dict(config),
        "autoencoder": None,
        "features": "f",
        "class_names": ["a", "b", "c"],
    }
    state = {**plain, "model": model.state_dict(), "ema": ema, "optimizer": {}}
    first = save_checkpoint(tmp_path, state, keep=0)
    # There
    there = converted(first, tmp_path / "ema.safetensors")
    assert {key: there[key] for key in plain} == plain
    assert_same_weights(there["ema"], ema)
    # And back
    convert.main([str(tmp_path / "ema.safetensors"), str(tmp_path / "back.pt")])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert {key: back[key] for key in plain} == plain
    assert_same_weights(back["ema"], ema)
    assert_same_weights(back["model"], ema)

    def sample(path: Path) -> torch.Tensor:
        trained = load_trained(path, vae=str(tiny_vae))
        return generate_images(trained, [0, 1], SamplingOptions(num_sampling_steps=2))

    images = sample(first)
    assert torch.equal(images, sample(tmp_path / "ema.safetensors"))
    assert torch.equal(images, sample(tmp_path / "back.pt"))


# ---------------------------------------------------------------------------------------------- other trainers


def small_dit() -> dict:
    """A DiT of one block under the published names."""
    config = load_config(ROOT / "configs" / "DiT-S-4.yaml", SMALL_DIT)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor) for name, tensor in build_model(config).state_dict().items()}
    return published_names(weights)


SMALL_DIT = ["model.hnet.arch_layout=[c2,[D1],c2]", "data.image_size=64", "data.num_classes=8"]


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def in_blocks(part: str, weights: dict) -> dict:
    """As after torch.compile, or FSDP, of the single blocks."""
    return {name.replace("blocks.0.", f"blocks.0.{part}."): tensor for name, tensor in weights.items()}


OTHER_TRAINERS = {
    "DistributedDataParallel": lambda w: prefixed("module.", w),
    "torch.compile": lambda w: prefixed("_orig_mod.", w),
    "FSDP": lambda w: in_blocks("_fsdp_wrapped_module", prefixed("_fsdp_wrapped_module.", w)),
    "compiled blocks": lambda w: in_blocks("_orig_mod", w),
    "all of them": lambda w: {"ema": prefixed("module._orig_mod._fsdp_wrapped_module.module.", w)},
    "Lightning": lambda w: {"state_dict": prefixed("net._orig_mod.", w), "epoch": 3},
    "only model": lambda w: {"model": w},
    "other names for an EMA": lambda w: {"params": prefixed("module.", published_zeros(w)), "params_ema": w},
    "options of train.py": lambda w: {"ema": w, "model": published_zeros(w), "args": argparse.Namespace(a=1)},
    "our names": lambda w: foreign.from_official(w),
    "our names, wrapped": lambda w: prefixed(
        "_orig_mod.module.", in_blocks("_fsdp_wrapped_module._orig_mod", foreign.from_official(w))
    ),
    "AveragedModel": lambda w: averaged(w),
    "AveragedModel beside the model": lambda w: {"model": published_zeros(w), "ema": averaged(w)},
    "ema-pytorch": lambda w: ema_pytorch(w),
    "ema-pytorch as an entry": lambda w: {"model": published_zeros(w), "ema": ema_pytorch(w), "step": 3},
    "attributes of one module": lambda w: {
        "state_dict": prefixed("model_ema.", w)
        | prefixed("model.", published_zeros(w))
        | {"loss.scale": torch.ones(1)}
    },
    "a checkpoint within": lambda w: {"checkpoint": {"model": w, "optimizer": {"state": {0: {"step": 1}}}}},
    "an EMA within": lambda w: {"model": published_zeros(w), "ema": {"decay": 0.999, "shadow": w}},
    "a step beside the tensors": lambda w: {**w, "step": 3},
}


def averaged(weights: dict) -> dict:
    """As the state of torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(7), **prefixed("module.", weights)}


def ema_pytorch(weights: dict) -> dict:
    """As the state of ema_pytorch.EMA."""
    counters = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    return counters | prefixed("online_model.", published_zeros(weights)) | prefixed("ema_model.", weights)


def published_zeros(weights: dict) -> dict:
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("trainer", OTHER_TRAINERS)
def test_weights_of_other_trainers(trainer, save, tmp_path):
    weights = small_dit()
    state = converted(save(OTHER_TRAINERS[trainer](weights)), tmp_path / "out.safetensors")
    assert_same_weights(state["ema"], foreign.from_official(weights))
    assert config_from_dict(state["config"]).data.num_classes == 8


def test_a_sit_is_no_dit(save, tmp_path):
    """Its tensors have the names and shapes of a DiT's; the options of its training tell them apart."""
    options = argparse.Namespace(path_type="Linear", prediction="velocity")
    path = save({"ema": small_dit(), "args": options})
    with pytest.raises(UserError, match="it holds a SiT, whose times and velocities are not those of"):
        convert.main([str(path), str(tmp_path / "out.safetensors")])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_plain_safetensors(dtype, tmp_path):
    half = {name: tensor.to(dtype) for name, tensor in small_dit().items()}
    save_file(half, tmp_path / "half.safetensors")
    state = converted(tmp_path / "half.safetensors", tmp_path / "out.safetensors")
    loaded_model(state)
    assert_same_weights(state["ema"], foreign.from_official(half))


def test_an_averaged_model_of_pytorch(save, tmp_path):
    """Its own state dict, in case the names change."""
    net = torch.nn.Module()
    weights = small_dit()
    for name, tensor in weights.items():
        net.register_buffer(name.replace(".", "-"), tensor)
    state = torch.optim.swa_utils.AveragedModel(net).state_dict()
    state = {name.replace("-", "."): tensor for name, tensor in state.items()}
    assert len(state) == len(weights) + 1
    assert_same_weights(
        converted(save(state), tmp_path / "a.safetensors")["ema"], foreign.from_official(weights)
    )


def test_a_diffusers_folder_of_several_files(diffusers_dit, tmp_path):
    model, single = diffusers_dit
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = converted(single, tmp_path / "single.safetensors")
    found = converted(folder, tmp_path / "sharded.safetensors")
    assert found["config"] == expected["config"]
    assert_same_weights(found["ema"], expected["ema"])
    # One of the files stands for its folder; nothing outside of it is read
    a_shard = sorted(folder.glob("*.safetensors"))[0]
    assert_same_weights(converted(a_shard, tmp_path / "again.safetensors")["ema"], expected["ema"])
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert "names a file that is not in its folder" in refusal(folder, tmp_path / "out.safetensors")
    index.write_text("[]")
    assert "has no weight_map" in refusal(folder, tmp_path / "out.safetensors")


def test_nothing_of_value_is_replaced(whole_run, save, tmp_path):
    """The source, a checkpoint of a run, or a foreign file; what a conversion wrote may be written again."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    last = run / "checkpoints" / "0000008.pt"
    foreign_file = save(small_dit())
    link = tmp_path / "link.pt"
    link.symlink_to(last)
    hub = tmp_path / "hub"
    hub.mkdir()
    for output in (hub / "model.safetensors", hub / "model.safetensors", hub / "model.pt", hub / "model.pt"):
        converted(last, output)
    plain = tmp_path / "plain.safetensors"
    save_file(small_dit(), plain)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = [
        (last, last, "is the source"),
        (last, link, "is the source"),
        (hub, hub / "model.safetensors", "is the source"),
        (last, run / "checkpoints" / "0000006.pt", "was not written by weights.convert"),
        (last, run / "checkpoints" / "0000009.pt", "has the name of a run's checkpoint"),
        (last, foreign_file, "was not written by weights.convert"),
        (last, plain, "was not written by weights.convert"),
        (plain, plain, "is the source"),
    ]
    for source, output, problem in refused:
        message = refusal(source, output)
        assert f"output '{output}' " in message and f"{problem}; give another name" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dc_dit_with_our_names(tiny_config, save, tmp_path):
    """A bare state dict of a run of this repository, whose configuration is given."""
    weights = build_model(load_config(tiny_config)).state_dict()
    source = save(prefixed("_orig_mod.", weights))
    out = tmp_path / "out.safetensors"
    assert "comes without its configuration; give it as --config" in refusal(source, out)
    assert_same_weights(converted(source, out, "--config", str(tiny_config))["ema"], weights)


def test_fine_tuning_a_converted_dit_on_other_classes(save, tiny_config, tmp_path):
    """The two commands of docs/weights.md, small: published names, 8 classes, trained on the 3 of the features."""
    converted(save(small_dit()), tmp_path / "dit.safetensors")
    changes = [
        "model.patch_size=4",
        "model.hnet.arch_layout=[c2,[D1],c2]",
        "model.hnet.d_model=[384,384]",
        "model.hnet.num_heads=[6,6]",
        f"training.init_from={tmp_path / 'dit.safetensors'}",
        "training.max_steps=1",
    ]
    words = [word for change in changes for word in ("--set", change)]
    train.main(["--config", str(tiny_config), "--output", str(tmp_path / "run"), *words])
    report = (tmp_path / "run" / "init_report.txt").read_text().splitlines()
    assert sum(line.endswith(" copied") for line in report) == len(report) - 1
    assert any("new labels ((9, 384) there, (4, 384) here; null label copied)" in line for line in report)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "0000001.pt")
    assert state["model"]["y_embedder.table.weight"].shape == (4, 384)


QUANTISED = {
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "int8": lambda tensor: tensor.to(torch.int8),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind, save, tiny_config, tmp_path):
    quantised = {name: QUANTISED[kind](tensor) for name, tensor in small_dit().items()}
    save_file(quantised, tmp_path / "plain.safetensors")
    for source in (save({"ema": quantised}), tmp_path / "plain.safetensors"):
        assert "quantised weights cannot be used" in refusal(source, tmp_path / "out.safetensors")
        with pytest.raises(UserError, match="quantised weights cannot be used"):
            load_checkpoint(source)
    # And in a file with our metadata
    config = load_config(tiny_config)
    weights = {name: QUANTISED[kind](tensor) for name, tensor in build_model(config).state_dict().items()}
    save_weights(tmp_path / "own.safetensors", {"step": 0, "config": to_dict(config), "ema": weights})
    with pytest.raises(UserError, match="quantised weights cannot be used"):
        load_trained(tmp_path / "own.safetensors")


def test_a_file_that_is_not_converted_is_met_with_the_command(
    official, diffusers_dit, save, tiny_config, tmp_path
):
    """Wherever it is given; the command works as it is printed."""
    plain = tmp_path / "my weights.safetensors"
    save_file(small_dit(), plain)
    sources = [official, diffusers_dit[1], diffusers_dit[1] / "transformer", plain, save(small_dit())]
    for source in sources:
        with pytest.raises(UserError) as caught:
            load_trained(source)
        message = str(caught.value)
        assert message.isprintable() and "weights_only" not in message
        _, command, _ = message.split("`")
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "weights.convert"] and message.endswith("give the result")
        convert.main([words[3], str(tmp_path / "out.safetensors"), *words[5:]])
    for option in ("training.init_from", "training.resume_from_ckpt"):
        with pytest.raises(UserError, match=f"^{option} '.*run `python -m weights.convert"):
            train.main(["--config", str(tiny_config), "--set", f"{option}={official}"])
    with pytest.raises(UserError, match="^--resume '.*give the result as training.init_from$"):
        train.main(["--resume", str(official)])
    # In the folder of an official run
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(official, tmp_path / "run" / "checkpoints" / "0400000.pt")
    folder = str(tmp_path / "run")
    for words in (["--resume", folder], ["--config", str(tiny_config), "--output", folder]):
        with pytest.raises(UserError, match="` and give the result as training.init_from"):
            train.main(words)


def test_the_command_names_no_file_that_exists(diffusers_dit, tmp_path, monkeypatch):
    """Also where the folder is given as the current one."""
    folder = shutil.copytree(diffusers_dit[1], tmp_path / "dit")
    monkeypatch.chdir(folder)
    for name in ("dit-converted.safetensors", "dit-converted-2.safetensors"):
        with pytest.raises(UserError) as caught:
            load_trained(".")
        words = shlex.split(str(caught.value).split("`")[1])
        assert words[-1] == str(tmp_path / name)
        convert.main(words[3:])


def test_what_is_not_ours_and_cannot_be_converted(official, save, tiny_config, tmp_path):
    """No command is promised: for other networks, and for our own files that are damaged."""
    for source in (save({"a": torch.ones(1)}), save({"format": 2, "model": small_dit()})):
        with pytest.raises(UserError, match="is not a checkpoint of this repository"):
            load_checkpoint(source)
    damaged = tmp_path / "damaged.pt"
    content = bytearray(official.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="differs from its checksum"):
        load_checkpoint(damaged)


def test_quoted_errors_have_no_terminal_escapes():
    text = one_line(ValueError("\x1b[1mbold\x1b[0m\nand \x1b]0;title\x07 \r more"))
    assert text.isprintable() and text.startswith("ValueError: bold and")


# ---------------------------------------------------------------------------------------------------- hostile


class Call:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def raw_pickle(path: Path, content: bytes) -> None:
    """A torch.save file whose pickle is replaced."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))


def globals_pickle(module: str, name: str, argument: str) -> bytes:
    """Call `module.name(argument)`, written by hand so that the name need not exist."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


HOSTILE = {
    "os.system": lambda victim: pickle.dumps(Call(os.system, f"touch {victim}"), 2),
    "subprocess": lambda victim: pickle.dumps(Call(subprocess.call, ["touch", str(victim)]), 2),
    "eval": lambda victim: pickle.dumps(Call(eval, f"open({str(victim)!r}, 'w')"), 2),
    "inside a state dict": lambda victim: pickle.dumps({"ema": {"x": Call(os.system, f"touch {victim}")}}, 2),
    "torch.load": lambda victim: globals_pickle("torch.serialization", "load", str(victim)),
    "getattr": lambda victim: b"cbuiltins\ngetattr\n(cos\nsystem\ntR.",
    "config imports os": lambda victim: globals_pickle("config", "os.system", f"touch {victim}"),
    "call of a configuration": lambda victim: globals_pickle("config", "Config", f"touch {victim}"),
    "function of the configuration": lambda victim: globals_pickle("config", "load_config", str(victim)),
    "another module called config": lambda victim: globals_pickle("config.evil", "run", f"touch {victim}"),
    "state that is no dictionary": lambda victim: b"cconfig\nConfig\n)\x81X\x04\x00\x00\x00evilb.",
    "protocol 4": lambda victim: pickle.dumps(Call(os.system, f"touch {victim}"), 4),
    "cut off": lambda victim: pickle.dumps({"a": 1}, 2)[:-3],
    "no pickle": lambda victim: b"\x00\x01\x02",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("container", ["zip", "plain"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_files_execute_nothing(name, container, tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "evil.pt"
    content = HOSTILE[name](victim)
    raw_pickle(path, content) if container == "zip" else path.write_bytes(content)
    called = []
    monkeypatch.setattr(configuration, "load_config", lambda *args: called.append(args))
    with pytest.raises(Refused):
        read_untrusted(path)
    with pytest.raises(UserError, match="is not a checkpoint that can be read safely"):
        convert.main([str(path), str(tmp_path / "out.safetensors")])
    assert not victim.exists() and not called and not (tmp_path / "out.safetensors").exists()


def test_the_hostile_pickles_would_work(tmp_path):
    """An ordinary unpickler does run them: the test above is not vacuous."""
    for name in ("os.system", "subprocess", "eval", "inside a state dict", "protocol 4"):
        victim = tmp_path / name.replace(" ", "_")
        pickle.loads(HOSTILE[name](victim))
        assert victim.exists(), name


def test_attributes_of_inert_objects_are_data(tmp_path):
    """Fields with the names of special methods, or of attributes that Python looks up, stay fields."""
    raw_pickle(
        tmp_path / "odd.pt",
        b"cconfig\nConfig\n)\x81}(X\x09\x00\x00\x00__class__X\x01\x00\x00\x00aX\x08\x00\x00\x00__init__K\x01ub.",
    )
    assert read_untrusted(tmp_path / "odd.pt") == {"__class__": "a", "__init__": 1}


# --------------------------------------------------------------------------------------------------- mistakes


def refusal(*argv) -> str:
    with pytest.raises(UserError) as caught:
        convert.main([str(part) for part in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def save(tmp_path):
    """save(content) -> the path of a torch.save file."""

    def save(content: dict) -> Path:
        torch.save(content, tmp_path / "saved.pt")
        return tmp_path / "saved.pt"

    return save


def test_mistakes_on_the_command_line(official, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "does not exist; give a checkpoint" in refusal(tmp_path / "nowhere.pt", out)
    assert "must end in .safetensors or .pt" in refusal(official, tmp_path / "out.bin")
    assert "is no diffusers folder with config.json" in refusal(tmp_path, out)
    message = refusal(official, out, "--set", "model.mlp_ratio=3")
    assert "blocks.0.mlp.fc1.bias is (256,) there and (192,) in the configured network" in message
    assert not out.exists()


def test_files_with_other_content(save, tmp_path):
    out = tmp_path / "out.safetensors"
    message = refusal(save({"ema": small_dit(), "args": "x"}), out, "--weights", "model")
    assert "has no weights 'model'; try the other --weights" in message
    message = refusal(save({"a": torch.ones(1)}), out)
    assert "holds other weights than those of DiT and DC-DiT" in message
    assert not out.exists()


def test_weights_without_a_configuration(save, tmp_path):
    out = tmp_path / "out.safetensors"
    stem = {"x_embedder.proj.weight": torch.ones(1), "pos_embed": torch.ones(1, 1, 1)}
    message = refusal(save({**stem, "hnet.a": torch.ones(1)}), out)
    assert "comes without its configuration; give it as --config" in message
    narrow = load_config(
        overrides=[
            "model.patch_size=2",
            "model.hnet.d_model=[32,32]",
            "model.hnet.num_heads=[2,2]",
            "data.image_size=32",
        ]
    )
    message = refusal(save(published_names(build_model(narrow).state_dict())), out)
    assert "no published DiT is 32 wide" in message
    assert not out.exists()


def test_blocks_with_embeddings_of_their_own(diffusers_dit):
    state = dict(diffusers_dit[0].state_dict())
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match="differs from that of block 0"):
        foreign.from_diffusers(state, 16)


def test_the_command(official, tmp_path):
    """Into a folder that does not exist yet."""
    output = tmp_path / "new" / "a.safetensors"
    command = [sys.executable, "-m", "weights.convert", str(official), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"from official DC-DiT {official}" in done.stdout, done.stderr


def test_no_message_passes_on_the_advice_to_load_unsafely(tmp_path):
    """A whole module, in both formats of torch and as TorchScript; a web page; the pointer of a missing file."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    for source in tmp_path.glob("*.pt"):
        with pytest.raises(UserError) as caught:
            load_checkpoint(source)
        for message in (str(caught.value), refusal(source, tmp_path / "out.safetensors")):
            assert "weights_only" not in message and "Weights only" not in message, message
            assert message.isprintable()
            if source.stem in ("module", "old"):
                assert "torch.nn.modules.linear.Linear" in message or "zip" in message, message
