"""Around the network: loading features, writing a checkpoint, optimizer and EMA, and more processes."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cases import load, make_case
from benchmarks.measure import medians, synchronize
from benchmarks.steps import Training
from config import to_dict
from data.feature_writer import FeatureWriter, StoreSettings
from data.features import Features, open_features
from models import build_model
from weights.checkpoint import save_checkpoint

KINDS = ("moments", "sample", "official")


def measure_loading(images: int, seconds: float) -> list[dict]:
    """Latents per second out of each kind of feature store, read at random, with the page cache cold and warm."""
    return [measure_store(kind, images, seconds / len(KINDS)) for kind in KINDS]


def measure_store(kind: str, images: int, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), kind, images)
        draw = np.random.default_rng(0)
        order = draw.permutation(images)

        def read() -> None:
            for k in order:
                store.latent(int(k), draw)

        cold = float("inf")  # not measured: 0 images/s
        if forget(Path(name)):
            start = time.perf_counter()
            read()
            cold = time.perf_counter() - start
        warm = medians({kind: read}, torch.device("cpu"), seconds)[kind]
    return {"store": kind, "cold images/s": images / cold, "warm images/s": images / warm}


def make_store(folder: Path, kind: str, images: int) -> Features:
    """A store of random latents (4, 32, 32)."""
    draw = np.random.default_rng(0)
    if kind == "official":
        write_official(folder, images, draw)
        return open_features(folder, 256)
    settings = StoreSettings(
        kind=kind,
        views=2 if kind == "moments" else 1,
        flip=True,
        dtype="float32",
        image_size=256,
        latent_shape=(4, 32, 32),
        seed=0,
        shard_size=1024,
        source_count=images,
        source_hash="",
        autoencoder={},
        class_names=["one"],
    )
    writer = FeatureWriter(folder, settings, [0] * images)
    for shard in writer.prepare() or []:
        shape = (len(writer.sources(shard)), *settings.item_shape)
        writer.write(shard, draw.standard_normal(shape, dtype=np.float32), [])
    writer.finish()
    return open_features(folder, 256)


def write_official(folder: Path, images: int, draw: np.random.Generator) -> None:
    """The official layout: a file of latents and one of labels per image."""
    for name in ("features", "labels"):
        (folder / f"imagenet256_{name}").mkdir()
    for index in range(images):
        latent = draw.standard_normal((1, 4, 32, 32), dtype=np.float32)
        np.save(folder / "imagenet256_features" / f"{index}.npy", latent)
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.zeros(1, np.int64))


def forget(folder: Path) -> bool:
    """Have the operating system drop the files from its cache. False where it cannot be asked to, as on macOS."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.rglob("*.npy"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True


def measure_updates(name: str, device: torch.device, seconds: float) -> list[dict]:
    """Milliseconds of one optimizer step, one EMA update and one checkpoint, in the ways there are."""
    config = load(name)
    with device:
        model = build_model(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    optimizers = {
        f"AdamW {way}": torch.optim.AdamW(model.parameters(), **options) for way, options in ways.items()
    }
    ema, average = ModelEmaV3(model, decay=0.9999), ModelEmaV3(model, decay=0.9999, foreach=False)
    functions = {way: optimizer.step for way, optimizer in optimizers.items()}
    functions |= {"EMA loop": lambda: average.update(model), "EMA foreach": lambda: ema.update(model)}
    times = medians(functions, device, seconds)
    state = {
        "step": 1,
        "config": to_dict(config),
        "model": model.state_dict(),
        "ema": ema.module.state_dict(),
    }
    state["optimizer"] = optimizers["AdamW fused"].state_dict()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = save_checkpoint(Path(folder), state, keep=0)
        times[f"checkpoint of {path.stat().st_size / 1e6:.0f} MB"] = time.perf_counter() - start
    return [{"model": name, "what": way, "ms": value * 1e3} for way, value in times.items()]


def measure_processes(name: str, batch: int, cuda: bool, bf16: bool, steps: int) -> list[dict]:
    """Images per second of training with 1, 2, ... processes, each with a batch of its own and one device or CPU thread."""
    most = torch.cuda.device_count() if cuda else os.cpu_count()
    rows = []
    for world in [count for count in (1, 2, 4, 8) if count <= most]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, folder, name, batch, cuda, bf16, steps)
            torch.multiprocessing.spawn(_train, arguments, nprocs=world)
            seconds = float((Path(folder) / "seconds").read_text())
        rows.append({"model": name, "processes": world, "images/s": world * batch / seconds})
    return [row | {"of ideal": row["images/s"] / rows[0]["images/s"] / row["processes"]} for row in rows]


def _train(
    rank: int, world: int, folder: str, name: str, batch: int, cuda: bool, bf16: bool, steps: int
) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    case = make_case(load(name), batch, device, bf16)
    step = Training(
        case, DistributedDataParallel(case.model, gradient_as_bucket_view=True, broadcast_buffers=False)
    )
    for k in range(steps + 2):
        if k == 2:  # the first ones allocate
            synchronize(device)
            dist.barrier()
            start = time.perf_counter()
        step()
    synchronize(device)
    dist.barrier()
    if rank == 0:
        (Path(folder) / "seconds").write_text(str((time.perf_counter() - start) / steps))
    dist.destroy_process_group()
