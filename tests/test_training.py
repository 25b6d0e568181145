"""The parts of a training step: batches, schedules, the ratio loss, checkpoints, and what is logged."""

import json
import multiprocessing
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import OneProcessError, TrainingConfig, UserError, config_from_dict, load_config, to_dict
from models.types import Routing
from training import launch, schedules
from training.batches import Order, Samples, collate, make_loader, read_batches
from training.losses import Terms, Weighted, ratio_loss, total_loss
from training.tracking import LogSums, RunLog, kept_fractions
from weights import checkpoint
from weights.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from weights.ema import ema_decay, initial_share

# ---------------------------------------------------------------------------------------------------- batches


IMAGES = 23  # an epoch has 3 whole batches of 6
GLOBAL_BATCH = 6


def make_order(micro_steps: range, rank=0, world=1, seed=0) -> Order:
    return Order(IMAGES, GLOBAL_BATCH, seed, micro_steps, rank, world)


def global_batches(world: int, first=0, seed=0) -> list[list[tuple[int, int]]]:
    """The batches of micro-steps `first` to 11, put together from the parts of all processes."""
    orders = [list(make_order(range(first, 12), rank, world, seed)) for rank in range(world)]
    for order in orders:
        assert {len(part) for part in order} == {GLOBAL_BATCH // world}
    return [sum(parts, []) for parts in zip(*orders)]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_global_batches_do_not_depend_on_the_processes(world):
    assert global_batches(world) == global_batches(1)


def test_epochs_are_permutations():
    batches = global_batches(1)
    assert [batch[0][0] for batch in batches] == list(range(12))
    epochs = []
    for start in range(0, 12, 3):
        epoch = [image for batch in batches[start : start + 3] for _, image in batch]
        assert len(set(epoch)) == 18
        assert set(epoch) <= set(range(IMAGES))
        epochs.append(tuple(epoch))
    assert len(set(epochs)) == 4  # each in another order
    assert global_batches(1, seed=1) != batches


@pytest.mark.parametrize("first", [1, 3, 7])
def test_order_starts_anywhere(first):
    assert global_batches(1, first=first) == global_batches(1)[first:]
    assert len(make_order(range(first, 12))) == 12 - first


class FakeStore:
    """Latents that say which image they are of, plus noise from the generator as in a real store."""

    labels = np.arange(100) % 7
    columns = {}

    def latent(self, index, generator):
        noise = generator.standard_normal((4, 2, 2), dtype=np.float32)
        return np.full((4, 2, 2), index, dtype=np.float32) + noise / 100


def make_samples(seed=0, dropout=0.5):
    return Samples(FakeStore(), seed, diffusion_steps=1000, dropout=dropout, null_label=7)


def test_a_sample_is_a_function_of_its_key():
    one = make_samples()
    other = make_samples()
    other[3, 5], other[9, 9]  # what was drawn before does not matter
    for a, b in zip(one[2, 50], other[2, 50]):
        assert np.array_equal(a, b)
    noise = one[2, 50].noise
    assert not np.array_equal(noise, one[3, 50].noise)
    assert not np.array_equal(noise, one[2, 51].noise)
    assert not np.array_equal(noise, make_samples(seed=1)[2, 50].noise)


def test_samples_have_the_right_distribution():
    samples = make_samples(dropout=0.25)
    batch = collate([samples[step, image] for step in range(10) for image in range(100)])
    assert batch.x0.shape == batch.noise.shape == (1000, 4, 2, 2)
    assert batch.x0.dtype == batch.noise.dtype == torch.float32
    assert batch.t.dtype == batch.labels.dtype == torch.int64
    assert (batch.x0.mean((1, 2, 3)) - batch.images).abs().max() < 0.1
    assert batch.noise.mean().abs() < 0.03
    assert abs(batch.noise.std() - 1) < 0.03
    assert 0 <= batch.t.min() < 20
    assert 980 < batch.t.max() < 1000
    assert abs(batch.t.float().mean() - 499.5) < 30
    dropped = batch.labels == 7
    assert abs(dropped.float().mean() - 0.25) < 0.05
    assert torch.equal(batch.labels[~dropped], batch.images[~dropped] % 7)


def test_without_dropout_no_label_is_dropped():
    samples = make_samples(dropout=0)
    batch = collate([samples[0, image] for image in range(100)])
    assert torch.equal(batch.labels, batch.images % 7)


def test_loader_gives_a_batch_per_micro_step():
    order = make_order(range(2, 6), rank=1, world=2)
    batches = list(read_batches(make_loader(order, make_samples(), workers=0, pin_memory=False)))
    assert [batch.images.tolist() for batch in batches] == [[image for _, image in keys] for keys in order]


class DamagedStore(FakeStore):
    def latent(self, index, generator):
        raise UserError("shard-00003.npy: is damaged; extract it again")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_and_ends_the_loader(workers):
    samples = Samples(DamagedStore(), 0, diffusion_steps=1000, dropout=0.5, null_label=7)
    batches = read_batches(make_loader(make_order(range(4)), samples, workers, pin_memory=False))
    with pytest.raises(OneProcessError, match="^shard-00003.npy: is damaged; extract it again$"):
        next(batches)
    assert multiprocessing.active_children() == []


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "fractions, indices",
    [(range(4), [0, 1, 0, 2, 2, 3, 2, 3, 3, 2]), (range(7), [4, 0, 2, 5, 3, 1, 2, 5, 1, 4])],
)
def test_multi_budget_draws_are_the_official_ones(fractions, indices):
    fractions = [k / 10 for k in fractions]
    training = TrainingConfig(multi_budget_training=True, multi_budget_drop_fractions=fractions)
    before = torch.get_rng_state()
    assert [schedules.drop_fraction(step, training) for step in range(10)] == [fractions[k] for k in indices]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_continuous_budget_draw():
    """Uniform over the range, a function of seed and step; the configuration survives a round trip."""
    changes = {"multi_budget_training": True, "multi_budget_drop_fractions": {"min": 0.2, "max": 0.6}}
    config = config_from_dict({"training": changes})
    assert config_from_dict(to_dict(config)) == config
    draws = [schedules.drop_fraction(step, config.training) for step in range(2000)]
    assert draws[:3] == [schedules.drop_fraction(step, config.training) for step in range(3)]
    assert 0.2 <= min(draws) < 0.21 and 0.59 < max(draws) < 0.6
    assert np.mean(draws) == pytest.approx(0.4, abs=0.01)
    assert np.std(draws) == pytest.approx(0.4 / 12**0.5, abs=0.01)
    config.training.seed = 1
    assert schedules.drop_fraction(0, config.training) != draws[0]


