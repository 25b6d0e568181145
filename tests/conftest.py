"""Fixtures shared by the tests: a tiny autoencoder, images, feature extractor and configuration of a run."""

import functools
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processes import group

# Files whose tests together take less than half a minute: `python -m pytest -m fast`.
FAST = (
    "test_attention.py", "test_budgets.py", "test_codecs.py", "test_config.py", "test_conv.py", "test_dc_dit.py",
    "test_dechunk.py", "test_diffusion.py", "test_dit.py", "test_images.py", "test_imports.py", "test_metrics.py",
    "test_model_golden.py", "test_packing.py", "test_readme.py", "test_router.py", "test_routers.py",
    "test_slurm.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests marked cuda, and no others, on a GPU")


def pytest_configure(config):
    """Without --gpu, this process and those that it starts see no GPU: their numbers are the CPU's.

    Runs whose precision is "auto" then train in float32 on every processor.
    """
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--gpu")
    for item in items:
        if item.path.name in FAST:
            item.add_marker(pytest.mark.fast)
        for_gpu = item.get_closest_marker("cuda") is not None or item.path.parent.name == "null_gpu"
        if for_gpu and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs --gpu; tests/test_null_gpu.py runs it"))
        if on_gpu and not for_gpu:
            item.add_marker(pytest.mark.skip(reason="is a test of the CPU"))
    # The compiler's tests come last: they leave threads behind, and other tests fork.
    items.sort(key=lambda item: item.path.name == "test_compile.py")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def smooth_on_grid(monkeypatch):
    """The dechunk smooths as on a GPU: it reads no values on the host, and its products can be counted."""
    from models.ops.smoothing import SpatialSmoothing

    def prepare(self, packing):
        return functools.partial(self.sum_on_grid, packing)

    monkeypatch.setattr(SpatialSmoothing, "prepare", prepare)


@pytest.fixture
def flop_counter():
    """PyTorch's counter, told of the products in the CPU's attention; it counts no softmax."""
    from torch.utils.flop_counter import FlopCounterMode

    from models import attention  # noqa: F401 - defines the operation

    def attention_products(qkv, lengths, out_val):
        return 2 * 2 * qkv[0, 0].numel() * lengths.square().sum().item()

    attention_products._get_raw = True  # tensors instead of shapes
    return FlopCounterMode(display=False, custom_mapping={torch.ops.dc_dit.attend: attention_products})


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> Path:
    """Folder of a random AutoencoderKL with stride 4 and 4 latent channels."""
    return save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


def save_tiny_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            norm_num_groups=4,
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """Folder of 3 classes with 4, 3 and 3 PNG images of 40 x 52 pixels. Tests that change it work on a copy."""
    return save_tiny_images(tmp_path_factory.mktemp("images"))


def save_tiny_images(folder: Path) -> Path:
    pixels = np.random.default_rng(0)
    for index in range(10):
        file = folder / "abc"[index % 3] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 52, 3), dtype=np.uint8)).save(file)
    return folder


class TinyExtractor(torch.nn.Module):
    """Features: mean and two corners of each colour; logits: the colours' means."""

    def forward(self, images):
        images = images.float()
        means = images.mean((2, 3))
        return torch.cat([means, images[:, :, 0, 0], images[:, :, -1, -1]], 1), means


@pytest.fixture(scope="session")
def tiny_extractor(tmp_path_factory) -> Path:
    """TorchScript file that gives 9 features and 3 logits of any image."""
    file = tmp_path_factory.mktemp("extractor") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers other formats by now
        torch.jit.save(torch.jit.trace(TinyExtractor(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), file)
    return file


TINY_CONFIG = """\
model:
  name: tiny
  hnet: {{arch_layout: [c1, [D1], c1], d_model: [32, 32], num_heads: [2, 2]}}
training:
  max_steps: 8
  global_batch_size: 4
  gradient_accumulation_steps: 2
  ratio_batch_size: 2
  learning_rate: 1e-3
  lr_warmup_steps: 3
  ema_decay: 0.9
  downsample_factor_start: 2
  downsample_factor_warmup_steps: 4
  multi_budget_training: true
data:
  feature_path: {folder}/features
  image_size: 32
  num_classes: 3
  num_workers: 0
  vae: {vae}
  latent_stride: 4
logging: {{results_dir: {folder}/results, log_every: 4, ckpt_every: 3, ckpt_keep: 0}}
"""


@pytest.fixture(scope="session")
def tiny_config(tiny_images, tiny_vae, tmp_path_factory) -> Path:
    """Configuration file that trains on features of the tiny images in milliseconds a step."""
    return save_tiny_config(tmp_path_factory.mktemp("tiny"), tiny_images, tiny_vae)


def save_tiny_config(folder: Path, tiny_images: Path, tiny_vae: Path) -> Path:
    import extract_features

    paths = [
        "--data-path",
        str(tiny_images),
        "--features-path",
        str(folder / "features"),
        "--vae",
        str(tiny_vae),
    ]
    extract_features.main([*paths, "--image-size", "32", "--num-workers", "0"])
    (folder / "tiny.yaml").write_text(TINY_CONFIG.format(folder=folder, vae=tiny_vae))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def one_cpu_thread():
    """Results of this process and its forks do not depend on the machine."""
    import kills

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "default_device", group.default_device)  # put back afterwards, as the rest
        threads, environment = torch.get_num_threads(), dict(os.environ)
        kills.calm()
        yield
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="module")
def whole_run(one_cpu_thread, tiny_config, tmp_path_factory) -> Path:
    """The folder of a run of the tiny configuration that nothing disturbs."""
    import kills

    import train

    folder = tmp_path_factory.mktemp("whole")
    argv = ["--config", tiny_config, "--output", folder / "run"]
    assert kills.attempt(train.main, argv, folder / "printed", [None]) == [0]
    return folder / "run"


@pytest.fixture
def run(one_cpu_thread, tiny_config, tmp_path):
    """Train in forks: run(name, change, ..., plans=...) returns (exit codes, printed). A plan per fork, or None."""
    import kills

    import train

    def run(name: str, *changes: str, plans=(None,), config=tiny_config, **options) -> tuple[list[int], str]:
        argv = ["--config", config, "--output", tmp_path / name, *kills.overrides(changes)]
        (tmp_path / "printed").unlink(missing_ok=True)
        codes = kills.attempt(train.main, argv, tmp_path / "printed", list(plans), **options)
        return codes, (tmp_path / "printed").read_text()

    return run


@pytest.fixture
def with_tokens(tiny_config, tmp_path):
    """An override for features with a column `dino`, 4 x 4 tokens of an encoder, 5 wide."""
    from config import load_config
    from data.columns import add_column

    shutil.copytree(load_config(tiny_config).data.feature_path, tmp_path / "features")
    tokens = np.random.default_rng(0).normal(size=(2, 10, 16, 5)).astype(np.float16)
    for view in range(2):
        np.save(tmp_path / f"{view}.npy", tokens[view])
    add_column(tmp_path / "features", "dino", tmp_path / "0.npy", tmp_path / "1.npy")
    return f"data.feature_path={tmp_path / 'features'}"
