"""Named columns beside the latents: adding them, reading them, and what refuses them."""

import pickle

import numpy as np
import pytest
from test_features import SIZE, fill, make_official, make_writer

from config import UserError
from data.columns import add_column
from data.columns import main as add
from data.features import damaged_files, open_features
from data.store_files import read_json
from data.streams import rng
from training.batches import Samples, collate, make_loader, read_batches

COUNT = 10


@pytest.fixture
def store(tiny_images, tmp_path):
    """A folder of features with 10 images, in two views."""
    fill(make_writer(tmp_path / "store", tiny_images), tiny_images)
    return tmp_path / "store"


def save(path, array):
    np.save(path, array)
    return path


def test_a_scalar_is_read_by_name(store, tmp_path, capsys):
    scores = np.linspace(0, 1, COUNT)
    add([str(store), "score", str(save(tmp_path / "scores.npy", scores))])
    assert "column score, float32 () per image" in capsys.readouterr().out
    opened = open_features(store, SIZE, ["score"])
    assert opened.columns == {"score": ()}
    assert opened.column_values(3, rng(0, "x"))["score"] == np.float32(scores[3])
    assert np.array_equal(opened.column("score"), scores.astype(np.float32))
    assert open_features(store, SIZE).columns == {}
    entry = read_json(store / "manifest.json")["columns"]["score"]
    assert {key: entry[key] for key in ("dtype", "views", "shape")} == {
        "dtype": "float32",
        "views": 1,
        "shape": [],
    }


def test_tokens_are_those_of_the_view_of_the_latent(store, tmp_path):
    tokens = np.random.default_rng(0).normal(size=(2, COUNT, 4, 3)).astype(np.float16)
    files = [save(tmp_path / f"{view}.npy", tokens[view]) for view in range(2)]
    add_column(store, "dino", *files)
    opened = pickle.loads(pickle.dumps(open_features(store, SIZE, ["dino"])))
    assert opened.columns == {"dino": (4, 3)}
    seen = set()
    for draw in range(8):
        view = int(rng(0, "latent", draw).integers(2))
        values = opened.column_values(7, rng(0, "latent", draw))["dino"]
        assert values.dtype == np.float16
        assert np.array_equal(values, tokens[view, 7])
        seen.add(view)
    assert seen == {0, 1}


def test_batches_hold_the_columns(store, tmp_path):
    """With loader processes, too; without columns a batch is what it was."""
    plain = open_features(store, SIZE)
    add_column(store, "score", save(tmp_path / "scores.npy", np.arange(COUNT)))
    opened = open_features(store, SIZE, ["score"])
    samples = Samples(opened, 0, diffusion_steps=1000, dropout=0.0, null_label=3)
    keys = [[(0, 4), (0, 2)], [(1, 9), (1, 0)]]
    for workers in (0, 1):
        batches = list(read_batches(make_loader(keys, samples, workers, pin_memory=False)))
        assert [batch.columns["score"].tolist() for batch in batches] == [[4, 2], [9, 0]]
    without = collate([Samples(plain, 0, 1000, 0.0, 3)[key] for key in keys[0]])
    assert without.columns == {}
    first = collate([samples[key] for key in keys[0]])
    assert np.array_equal(first.x0, without.x0) and np.array_equal(first.t, without.t)


def test_the_fingerprint_is_that_of_what_is_read(store, tmp_path):
    before = open_features(store, SIZE).fingerprint()
    add_column(store, "score", save(tmp_path / "a.npy", np.zeros(COUNT)))
    assert open_features(store, SIZE).fingerprint() == before
    zeros = open_features(store, SIZE, ["score"]).fingerprint()
    add_column(store, "score", save(tmp_path / "b.npy", np.ones(COUNT)))
    ones = open_features(store, SIZE, ["score"]).fingerprint()
    assert len({before, zeros, ones}) == 3


def test_damage_is_named(store, tmp_path):
    add_column(store, "score", save(tmp_path / "a.npy", np.zeros(COUNT)))
    assert damaged_files(store) == []
    save(store / "column-score.npy", np.zeros((COUNT, 1), np.float32) + 1)
    assert damaged_files(store) == ["column-score.npy: differs from its checksum"]
    save(store / "column-score.npy", np.zeros((COUNT, 2), np.float32))
    with pytest.raises(UserError, match="contradicts the manifest; add it again with python -m data.columns"):
        open_features(store, SIZE, ["score"])
    (store / "column-score.npy").unlink()
    assert damaged_files(store) == ["column-score.npy: missing"]
    with pytest.raises(UserError, match="column-score.npy: cannot be read"):
        open_features(store, SIZE, ["score"])


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("Score", np.zeros(COUNT), "Score: is no name of a column"),
        ("../x", np.zeros(COUNT), "is no name of a column"),
        ("score", np.zeros(COUNT - 1), r"is \(9,\), but the store has 10 images; give a row per image"),
        ("score", np.float32(1), r"is \(\), but the store has 10 images"),
        ("score", np.array(["a"] * COUNT), "holds <U1, not numbers; embed texts first"),
        ("score", np.array([0, 1, np.nan] + [0] * 7), "row 2 is not finite in float32"),
        ("score", np.array([0] * 9 + [1e300]), "row 9 is not finite in float32"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(store, tmp_path, name, rows, message):
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=message) as raised:
        add_column(store, name, save(tmp_path / "a.npy", rows))
    assert "\n" not in str(raised.value)
    assert (store / "manifest.json").read_bytes() == before
    assert not list(store.glob("column-*"))


def test_a_missing_column_is_one_line(store, tmp_path):
    with pytest.raises(
        UserError, match="has no column score .it has none.; add it with python -m data.columns"
    ):
        open_features(store, SIZE, ["score"])
    file = save(tmp_path / "a.npy", np.zeros(COUNT))
    with pytest.raises(UserError, match="is no complete feature store"):
        add_column(tmp_path / "none", "score", file)
    make_official(tmp_path / "official", [1, 2])
    with pytest.raises(UserError, match="has the official layout, which has no columns such as score"):
        open_features(tmp_path / "official", SIZE, ["score"])


def test_mirror_images_need_a_store_that_has_them(tiny_images, tmp_path):
    writer = make_writer(tmp_path / "one", tiny_images, flip=False)
    fill(writer, tiny_images)
    file = save(tmp_path / "a.npy", np.zeros(COUNT))
    with pytest.raises(UserError, match="--mirrored .*: the store does not hold mirror images"):
        add_column(tmp_path / "one", "score", file, file)


def test_extraction_forgets_columns_of_other_images(store, tiny_images, tmp_path, capsys):
    add_column(store, "score", save(tmp_path / "a.npy", np.zeros(COUNT)))
    writer = make_writer(store, tiny_images)
    # Nothing has changed
    fill(writer, tiny_images)
    assert "score" in read_json(store / "manifest.json")["columns"]
    # A shard is written again
    (store / "shard-00001.npy").unlink()
    fill(writer, tiny_images)
    assert "columns" not in read_json(store / "manifest.json")
    assert "the columns score belong to the images as they were; add them again" in capsys.readouterr().out
    add_column(store, "score", save(tmp_path / "a.npy", np.zeros(COUNT)))
    assert open_features(store, SIZE, ["score"]).columns == {"score": ()}
