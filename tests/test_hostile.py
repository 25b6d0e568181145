"""Hostile files and impossible configurations: refused in one line, nothing executed, nothing written."""

import collections
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import kills
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import train
from config import Config, UserError, config_from_dict, is_read, load_config, to_dict
from data.autoencoder import Autoencoder
from data.features import open_features
from evaluation import adm_npz
from evaluation.image_sets import open_source
from models import build_model
from sampling.generate import load_trained
from training import resume
from weights import convert
from weights.checkpoint import load_checkpoint, save_checkpoint, save_weights

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
CANARY = "executed"


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def one_line(function, *arguments) -> str:
    """The message of the UserError that must come."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ checkpoints


def gadgets(folder: Path) -> list:
    """Objects that make a file in this folder when they are unpickled."""
    canary = str(folder / CANARY)
    write = f"open({canary!r}, 'w').close()"
    return [
        Call(os.system, f"touch {canary}"),
        Call(os.mkdir, canary),
        Call(eval, write),
        Call(exec, write),
        Call(open, canary, "w"),
        Call(subprocess.call, ["touch", canary]),
        Call(shutil.copy, __file__, canary),
        Call(torch.save, 1, canary),
        Call(np.save, canary, np.zeros(1)),
    ]


WRAPPINGS = [
    lambda bad: bad,
    lambda bad: [bad],
    lambda bad: {
        "format": 1,
        "step": 1,
        "config": {},
        "model": {"w": bad},
        "ema": {},
        "autoencoder": None,
        "class_names": None,
    },
    lambda bad: {**kills.EMPTY, "format": 1, "step": bad},
    lambda bad: collections.OrderedDict(model=(1, {"a": [bad]})),
    lambda bad: {"format": 1, "optimizer": {"state": {0: bad}}},
]


@settings(max_examples=70, **QUIET)
@given(
    number=st.integers(0, 8),
    wrapping=st.sampled_from(WRAPPINGS),
    layout=st.sampled_from(["zip", "legacy", "pickle", "deflated"]),
    protocol=st.integers(2, 5),
)
def test_no_checkpoint_executes_code(tmp_path_factory, number, wrapping, layout, protocol):
    folder = tmp_path_factory.mktemp("hostile")
    content, file = wrapping(gadgets(folder)[number]), folder / "0000001.pt"
    if layout == "pickle":
        file.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=layout != "legacy")
    if layout == "deflated":
        squeeze(file)
    assert "is not a " in one_line(load_checkpoint, file)
    assert "checkpoint of this repository" in one_line(load_trained, file)
    assert os.listdir(folder) == [file.name]


def squeeze(file: Path) -> None:
    """Compress the records, as a bomb would."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["format", "step", "config", "model", "ema", "autoencoder", "class_names", "features"])


@settings(max_examples=80, **QUIET)
@given(content=st.dictionaries(KEYS, PLAIN), sound=st.booleans())
def test_no_checkpoint_of_plain_nonsense_gets_through(tmp_path_factory, content, sound):
    """Neither to a sampler nor, with the right format and types on the outside, by accident."""
    file = tmp_path_factory.mktemp("nonsense") / "0000001.pt"
    if sound:
        content = {
            **content,
            "format": 1,
            "step": 1,
            "config": to_dict(Config()),
            "model": {},
            "ema": {"w": torch.zeros(1)},
        }
        content["config"]["model"]["hnet"].update(
            d_model=[32, 32], num_heads=[2, 2], arch_layout=["c1", ["D1"], "c1"]
        )
    torch.save(content, file)
    one_line(load_trained, file)


@settings(max_examples=60, **QUIET)
@given(
    content=st.dictionaries(KEYS, PLAIN),
    text=st.none()
    | st.text(max_size=20)
    | st.sampled_from(["[" * 100_000, "{", "[]", '{"format": 1}', "NaN"]),
    sound=st.booleans(),
)
def test_no_metadata_of_a_weights_file_is_believed(tmp_path_factory, content, text, sound):
    """Text that is not JSON, JSON that is not a checkpoint, and checkpoints with one wrong entry."""
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    if sound:
        content = {"format": 1, "step": 1, "config": to_dict(Config()), **content}
    metadata = {"checkpoint": json.dumps(content) if text is None else text}
    safetensors.torch.save_file({"w": torch.zeros(1)}, file, metadata)
    one_line(load_trained, file)
    one_line(convert.main, [str(file), str(file.with_name("out.pt"))])
    assert os.listdir(file.parent) == [file.name]


