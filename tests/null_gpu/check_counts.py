"""Exact counts on the null GPU: what a step launches, reads, waits for and occupies.

Launches and memory are those of PyTorch 2.14. Other versions may differ by the slack. A change that costs more has
to say so here.
"""

import gc
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from config import Config, load_config
from data.autoencoder import Autoencoder
from data.features import open_features
from models import build_model
from null_gpu.counts import Counts, counting
from sampling.arguments import with_cuda_graphs
from sampling.budgets import ALL, Budget
from sampling.denoising import sample_latents
from sampling.load import TrainedModel
from sampling.options import SamplingOptions
from training.batches import Batch
from training.trainer import Trainer

GIB = 2**30
SLACK = 1.02


# ----------------------------------------------------------------------------------------------------- training


@pytest.fixture
def make_trainer(tiny_config, tmp_path):
    """make_trainer(name, override, ...) -> a Trainer of configs/NAME.yaml in bfloat16."""
    trainers = []

    def make(name: str, *overrides: str) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        # Networks of other tests would count
        gc.collect()
        torch.cuda.empty_cache()
        store = open_features(load_config(tiny_config).data.feature_path, 32)
        config = load_config(f"configs/{name}.yaml", list(overrides))
        trainers.append(Trainer(config, Accelerator(mixed_precision="bf16"), store, tmp_path, None))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.stop.restore()
    AcceleratorState._reset_state(reset_partial_state=True)


def make_batch(config: Config) -> Batch:
    """A batch as the loader hands it out: in pinned memory."""
    batch = config.training.global_batch_size
    latents = torch.zeros(batch, *config.latent_shape)
    numbers = torch.zeros(batch, dtype=torch.int64)
    return Batch(*[tensor.pin_memory() for tensor in (latents, latents, numbers, numbers, numbers)])


def count_step(trainer: Trainer, warm_up: int = 3) -> Counts:
    """Counts of one step, after others in which tables, kernels and memory were made."""
    for _ in range(warm_up):
        trainer.optimizer_step(iter([make_batch(trainer.config)]))
    batch = iter([make_batch(trainer.config)])
    torch.cuda.reset_peak_memory_stats()
    with counting() as counts:
        trainer.optimizer_step(batch)
    return counts


DROPPING = ["training.multi_budget_start_step=0", "training.multi_budget_drop_fractions={min: 0.2, max: 0.4}"]


@pytest.mark.parametrize("overrides", [[], DROPPING])
def test_a_training_step_reads_once(make_trainer, overrides):
    """It reads the number of kept tokens, and waits for nothing else: the guard's flag has arrived long before."""
    counts = count_step(make_trainer("DCDiT-S-N4", "training.global_batch_size=16", *overrides))
    assert counts.to_host == 2  # the number of tokens, and the flag, which nobody waits for
    assert counts.waits == 1
    assert counts.event_waits == 1  # of two steps before
    assert counts.to_device == 4
    assert counts.unsafe == 0


def test_a_step_of_a_static_dit_waits_for_nothing(make_trainer):
    counts = count_step(make_trainer("DiT-S-2", "training.global_batch_size=8"))
    assert (counts.to_host, counts.waits, counts.event_waits) == (1, 0, 1)


@pytest.mark.parametrize(
    "name, launches, products, convolutions, gib",
    [("DCDiT-B-N4", 1804, 216, 44, 25.8), ("DiT-B-2", 1309, 191, 2, 18.9)],
)
def test_launches_and_memory_of_a_training_step(
    make_trainer, kept_tokens, name, launches, products, convolutions, gib
):
    """Of 256 images, which keep a quarter of their tokens."""
    kept_tokens.vary = 1
    counts = count_step(make_trainer(name))
    assert counts.launches <= SLACK * launches
    assert (counts.products, counts.convolutions) == (products, convolutions)
    assert counts.allocations == 0
    assert torch.cuda.max_memory_allocated() <= SLACK * gib * GIB


