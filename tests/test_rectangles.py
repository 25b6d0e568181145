"""Images and latents that are not square: every part against a plain computation, and all scripts in turn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
import extract_features
import sample
import sample_ddp
import train
from config import UserError, config_from_dict, load_config, to_dict
from data.features import open_features
from data.images import center_crop
from figures import elastic_grid
from figures.side_by_side import Choice, SideBySide
from grid import Grid, is_size
from models import build_model, reference
from models.embeddings import sincos_positions
from models.router import ROUTERS, ordered_dither
from sampling import hub
from sampling.load import load_trained
from sampling.pipeline import DCDiTPipeline
from weights.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from weights.foreign import dit_config
from weights.upcycle import initial_state, upcycle

GRID = Grid(3, 5)
WIDTH = 32


def test_sizes_as_plain_data():
    assert Grid.of(48) == Grid.of([48, 48]) == (48, 48) and Grid(48, 48).plain == 48
    assert Grid.of([48, 80]).plain == [48, 80] and str(Grid(48, 80)) == "48 x 80"
    assert Grid(48, 80).coarsen(16) == GRID and GRID.cells == 15
    assert Grid(48, 80).is_multiple_of(16) and not Grid(48, 80).is_multiple_of(10)
    assert is_size(5) and is_size([3, 5])
    for value in (0, True, -1, 3.0, "3", None, [3], [3, 0], [3, 5, 7], (3, 5)):
        assert not is_size(value)


# ---------------------------------------------------------------------------------------------- configurations


def test_configuration():
    config = load_config(None, ["data.image_size=[384, 640]"])
    assert config.data.image_size == [384, 640] and config.data.image_grid == (384, 640)
    assert config.latent_shape == (4, 48, 80) and config.token_grid == (48, 80) and config.tokens == 3840
    assert load_config(None, ["data.image_size=[384, 640]", "model.patch_size=4"]).token_grid == (12, 20)
    for square in ("[256]", "[256, 256]"):
        assert load_config(None, [f"data.image_size={square}"]) == load_config()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["data.image_size=[250, 400]"],
            "data.image_size: [250, 400] must be a multiple of .*; try [248, 400]",
        ),
        (["data.image_size=[8, 400]"], "hold at least 2 latent cells; try [16, 400]"),
        (["data.image_size=[64, 0]"], "data.image_size[1]: 0 must be greater than 0"),
        (["data.image_size=[64, 80, 96]"], "data.image_size: [64, 80, 96] must be 2 entries long"),
        (["data.image_size=64,80"], "data.image_size: '64,80' is not a whole number .*; try [64, 80]"),
        (["data.image_size=[64, 80]", "model.patch_size=4"], "latent's side of [8, 10]; try 2"),
    ],
)
def test_mistakes(changes, message):
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(UserError, match=pattern):
        load_config(None, changes)


# ------------------------------------------------------------------------------------------------------ pixels


def test_the_crop_covers_and_cuts_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(center_crop(image, [48, 80]), pixels[:, 5:85])
    assert np.array_equal(center_crop(image, [20, 90]), pixels[14:34])
    # Halved once, because both sides are twice too long; then scaled by the side that needs it more
    halved = image.resize((45, 24), Image.Resampling.BOX)
    assert np.array_equal(center_crop(image, [24, 40]), np.asarray(halved)[:, 2:42])
    scaled = image.resize((90, 48), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, [10, 90]), np.asarray(scaled)[19:29])


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 300), (300, 9), (100, 100), (37, 61)])
def test_the_crop_has_its_size(size):
    crop = center_crop(Image.new("RGB", size, (10, 20, 30)), [8, 13])
    assert crop.shape == (8, 13, 3) and (crop == (10, 20, 30)).all()


# ------------------------------------------------------------------------------------------- parts of the network


def test_positions():
    """The column in the first half, the row in the second, cell by cell."""
    positions = sincos_positions(WIDTH, GRID)
    omega = 10000 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    for cell, position in enumerate(positions):
        row, column = divmod(cell, 5)
        parts = [(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]
        torch.testing.assert_close(position, torch.cat(parts).float())
    square = sincos_positions(WIDTH, Grid(5, 5)).view(5, 5, -1)
    assert torch.equal(positions.view(3, 5, -1), square[:3])


@pytest.mark.parametrize("grid", [GRID, Grid(8, 8), Grid(4, 1)], ids=str)
def test_ranks_of_the_regular_grid(grid):
    """Digit by digit in base 4: the lowest bits of row and column give the highest digit."""
    levels = max(1, (max(grid) - 1).bit_length())
    for row in range(grid.rows):
        for column in range(grid.columns):
            rank = 0
            for bit in range(levels):
                y, x = row >> bit & 1, column >> bit & 1
                rank = 4 * rank + 2 * (x ^ y) + y
            assert ordered_dither(grid, torch.device("cpu"))[row, column] == rank / 4**levels


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    torch.manual_seed(0)
    router = ROUTERS[name](64, 4.0)
    features = torch.randn(2, 64, *GRID)
    routing = router(features)
    assert routing.prob.shape == routing.keep.shape == (2, 15)
    if not router.is_learned:
        assert routing.keep.sum(1).tolist() == [4, 4]
    assert router(features, tokens=7).keep.sum(1).tolist() == [7, 7]
    # Each sample as if alone
    alone = router(features[1:], draw=torch.tensor([1]))
    torch.testing.assert_close(alone.prob, routing.prob[1:])


def test_neighbours_of_a_rectangle():
    """The similarity of `hnet` and the contrast of `contrast`, cell by cell."""
    features = torch.randn(1, 64, *GRID)
    hnet = ROUTERS["hnet"](64, 4.0)
    hnet.start()
    contrast = ROUTERS["contrast"](64, 4.0).importance(features, torch.zeros(1)).view(*GRID)
    prob = hnet(features).prob.view(*GRID)
    unit = F.normalize(features[0], dim=0)
    for row in range(3):
        for column in range(5):
            near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            near = [(y, x) for y, x in near if 0 <= y < 3 and 0 <= x < 5]
            similarity = sum((unit[:, row, column] * unit[:, y, x]).sum() for y, x in near) / len(near)
            if (row, column) not in ((0, 0), (2, 4)):  # the ends are forced to 1
                torch.testing.assert_close(prob[row, column], (1 - similarity) / 2)
            window = features[0, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            squared = (features[0, :, row, column] - window.mean((1, 2))).square().mean()
            torch.testing.assert_close(contrast[row, column], squared / (1 + squared))


def small_config(*changes):
    hnet = {"arch_layout": ["c1", ["D2"], "c1"], "d_model": [WIDTH, WIDTH], "num_heads": [2, 2]}
    data = {"image_size": [6, 10], "latent_stride": 1, "num_classes": 3}
    return config_from_dict({"model": {"hnet": hnet}, "data": data}, changes)


def perturbed(config):
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_network_is_its_transpose_on_the_transposed_image():
    """With kernels and positions transposed, rows become columns: nothing else tells them apart."""
    wide, tall = perturbed(small_config()), perturbed(small_config("data.image_size=[10, 6]"))
    state = wide.state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 4:
            state[name] = tensor.transpose(2, 3)
    state["pos_embed"] = wide.pos_embed.view(6, 10, -1).transpose(0, 1).flatten(0, 1)
    tall.load_state_dict(state)
    x = torch.randn(2, 4, 6, 10)
    rest = torch.tensor([10, 900]), torch.tensor([0, 3])
    # All tokens, because ties in the nearest token go to the lower index
    outputs = wide(x, *rest, tokens=60).prediction, tall(x.mT, *rest, tokens=60).prediction
    torch.testing.assert_close(outputs[0], outputs[1].mT, rtol=1e-4, atol=1e-5)
    assert outputs[0].shape == (2, 8, 6, 10)


@pytest.mark.parametrize("drop", [None, 0.5])
@pytest.mark.parametrize("on_grid", [False, True])
def test_the_readable_twin(drop, on_grid, request):
    if on_grid:
        request.getfixturevalue("smooth_on_grid")
    model = perturbed(small_config())
    with torch.no_grad():
        model.router.residual_scorer[-1].bias.zero_()
    inputs = torch.randn(2, 4, 6, 10), torch.tensor([10, 900]), torch.tensor([0, 3])
    fraction = None if drop is None else torch.full((2,), drop)
    output = model(*inputs, fraction)
    plain = reference.forward(model, *inputs, fraction)
    assert torch.equal(output.routing.keep, plain.routing.keep) and 4 < output.routing.keep.sum() < 116
    torch.testing.assert_close(output.prediction, plain.prediction, rtol=1e-4, atol=1e-5)


def test_upcycled_positions():
    """Each patch of 2 x 2 cells has its position at its first cell."""
    dit, model = perturbed(small_config("model.patch_size=2")), perturbed(small_config())
    upcycle(dit, model, "dit", "fresh", 4.0)
    cells = model.pos_embed.view(6, 10, WIDTH)
    torch.testing.assert_close(cells[::2, ::2], dit.pos_embed.view(3, 5, WIDTH))


def test_weights_for_another_shape(tmp_path):
    """6 x 10 and 10 x 6 cells have equally many positions."""
    weights = build_model(small_config()).state_dict()
    state = {"step": 0, "autoencoder": None, "features": None, "class_names": None, "optimizer": {}}
    state |= {"config": to_dict(small_config()), "model": weights, "ema": weights}
    path = save_checkpoint(tmp_path, state, keep=0)
    message = "has latents of 6 x 10 cells, but data.image_size makes 10 x 6; give a model of the same size"
    with pytest.raises(UserError, match=message):
        initial_state(small_config("data.image_size=[10, 6]", f"training.init_from={path}"))
    # Shapes of tensors do not tell the sides either
    dit = build_model(small_config("model.patch_size=2")).state_dict()
    with pytest.raises(ValueError, match="its 15 positions are those of no square"):
        dit_config(dit, heads=2)


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("patch", ["null", "2"])
def test_from_images_to_samples(tiny_config, tiny_images, tiny_vae, tiny_extractor, tmp_path, patch):
    """24 x 40 pixels are 6 x 10 latent cells."""
    features = tmp_path / "features"
    paths = ["--data-path", str(tiny_images), "--features-path", str(features), "--vae", str(tiny_vae)]
    extract_features.main([*paths, "--image-size", "24", "40", "--num-workers", "0"])
    assert json.loads((features / "manifest.json").read_text())["image_size"] == [24, 40]
    assert open_features(features, [24, 40]).latent_shape == (4, 6, 10)
    for size, found in ((32, "32"), ([40, 24], r"\[40, 24\]")):
        with pytest.raises(UserError, match=rf"data.image_size: {found}, but .* of size \[24, 40\]"):
            open_features(features, size)
    (tmp_path / "official" / "imagenet32_features").mkdir(parents=True)
    for folder, message in (
        ("official", "is no square, which the official layout"),
        ("run", "is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_features(tmp_path / folder, [24, 40])

    # Make a reference of the same crop
    own = ["--features", str(tiny_extractor), "--cache", str(tmp_path / "cache")]
    evaluate.main(
        ["--make-reference", str(tiny_images), str(tmp_path / "own.npz"), "--image-size", "24", "40", *own]
    )
    with np.load(tmp_path / "own.npz") as file:
        assert file["arr_0"].shape == (10, 24, 40, 3)

    # Train
    changes = {
        "data.feature_path": features,
        "data.image_size": "[24, 40]",
        "model.patch_size": patch,
        "training.max_steps": 2,
        "logging.sample_every": 2,
        "evaluation.every": 2,
        "evaluation.reference": tmp_path / "own.npz",
        "evaluation.features": tiny_extractor,
        "evaluation.num_samples": 4,
        "evaluation.num_sampling_steps": 2,
    }
    argv = ["--config", str(tiny_config), "--output", str(tmp_path / "run")]
    for key, value in changes.items():
        argv += ["--set", f"{key}={value}"]
    train.main(argv)
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert load_checkpoint(checkpoint)["config"]["data"]["image_size"] == [24, 40]
    assert "frechet_distance" in (tmp_path / "run" / "evaluation.jsonl").read_text()

    # Sample
    few = ["--ckpt", str(checkpoint), "--num-sampling-steps", "2", "--cfg-scale", "2"]
    sample.main([*few, "--classes", "0", "1", "--output", str(tmp_path / "pictures")])
    assert Image.open(tmp_path / "pictures" / "sample.png").size == (2 * 40 + 3 * 2, 24 + 2 * 2)
    assert (tmp_path / "pictures" / "chunking_viz.png").is_file()
    summary = json.loads((tmp_path / "pictures" / "summary.json").read_text())
    assert summary["tokens"] == (60 if patch == "null" else 15)
    sample_ddp.main([*few, "--num-fid-samples", "5", "--output-dir", str(tmp_path / "many")])
    with np.load(tmp_path / "many.npz") as file:
        assert file["arr_0"].shape == (5, 24, 40, 3)

    # Pictures, the pipeline, and a shared folder
    if patch == "null":
        elastic_grid.main([*few, "--fractions", "0", "0.5", "--output", str(tmp_path / "elastic.png")])
        pictures = SideBySide(load_trained(checkpoint), 2, "ddim")
        *_, drawn = pictures.draw(Choice(0, 0, 2.0, 0.5, 0.8))
        assert drawn.image.shape == drawn.chunk_map(0).probability.shape == (7 * 24, 7 * 40, 3)
    hub.main(["--ckpt", str(checkpoint), "--output", str(tmp_path / "hub")])
    assert "24 x 40 pixels" in (tmp_path / "hub" / "README.md").read_text()
    pipe = DCDiTPipeline.from_pretrained(tmp_path / "hub")
    assert pipe([0], num_inference_steps=2).images[0].size == (40, 24)

    # Evaluate
    evaluate.main([str(tmp_path / "many.npz"), str(tmp_path / "own.npz"), *own])
    assert json.loads((tmp_path / "many.evaluation.json").read_text())["num_reference"] == 10


@pytest.mark.parametrize("sides", [["24", "40", "56"], ["0"], ["24", "-8"]])
def test_sizes_that_are_none(tiny_images, tiny_vae, tmp_path, sides):
    paths = ["--data-path", str(tiny_images), "--features-path", str(tmp_path / "x"), "--vae", str(tiny_vae)]
    with pytest.raises(
        UserError, match=f"--image-size {' '.join(sides)}: give one number of pixels, or height"
    ):
        extract_features.main([*paths, "--image-size", *sides])