def test_when_multi_budget_training_starts():
    training = TrainingConfig(multi_budget_training=True, multi_budget_drop_fractions=[0.5])
    assert schedules.drop_fraction(0, training) == 0.5
    training.downsample_factor_warmup_steps = 10  # the default start
    assert [schedules.drop_fraction(step, training) for step in (9, 10)] == [0, 0.5]
    training.multi_budget_start_step = 3
    assert [schedules.drop_fraction(step, training) for step in (2, 3)] == [0, 0.5]
    training.multi_budget_training = False
    assert schedules.drop_fraction(100, training) == 0


def test_downsample_factor():
    training = TrainingConfig(downsample_factor=16.0)
    assert schedules.downsample_factor(0, training) == 16
    training.downsample_factor_start = 4.0
    assert schedules.downsample_factor(0, training) == 16  # there are no warm-up steps
    training.downsample_factor_warmup_steps = 100
    factors = [schedules.downsample_factor(step, training) for step in (0, 25, 50, 100, 1000)]
    assert factors == [4, 7, 10, 16, 16]


def test_learning_rate():
    training = TrainingConfig(learning_rate=0.1)
    assert schedules.learning_rate(0, training) == 0.1
    training.lr_warmup_steps = 9
    rates = [schedules.learning_rate(step, training) for step in range(12)]
    assert rates == pytest.approx([0.1 * min(1, (k + 1) / 10) for k in range(12)])