def test_changed_weights_are_not_loaded(tmp_path):
    file = tmp_path / "model.safetensors"
    state = {"step": 1, "config": {}, "autoencoder": None, "features": None, "class_names": None}
    save_weights(file, {**state, "ema": {"a": torch.arange(3.0), "b": torch.ones((), dtype=torch.bfloat16)}})
    assert load_checkpoint(file)["ema"]["a"].tolist() == [0, 1, 2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is damaged: its weights differ from their checksum" in one_line(load_checkpoint, file)


ENTRIES = st.sampled_from(
    ["step", "config", "model", "ema", "autoencoder", "class_names", "features", "averages", "skipped"]
)


@settings(max_examples=60, **QUIET)
@given(key=ENTRIES, value=PLAIN, missing=st.booleans())
def test_no_foreign_entry_stops_training_with_a_traceback(tmp_path_factory, tiny_config, key, value, missing):
    """A checkpoint that lacks an entry or has a wrong value there: one error line, or a sound value."""
    folder = tmp_path_factory.mktemp("foreign")
    config = load_config(tiny_config)
    model = build_model(config).state_dict()
    store = open_features(config.data.feature_path, 32)
    state = {
        "step": 1,
        "config": to_dict(config),
        "model": model,
        "ema": model,
        "optimizer": {},
        "class_names": None,
    }
    state |= {
        "autoencoder": store.autoencoder,
        "features": store.fingerprint(),
        "averages": {},
        "skipped": {"total": 0},
    }
    save_checkpoint(folder / "checkpoints", state, keep=0)
    assert resume.find_start(config, kills.typed(folder), store).state["step"] == 1
    state[key] = value
    if missing:
        del state[key]
    (folder / "checkpoints" / "0000001.pt").unlink()
    torch.save({"format": 1, **state}, folder / "checkpoints" / "0000001.pt")
    try:
        found = resume.find_start(config, kills.typed(folder), store).state
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found["step"] == state["step"]
        assert found["features"] == store.fingerprint()


def test_a_checkpoint_that_contains_itself(tmp_path):
    endless = []
    endless.append(endless)
    checkpoint = {**kills.EMPTY, "format": 1, "step": 1, "config": {"ckpt": endless}}
    for name, content in (("checkpoint", checkpoint), ("foreign", {"a": endless})):
        torch.save(content, tmp_path / f"{name}.pt")
        one_line(load_checkpoint, tmp_path / f"{name}.pt")
        one_line(convert.main, [str(tmp_path / f"{name}.pt"), str(tmp_path / "out.pt")])


# ------------------------------------------------------------------------------------------------------- YAML


TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.mkdir ['{canary}']",
    "!!python/name:os.system",
    "!!python/object/apply:subprocess.call [['touch', '{canary}']]",
    "!!python/module:os",
    "!!python/object:os.system {{}}",
    '!!python/object/apply:eval [\'open("{canary}", "w")\']',
    "!include {canary}",
    "!!binary x",
    "!!timestamp x",
]
PLACES = [
    "{tag}",
    "training: {tag}",
    "training: {{seed: {tag}}}",
    "? {tag}\n: 1",
    "- {tag}",
    "_base_: {tag}",
    "ckpt: [{tag}]",
    "a: &x {tag}\nb: *x",
]


@settings(max_examples=50, **QUIET)
@given(tag=st.sampled_from(TAGS), place=st.sampled_from(PLACES), option=st.booleans())
def test_no_yaml_tag_does_anything(tmp_path_factory, tag, place, option):
    folder = tmp_path_factory.mktemp("yaml")
    tag = tag.format(canary=folder / CANARY)
    if option:
        one_line(load_config, None, [f"training.seed={tag}"])
    else:
        (folder / "a.yaml").write_text(place.format(tag=tag))
        one_line(load_config, folder / "a.yaml")
    assert not (folder / CANARY).exists()


# --------------------------------------------------------------------------------------------- feature stores