def test_memory_settles_when_the_number_of_tokens_varies(make_trainer, kept_tokens):
    """The caching allocator has pieces for every T when it has seen them twice."""
    kept_tokens.vary = 8
    counts = count_step(make_trainer("DCDiT-B-N4"), warm_up=16)
    assert counts.allocations == 0
    assert torch.cuda.memory_reserved() <= 50 * GIB


def test_attention_is_flash(make_trainer):
    """cuDNN would make a plan for every number of tokens."""
    counts = count_step(make_trainer("DCDiT-S-N4", "training.global_batch_size=16"))
    assert "cudnn_graph" not in counts.kernels
    assert launches_of(counts, "flash_fwd") == launches_of(counts, "flash_bwd_dq_dk_dv") == 12


def launches_of(counts: Counts, name: str) -> int:
    """Launches of the kernels with this in their names."""
    return sum(number for kernel, number in counts.kernels.items() if name in kernel)


# ----------------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def make_trained(tiny_vae):
    """make_trained(name) -> a random model of configs/NAME.yaml on the device."""

    def make(name: str) -> TrainedModel:
        config = load_config(f"configs/{name}.yaml")
        model = build_model(config).cuda().eval()
        return TrainedModel(model, config, Autoencoder.load(str(tiny_vae), "cuda"), None, 0, "")

    return make


@torch.inference_mode()
def count_sampling_step(trained: TrainedModel, batch: int, **options) -> Counts:
    """Counts of one step more, guided and in bfloat16."""
    counts = []
    for steps in (8, 8, 9):  # the first is a warm-up
        chosen = SamplingOptions(cfg_scale=4.0, num_sampling_steps=steps, bf16=True, **options)
        with counting() as counted:
            sample_latents(trained, list(range(batch)), [0] * batch, chosen)
        counts.append(counted)
    return difference(counts[2], counts[1])


def difference(longer: Counts, shorter: Counts) -> Counts:
    values = {}
    for name, value in vars(longer).items():
        values[name] = {} if name == "kernels" else value - getattr(shorter, name)
    return Counts(**values)


LITE = {"budget": Budget.tokens(128), "uncond": Budget.tokens(32)}


@pytest.mark.parametrize(
    "name, options, readings, launches",
    [
        ("DCDiT-B-N4", {"budget": ALL}, 1, 423),
        ("DCDiT-B-N4", {"budget": Budget.fraction(0.5)}, 1, 448),
        ("DCDiT-B-N4", {"budget": Budget.tokens(128)}, 0, 433),
        ("DCDiT-B-N4", LITE, 0, 435),
        ("DiT-B-2", {"budget": ALL}, 0, 245),
    ],
)
def test_a_sampling_step(make_trained, name, options, readings, launches):
    """Of one image, guided. With a token budget, and without a router, the host waits for nothing."""
    counts = count_sampling_step(make_trained(name), 1, **options)
    assert (counts.to_host, counts.waits, counts.event_waits) == (readings, readings, 0)
    assert counts.launches <= SLACK * launches
    assert counts.allocations == 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("DCDiT-B-N4", {"budget": Budget.tokens(128)}),
        ("DCDiT-B-N4", LITE),
        ("DiT-B-2", {"budget": ALL}),
    ],
)
def test_a_sampling_step_as_a_graph(make_trained, name, options):
    """One launch for the network; the others are guidance and sampler."""
    trained = make_trained(name)
    graphed = with_cuda_graphs(trained, SamplingOptions(**options))
    with counting() as recording:
        counts = count_sampling_step(graphed, 8, **options)
    assert counts.graph_launches == 1
    assert counts.launches <= 36
    assert (counts.to_host, counts.waits, counts.captured, counts.unsafe) == (0, 0, 0, 0)
    assert recording.unsafe == 0


def test_a_capture_refuses_what_is_unsafe():
    """The null GPU itself: as on a real one, what the host would have to wait for ends the capture."""
    x = torch.ones(4, device="cuda")
    attempts: list[Callable] = [
        x.sum().item,
        x.tolist,
        torch.cuda.synchronize,
        lambda: x + torch.ones(4).cuda(),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            attempt()


def test_memory_has_an_end():
    """The null GPU itself: the caching allocator raises what it raises on a real one."""
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(90 * GIB, dtype=torch.uint8, device="cuda")