def test_ema_warmup():
    """By default the decay is constant, as in the official code."""
    constant = TrainingConfig(ema_decay=0.99)
    assert [ema_decay(step, constant) for step in (0, 10**6)] == [0.99, 0.99]
    assert initial_share(70, constant) == pytest.approx(0.99**70)
    rising = TrainingConfig(ema_decay=0.99, ema_warmup=True)
    assert [ema_decay(step, rising) for step in (0, 8, 890, 10**6)] == [0.1, 0.5, 0.99, 0.99]
    assert initial_share(10, rising) < 1e-4


def test_total_steps():
    changes = ["training.global_batch_size=4", "training.ratio_batch_size=4", "training.epochs=3"]
    config = load_config(None, changes)
    assert schedules.total_steps(config, 10) == 6
    config.training.gradient_accumulation_steps = 4
    assert schedules.total_steps(config, 10) == 1
    config.training.max_steps = 77
    assert schedules.total_steps(config, 10) == 77


# ------------------------------------------------------------------------------------------------------- loss


def make_routing(kept, prob):
    """Rows of 12 tokens with the given numbers of boundaries, and constant probabilities per row."""
    boundary = torch.arange(12)[None] < torch.tensor(kept)[:, None]
    prob = torch.tensor(prob)[:, None].expand(-1, 12).clone().requires_grad_()
    return Routing(prob, boundary, torch.zeros_like(boundary))  # what is kept after dropping must not matter


@pytest.mark.parametrize("n", [2.0, 4.0, 12.0])
def test_ratio_loss_is_one_on_target(n):
    assert ratio_loss(make_routing([12 / n], [1 / n]), n).item() == pytest.approx(1)


@pytest.mark.parametrize("kept, prob", [(3, 0.1), (0, 0.3), (12, 0.9), (6, 0.5)])
def test_ratio_loss_value_and_gradient(kept, prob):
    routing, n, f = make_routing([kept], [prob]), 4.0, kept / 12
    loss = ratio_loss(routing, n)
    assert loss.item() == pytest.approx(n / (n - 1) * ((1 - f) * (1 - prob) + f * prob * (n - 1)))
    (gradient,) = torch.autograd.grad(loss, routing.prob)
    assert gradient.sum().item() == pytest.approx(n / (n - 1) * (n * f - 1), abs=1e-6)  # zero where F = 1 / N


def test_ratio_loss_averages_over_groups():
    kept, prob = [0, 3, 6, 12], [0.1, 0.4, 0.2, 0.9]
    whole = ratio_loss(make_routing(kept, prob), 4.0)
    pairs = ratio_loss(make_routing(kept, prob), 4.0, group_size=2)
    halves = [ratio_loss(make_routing(kept[k : k + 2], prob[k : k + 2]), 4.0).item() for k in (0, 2)]
    assert pairs.item() == pytest.approx(sum(halves) / 2)
    assert pairs.item() != pytest.approx(whole.item())
    assert ratio_loss(make_routing(kept, prob), 4.0, group_size=4).item() == pytest.approx(whole.item())


def test_ratio_loss_averages_in_float32():
    prob = torch.linspace(0, 1, 3 * 1000).view(3, 1000).bfloat16()
    loss = ratio_loss(Routing(prob, prob > 0.5, prob > 0.5), 4.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ratio_loss(Routing(prob.float(), prob > 0.5, prob > 0.5), 4.0))


def test_ratio_loss_trains_the_probability_only():
    prob = torch.full((2, 6), 0.4, requires_grad=True)
    ratio_loss(Routing(prob, prob > 0.3, prob > 2), 4.0).backward()
    assert prob.grad.isfinite().all()
    assert (prob.grad > 0).all()  # all kept: every probability goes down


def test_the_total_loss_is_made_of_its_parts():
    terms = {"mse": torch.tensor([1.0, 3.0]), "vb": torch.tensor([0.5, 0.5])}
    routing = make_routing([3, 6], [0.1, 0.4])
    losses = total_loss(terms, {"ratio": Weighted(0.5, ratio_loss(routing, 4.0))})
    assert list(losses) == ["loss", "mse", "vb", "diffusion_loss", "ratio_loss"]
    assert losses["diffusion_loss"].tolist() == [1.5, 3.5]
    assert torch.equal(losses["ratio_loss"], ratio_loss(routing, 4.0))
    assert losses["loss"].item() == pytest.approx(2.5 + 0.5 * losses["ratio_loss"].item())