OUTSIDE = [
    "/etc/passwd",
    "../shard-00000.npy",
    "../../etc/passwd",
    "shard-00000.npy/../../x",
    "~/x.npy",
    "shard-1.npy\0",
    "",
    ".",
    "labels.npy",
    "shard-00000.npy ",
    "C:\\x.npy",
    "file:///etc/passwd",
    "shard-٠٠٠٠٠.npy",
]


@settings(max_examples=80, **QUIET)
@given(data=st.data())
def test_no_manifest_leads_outside_or_crashes(tmp_path_factory, tiny_config, data):
    """Foreign shard names, and any value in place of any entry."""
    store = tmp_path_factory.mktemp("store") / "features"
    shutil.copytree(load_config(tiny_config).data.feature_path, store)
    manifest = json.loads((store / "manifest.json").read_text())
    if data.draw(st.booleans()):
        manifest["shards"][0]["file"] = data.draw(st.sampled_from(OUTSIDE) | st.text(max_size=12) | PLAIN)
    else:
        keys = [(manifest, key) for key in manifest] + [
            (manifest["shards"][0], key) for key in manifest["shards"][0]
        ]
        place, key = data.draw(st.sampled_from(keys))
        place[key] = data.draw(PLAIN)
    (store / "manifest.json").write_text(json.dumps(manifest))
    try:
        opened = open_features(store, 32)
        opened.latent(0, np.random.default_rng(0))  # what is let through can be read
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert manifest["shards"][0]["file"] == "shard-00000.npy"


def npy(header: str, version=(1, 0), body=b"") -> bytes:
    text = header.encode("latin1", "replace")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + body


SHAPES = st.lists(st.integers(-5, 2**70) | st.sampled_from([0, 10, 2**31, 2**62, 2**63]), max_size=4).map(
    tuple
)
TYPES = st.sampled_from(["<i8", "|O", "<f4", "<U9999999", "|V2147483647", "<i8,<i8", "|S0", "bogus", ">i8"])


@settings(max_examples=60, **QUIET)
@given(
    shape=SHAPES,
    kind=TYPES,
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
    body=st.binary(max_size=200),
    name=st.sampled_from(["labels.npy", "shard-00000.npy"]),
    padding=st.sampled_from([0, 20, 60_000]),
)
def test_no_header_of_an_array_is_believed(
    tmp_path_factory, tiny_config, shape, kind, version, body, name, padding
):
    store = tmp_path_factory.mktemp("store") / "features"
    shutil.copytree(load_config(tiny_config).data.feature_path, store)
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}" + " " * padding + "\n"
    content = npy(header, version, body)
    size = (store / name).stat().st_size
    (store / name).write_bytes(content[:size] + bytes(max(size - len(content), 0)))

    def read():
        open_features(store, 32).latent(0, np.random.default_rng(0))

    one_line(read)


