"""Nothing in a training step makes the host wait for the device but the one reading of how many tokens were kept.

On the CPU nothing ever waits, so these tests count what would wait on a GPU: readings of a tensor's values into
Python, and operations whose result has a size that depends on values. Smoothing and attention run as they do there.
"""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from config import load_config
from data.features import open_features
from models import attention
from training.trainer import Trainer

READING = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave",
)


class Waits(TorchDispatchMode):
    """Collects what waits."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.inside = [], False
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))

    def watched(self, name, method):
        def call(tensor, *arguments, **options):
            if self.inside:  # one reading may be made of others
                return method(tensor, *arguments, **options)
            self.found.append(name)
            self.inside = True
            result = method(tensor, *arguments, **options)
            self.inside = False
            return result

        return call

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in arguments[1]
        )
        if (name in WAITING or masked) and not self.inside:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.fixture
def as_on_a_gpu(smooth_on_grid, monkeypatch):
    """Attention by a stand-in for the kernel, which reads nothing on the host."""

    def attend(self, qkv, packing):
        q, k, v = qkv.permute(1, 2, 0, 3)
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)

    monkeypatch.setattr(attention.Attention, "attend", attend)


@pytest.fixture
def make_trainer(tiny_config, tmp_path):
    """make_trainer(options of an Accelerator) -> a Trainer whose steps drop tokens from the third one on."""

    def make(**options) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
        config = load_config(tiny_config, ["training.gradient_accumulation_steps=1", *DROPPING])
        store = open_features(config.data.feature_path, config.data.image_size)
        return Trainer(config, Accelerator(**options), store, Path(tmp_path), None)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


# A range: an entry of a list is drawn with a generator of the host, which would count as a reading
DROPPING = (
    "training.multi_budget_training=true", "training.multi_budget_start_step=2",
    "training.multi_budget_drop_fractions={min: 0.2, max: 0.4}",
)  # fmt: skip
STEPS = 5  # the guard reads the first step's flag in the third; then two steps of the same kind


def test_a_training_step_waits_once(make_trainer, as_on_a_gpu, monkeypatch):
    trainer = make_trainer(cpu=True)
    batches = iter(trainer.batches())
    # On CUDA the guard leaves its decision to the fused optimizer, and reads it two steps later.
    monkeypatch.setattr(trainer.guard, "update", lambda optimizer, norm, step: optimizer.step())
    trainer.optimizer_step(batches)  # tables and optimizer state are made in the first step
    for _ in range(1, STEPS):
        batch = iter([next(batches)])
        waits = Waits(monkeypatch)
        with waits:
            trainer.optimizer_step(batch)
        assert waits.found == ["tolist"]
    trainer.stop.restore()


def test_the_counter_sees_what_waits(monkeypatch):
    x = torch.arange(4.0)
    waits = Waits(monkeypatch)
    with waits:
        x.sum().item(), x[x > 1], x.nonzero(), bool(x.sum() > 0), x.cpu().tolist(), x.tolist()
    assert sorted(set(waits.found)) == ["__bool__", "cpu", "index", "item", "nonzero", "tolist"]


@pytest.mark.cuda
def test_a_training_step_waits_once_on_a_gpu(make_trainer):
    trainer = make_trainer(mixed_precision="bf16")
    batches = [batch for batch, _ in zip(trainer.batches(), range(STEPS))]
    trainer.optimizer_step(iter(batches[:1]))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for batch in batches[1:]:
            with pytest.warns(UserWarning, match="synchroniz") as caught:
                trainer.optimizer_step(iter([batch]))
            assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.stop.restore()