def test_without_weight_there_is_no_ratio_loss():
    config = load_config(None, ["training.ratio_loss_weight=0"])
    terms = Terms(config, FakeStore())
    assert not terms.prepared
    losses = total_loss({"mse": torch.tensor([1.0, 3.0])}, terms(None, None, 0))
    assert list(losses) == ["loss", "mse", "diffusion_loss"]
    assert losses["loss"].item() == 2.0


# ------------------------------------------------------------------------------------------------ checkpoints


# What a checkpoint needs, without its step
EMPTY = {"config": {}, "model": {}, "ema": {}, "autoencoder": None, "class_names": None}


def test_checkpoints_are_numbered_pruned_and_plain(tmp_path):
    for step in (5, 10, 999, 12345678):
        state = {**EMPTY, "step": step, "model": {"w": torch.full((2,), float(step))}}
        path = save_checkpoint(tmp_path, state, keep=2)
    assert path.name == "12345678.pt"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000999.pt", "12345678.pt"]
    assert sorted(os.listdir(tmp_path)) == ["0000999.pt", "12345678.pt"]
    assert torch.load(path, weights_only=True)["step"] == 12345678
    state = load_checkpoint(path)
    assert state["format"] == 1 and torch.equal(state["model"]["w"], torch.full((2,), 12345678.0))
    for step in (20, 30):
        save_checkpoint(tmp_path, {**EMPTY, "step": step}, keep=0)
    assert len(list_checkpoints(tmp_path)) == 4


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("best.pt", "12.pt", "0000001.partial", "0000001.pt.bak", "-000001.pt"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == [] and list_checkpoints(tmp_path / "nowhere") == []


def test_an_interrupted_save_leaves_the_earlier_files(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {**EMPTY, "step": 1}, keep=1)

    def cut_off(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.torch, "save", cut_off)
        save_checkpoint(tmp_path, {**EMPTY, "step": 2}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000001.pt"]
    save_checkpoint(tmp_path, {**EMPTY, "step": 2}, keep=1)
    assert os.listdir(tmp_path) == ["0000002.pt"]


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_loading_executes_nothing(tmp_path, zipped):
    content = {"format": 1, "x": Malicious(tmp_path / "executed")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is not a readable checkpoint of this repository"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # the file is what the test believes it is


def test_unreadable_checkpoints(tmp_path):
    path = save_checkpoint(tmp_path, {**EMPTY, "step": 1, "w": torch.zeros(1000)}, keep=0)
    whole = path.read_bytes()
    wrong = {
        "truncated": whole[:2000],
        "cut in the middle of the index": whole[:-10],
        "empty": b"",
        "text": b"hello\nworld\n" * 100,
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1], tmp_path / "a list")
    torch.save({"step": 1}, tmp_path / "without format")
    torch.save({"format": 2}, tmp_path / "of another format")
    (tmp_path / "folder").mkdir()
    for name in (*wrong, "a list", "without format", "of another format", "folder", "nowhere"):
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / name, "--option")
        message = str(caught.value)
        assert message.startswith(f"--option '{tmp_path / name}'") and "\n" not in message, name


# ------------------------------------------------------------------------------------------------------- logs


def one_process(**changes) -> SimpleNamespace:
    """What LogSums and RunLog need of an accelerator."""
    logged = []
    place = {"num_processes": 1, "process_index": 0, "device": torch.device("cpu"), "is_main_process": True}
    functions = {"gather": lambda x: x, "log": lambda scalars, step: logged.append((step, scalars))}
    return SimpleNamespace(**place | functions | changes, logged=logged)


def test_averages_against_numpy():
    averages, seen = LogSums(one_process()), []
    for _ in range(5):
        seen.append(torch.rand(7) * 3 - 1)
        averages.add({"x": seen[-1]})
        averages.add({"scalar": seen[-1].sum()[None]})
    values = torch.cat(seen).double().numpy()
    reduced = averages.reduce()
    want = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    assert reduced["x"] == pytest.approx(want, rel=1e-5)
    assert reduced["scalar"]["mean"] == pytest.approx(values.sum() / 5, rel=1e-5)
    averages.add({"x": torch.tensor([2.0])})
    assert averages.reduce() == {"x": {"mean": 2, "std": 0, "min": 2, "max": 2}}  # it started anew


def test_averages_over_processes():
    """Two processes with different values report what one with all of them reports."""
    values = torch.rand(2, 6)
    single, rows = LogSums(one_process()), []
    single.add({"x": values.flatten()})
    for part in values:
        other = LogSums(one_process())
        other.add({"x": part})
        rows.append(torch.stack(other.rows["x"]))  # (1, 5)

    def gather(own):
        return torch.stack(rows).to(own)  # (world, names, 5)

    pair = LogSums(one_process(num_processes=2, gather=gather))
    pair.add({"x": values[0]})
    assert pair.reduce()["x"] == pytest.approx(single.reduce()["x"], rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_averages_continue_after_a_resume(world):
    """Also on another number of processes, and there every process has as many rows as the others."""
    whole, first = LogSums(one_process()), LogSums(one_process())
    for averages in (whole, first):
        averages.add({"x": torch.tensor([1.0, 5.0])})
        averages.add({"x": torch.tensor([-2.0])})
    state = first.state_dict()
    assert state["x"].shape == (1, 2, 5)
    whole.add({"x": torch.tensor([3.0, 4.0])})
    rows = []
    for rank in range(world):
        resumed = LogSums(one_process(num_processes=world, process_index=rank))
        resumed.load_state_dict(state)
        resumed.add({"x": torch.tensor([3.0, 4.0]).chunk(world)[rank]})
        rows.append(torch.stack(resumed.rows["x"]))
    assert len({len(part) for part in rows}) == 1
    together = LogSums(one_process())
    together.rows["x"] = list(torch.cat(rows))
    assert together.reduce()["x"] == pytest.approx(whole.reduce()["x"])


def test_kept_fractions():
    boundary = torch.tensor([[True, True, False, True], [True, False, False, True]])
    keep = torch.tensor([[True, False, False, True], [True, False, False, True]])
    fractions = kept_fractions(Routing(boundary.float(), boundary, keep))
    assert fractions["kept_natural"].tolist() == [0.75, 0.5]
    assert fractions["kept_effective"].tolist() == [0.5, 0.5]


def test_metrics(tmp_path):
    accelerator = one_process()
    log = RunLog(tmp_path, accelerator, step=0)
    log.metrics(5, {"loss": 1.5, "steps_per_sec": 3.0})
    log.line("hello")
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row) == {"step": 5, "loss": 1.5}
    assert accelerator.logged == [(5, {"train/loss": 1.5, "train/steps_per_sec": 3.0})]
    assert (tmp_path / "log.txt").read_text().endswith("] hello\n")
    quiet = tmp_path / "other process"
    quiet.mkdir()
    RunLog(quiet, one_process(is_main_process=False), step=0).line("hello")
    assert os.listdir(quiet) == []


@pytest.mark.parametrize("tail", ["", '{"step": 40, "lo', "\x00\x00"])
def test_a_resumed_run_drops_later_rows(tmp_path, tail):
    rows = [json.dumps({"step": step}) + "\n" for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + tail)
    RunLog(tmp_path, one_process(), step=20)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:2])
    RunLog(tmp_path, one_process(), step=100)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:2])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_no_limit_on_the_gradient_norm_leaves_gradients_as_they_are():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1e10, -2.0, 0.0])
    config = load_config(None, ["training.max_grad_norm=.inf"])
    torch.nn.utils.clip_grad_norm_([parameter], config.training.longest_gradient)
    assert parameter.grad.tolist() == torch.tensor([1e10, -2.0, 0.0]).tolist()