@settings(max_examples=30, **QUIET)
@given(
    length=st.sampled_from([0, 10, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    shape=st.lists(st.integers(-1, 2**62), max_size=3),
    offsets=st.lists(st.integers(-1, 2**63), min_size=2, max_size=2),
)
def test_no_header_of_safetensors_is_believed(tmp_path_factory, tiny_vae, length, shape, offsets):
    folder = tmp_path_factory.mktemp("vae")
    shutil.copy(tiny_vae / "config.json", folder)
    header = json.dumps(
        {"encoder.conv_in.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    ).encode()
    content = struct.pack("<Q", length if length > 100 else len(header)) + header + bytes(64)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert "cannot load" in one_line(Autoencoder.load, str(folder), "cpu")


def npz(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sound_members() -> dict[str, bytes]:
    """Images, labels and statistics that are read, as bytes of .npy files."""
    arrays = {
        "arr_0": np.zeros((2, 4, 4, 3), np.uint8),
        "arr_1": np.zeros(2, np.int64),
        "mu": np.zeros(3),
        "sigma": np.eye(3),
    }
    arrays["dcdit_meta"] = np.array(json.dumps({"extractor": "inception:x", "images": 2, "image_size": 4}))
    members = {}
    for name, values in arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, values)
        members[f"{name}.npy"] = buffer.getvalue()
    return members


@settings(max_examples=80, **QUIET)
@given(
    name=st.sampled_from(["arr_0.npy", "arr_1.npy", "mu.npy", "sigma.npy", "dcdit_meta.npy"]),
    shape=SHAPES,
    kind=TYPES | st.sampled_from(["|u1", "<f8"]),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
    body=st.binary(max_size=200),
    padding=st.sampled_from([0, 20, 60_000]),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_no_header_of_an_npz_is_believed(
    tmp_path_factory, name, shape, kind, version, body, padding, compression
):
    """A header that claims other values than the file holds is refused before it is allocated."""
    file = tmp_path_factory.mktemp("npz") / "samples.npz"
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}" + " " * padding + "\n"
    file.write_bytes(npz(sound_members() | {name: npy(header, version, body)}, compression))
    try:
        opened = open_source(file, "SAMPLES")
    except UserError as error:
        assert "\n" not in str(error)
    else:  # only where the header is true
        assert name == "arr_1.npy"
        assert math.prod(shape) * np.dtype(kind).itemsize == len(body)
        assert opened.images.labels is None


@settings(max_examples=60, **QUIET)
@given(data=st.data())
def test_no_damaged_npz_crashes_or_executes(tmp_path_factory, monkeypatch, data):
    """Pickled members, members of a wrong type, truncations, overwritten bytes, a bomb."""
    folder = tmp_path_factory.mktemp("npz")
    file, members = folder / "samples.npz", sound_members()
    name = data.draw(st.sampled_from(sorted(members)))
    kind = data.draw(st.sampled_from(["pickle", "bare pickle", "cut", "overwritten", "bomb", "renamed"]))
    if kind == "pickle":
        buffer = io.BytesIO()
        bad = np.array([gadgets(folder)[data.draw(st.integers(0, 8))]], object)
        np.lib.format.write_array(buffer, bad, allow_pickle=True)
        members[name] = buffer.getvalue()
    if kind == "bare pickle":
        members[name] = pickle.dumps(gadgets(folder)[data.draw(st.integers(0, 8))])
    if kind == "bomb":  # its header is true, but no statistics are that large
        monkeypatch.setattr(adm_npz, "LARGEST", 100_000)
        members["mu.npy"] = npy(
            "{'descr': '<f8', 'fortran_order': False, 'shape': (40000,), }\n", body=bytes(320_000)
        )
    if kind == "renamed":
        members[name.removesuffix(".npy")] = members.pop(name)
    content = bytearray(npz(members, zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    if kind == "overwritten":
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))
    file.write_bytes(content)
    try:
        opened = open_source(file, "SAMPLES")
        opened.images.read(range(2)) if opened.images else None
    except UserError as error:
        assert "\n" not in str(error)
    assert os.listdir(folder) == [file.name]


def test_a_sound_npz_is_read(tmp_path):
    (tmp_path / "samples.npz").write_bytes(npz(sound_members()))
    source = open_source(tmp_path / "samples.npz", "SAMPLES")
    assert len(source.images) == 2
    assert source.images.read(range(2)).shape == (2, 4, 4, 3)
    assert source.inception["features"].count == 2
    assert source.meta["image_size"] == 4


# --------------------------------------------------------------------------------------------- configurations


def leaves(section: dict, where: str = "") -> list[tuple[str, object]]:
    found = []
    for key, value in section.items():
        found += leaves(value, f"{where}{key}.") if isinstance(value, dict) else [(where + key, value)]
    return found


# tie_embeddings stands in official files and is never read
LEAVES = [
    (key, value)
    for key, value in leaves(to_dict(Config()))
    if is_read(Config(), key) and key not in ("training.epochs", "model.hnet.tie_embeddings")
]
NUMBERS = [key for key, value in LEAVES if isinstance(value, (int, float)) and not isinstance(value, bool)]
SWITCHES = [key for key, value in LEAVES if isinstance(value, bool)]
LISTS = [key for key, value in LEAVES if isinstance(value, list)]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
NO_NUMBER = st.sampled_from(
    ["-7", "-0.5", ".nan", ".inf", "-.inf", "[1]", "{a: 1}", "true", "null", "many", "''", "-1e400"]
)
# Values that have a meaning, or an effect only together with another key
HARMLESS = {
    ("training.ratio_batch_size", "null"),
    ("training.max_grad_norm", ".inf"),
    ("training.max_grad_norm", "null"),
    ("training.ratio_loss_weight", "-7"),
    ("training.ratio_loss_weight", "-0.5"),
    ("training.ratio_loss_weight", "-.inf"),
}
MAY_BE_EMPTY = ("logging.trackers", "training.frozen", "training.posthoc_ema_stds")
BAD_OVERRIDES = st.one_of(
    st.tuples(st.sampled_from([key for key in NUMBERS if key != "diffusion.cfg_channels"]), NO_NUMBER),
    st.tuples(st.just("diffusion.cfg_channels"), st.sampled_from(["0", "5", "-1", "some", "1.5", "[3]"])),
    st.tuples(
        st.sampled_from(SWITCHES), st.sampled_from(["1", "0", "'true'", "[]", "null", "perhaps", "{}"])
    ),
    st.tuples(
        st.sampled_from([key for key in LISTS if key not in MAY_BE_EMPTY]),
        st.sampled_from(["[]", "[{}]", "3", "x", "[null]"]),
    ),
    st.tuples(
        st.sampled_from(["model", "training", "data", "diffusion", "logging"]),
        st.sampled_from(["3", "[1]", "text"]),
    ),
    st.tuples(
        st.tuples(st.sampled_from(["model", "training", "data", "logging", "model.hnet"]), WORDS).map(
            ".".join
        ),
        st.just("1"),
    ).filter(lambda pair: pair[0] not in dict(LEAVES) and pair[0] not in ("model.hnet",)),
    st.tuples(WORDS.filter(lambda word: word not in to_dict(Config())), st.just("1")),
    st.tuples(
        st.sampled_from(["data.image_size", "model.hnet.d_model"]),
        st.sampled_from(["33", "[33, 33]", "[64, 32]", "[]"]),
    ),
    st.tuples(
        st.sampled_from(["model.init", "model.attention", "diffusion.noise_schedule"]),
        WORDS.map("x_{}".format),
    ),
    st.tuples(st.just("data.feature_path"), st.sampled_from(["/nowhere", "README.md", "''", "null", "3"])),
).filter(lambda pair: pair not in HARMLESS)


def refused(argv: list[str], capsys, folder: Path) -> None:
    """train.py ends with one line and status 2, and writes nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: train.main([*argv, "--output", str(folder / "run")]))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (argv, lines)
    assert not (folder / "run").exists()


@settings(max_examples=320, **QUIET)
@given(override=BAD_OVERRIDES, in_file=st.booleans())
def test_bad_configurations_are_one_line_and_status_2(
    tmp_path_factory, tiny_config, capsys, override, in_file
):
    """Each is bad by construction: a wrong type, out of range, an unknown name."""
    folder = tmp_path_factory.mktemp("bad")
    key, text = override
    argv = ["--config", str(tiny_config), "--set", f"{key}={text}"]
    if in_file:
        nested = yaml.safe_load(text) if text else None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        (folder / "bad.yaml").write_text(yaml.safe_dump({"_base_": str(tiny_config), **nested}))
        argv = ["--config", str(folder / "bad.yaml")]
    refused(argv, capsys, folder)


@settings(max_examples=300, **QUIET)
@given(key=st.sampled_from([key for key, _ in LEAVES]), value=PLAIN)
def test_any_value_of_any_key_is_a_configuration_or_an_error(key, value):
    """A value that passes is the same after writing and reading."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        config = config_from_dict(nested)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert config_from_dict(to_dict(config)) == config


@settings(max_examples=100, **QUIET)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_any_file_is_a_configuration_or_an_error(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("any") / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load_config(file)
    except UserError as error:
        assert "\n" not in str(error)


def test_the_command_itself_refuses(tiny_config, tmp_path):
    """As users see it: a process, one line on stderr, nothing on stdout."""
    command = [
        sys.executable,
        "train.py",
        "--config",
        tiny_config,
        "--output",
        tmp_path / "run",
        "--set",
        "training.seed=[1]",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: training.seed: [1] is not a whole number")


def test_a_checkpoint_is_accepted_when_it_is_sound(tmp_path):
    """The tests above do not pass because everything is refused."""
    path = save_checkpoint(tmp_path, {**kills.EMPTY, "step": 1}, keep=0)
    assert load_checkpoint(path)["step"] == 1
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(3))
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }\n"
    assert np.array_equal(np.lib.format.read_array(io.BytesIO(npy(header, body=bytes(24)))), np.zeros(3))