@pytest.mark.parametrize(
    "device, launcher, precision, resumed, chosen",
    [
        ("cuda", None, "auto", None, "bf16"),
        ("cuda", "no", "auto", None, "no"),
        ("cuda", "fp16", "auto", None, "fp16"),
        ("cuda", "bf16", "fp32", None, "no"),
        ("cuda", "no", "bf16", None, "bf16"),
        ("cpu", None, "auto", None, "no"),
        ("fast cpu", None, "auto", None, "bf16"),
        ("fast cpu", "no", "auto", None, "no"),
        ("fast cpu", None, "fp32", None, "no"),
        ("cpu", "bf16", "auto", None, "bf16"),
        # A resumed run keeps its precision on another processor, and if its checkpoint is older than the entry
        ("cpu", None, "auto", {"optimizer": {}, "precision": "bf16"}, "bf16"),
        ("fast cpu", None, "auto", {"optimizer": {}, "precision": "no"}, "no"),
        ("fast cpu", None, "auto", {"optimizer": {}}, "no"),
        ("cuda", None, "auto", {"optimizer": {}}, "bf16"),
        # `accelerate launch` names a precision even if nobody asked for one
        ("cuda", "no", "auto", {"optimizer": {}, "precision": "bf16"}, "bf16"),
        ("cpu", "bf16", "auto", {"optimizer": {}, "precision": "no"}, "no"),
        ("cuda", "no", "auto", {"optimizer": {}}, "no"),
        # Weights to start from are no run
        ("fast cpu", None, "auto", {}, "bf16"),
    ],
)
def test_the_precision_is_the_configurations_or_the_launchers_or_the_checkpoints(
    device, launcher, precision, resumed, chosen, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(launch, "has_bf16_products", lambda: device == "fast cpu")
    config = load_config(None, [f"training.precision={precision}"])
    kind = torch.device(device.split()[-1])
    assert launch.choose_precision(config, kind, resumed) == chosen


def test_a_launcher_that_compiles_is_refused(monkeypatch):
    """Its wrapper would rename all weights in checkpoints, and hide parameters from training.frozen."""
    for backend in ("NO", "no"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        launch.check_dynamo()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="--dynamo_backend INDUCTOR: is not supported; use no .*compile=true"):
        launch.check_dynamo()


def test_narrow_models_train_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(launch, "has_bf16_products", lambda: True)
    cpu = torch.device("cpu")
    for width, chosen in ((launch.BF16_WIDTH, "bf16"), (launch.BF16_WIDTH // 2, "no")):
        shape = [f"d_model=[{width},{width}]", "num_heads=[4,4]", "enc_dec_dim_factor=[1,null]"]
        config = load_config(None, [f"model.hnet.{key}" for key in shape])
        assert launch.choose_precision(config, cpu, None) == chosen


# -------------------------------------------------------------------------------------------------- the start


def test_the_start_tells_the_scale_of_the_latents(tiny_config, run, tmp_path):
    """It is measured on what is trained first; where it matters, one that is far from 1 is a warning."""
    shutil.copytree(load_config(tiny_config).data.feature_path, tmp_path / "features")
    moments = np.load(tmp_path / "features" / "shard-00000.npy")
    moments[:, :, :4] = np.random.default_rng(0).normal(size=moments[:, :, :4].shape)
    moments[:, :, 4:] = 0
    changes = [f"data.feature_path={tmp_path / 'features'}", "training.max_steps=1"]
    for factor, is_far in ((1, False), (40, True)):
        # The files have checksums, which are compared on demand alone
        np.save(tmp_path / "features" / "shard-00000.npy", moments * np.float16(factor))
        for number, objective in enumerate(("flow", "gaussian")):
            codes, printed = run(f"{factor}{number}", *changes, f"diffusion.objective={objective}")
            assert codes == [0]
            (deviation,) = re.findall(r"latents of standard deviation ([\d.e+]+), starting, ", printed)
            assert float(deviation) == pytest.approx(factor, rel=0.1)
            assert ("expects about 1; extract features" in printed) == (is_far and objective == "flow")
