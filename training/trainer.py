"""The training loop. Start reading at `Trainer.run_steps`, `Trainer.optimizer_step` and `Trainer.loss`."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, OneProcessError, UserError, to_dict, validate_processes
from data.features import Features
from data.streams import rng
from data.workers import NoBatch
from diffusion import build_process
from models import build_model, compile_parts, draws_at_random
from processes.sharding import forward, full_tensor, gather_full_state, is_sharded
from processes.stop import EndlessWait, StopRequest
from processes.watch import ProcessWatch
from training import launch, schedules
from training.batches import Batch, Order, Samples, make_loader, read_batches, sample_stream
from training.guard import FiniteGuard, nan_gradients_if_not_finite
from training.losses import Terms, total_loss
from training.optimizer import is_part, load_optimizer, make_optimizer, set_learning_rate
from training.sample_grids import grid_path
from training.tracking import (
    LogSums,
    RunLog,
    flatten_statistics,
    kept_fractions,
    make_profiler,
    training_tflop,
)
from weights.averages import WeightAverages
from weights.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from weights.ema import MAX_INITIAL_SHARE, ema_decay, initial_share

# Values in the line that every log step prints
SUMMARY = (
    "loss",
    "diffusion_loss",
    "grad_norm",
    "kept_natural_mean",
    "kept_effective_mean",
    "tflop_per_image",
    "steps_per_sec",
    "images_per_sec",
    "model_flop_utilisation",
)


FIRST_IMAGES = 64  # whose latents are measured at the start
FAR_DEVIATION = 2.0  # of the latents from 1, as a factor


@dataclass(frozen=True)
class Hooks:
    """What a run does with its EMA between steps. Both are called as (ema_model, step) on every process."""

    # Every `logging.sample_every` steps
    draw_samples: Callable[[nn.Module, int], None] | None = None
    # Every `evaluation.every` steps; the main process gets the metrics, the others an empty dictionary
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None


class Trainer:
    """One run in one folder.

    Args:
        config: checked configuration.
        accelerator: device, precision, processes and trackers.
        store: the features to train on.
        folder: gets log.txt, metrics.jsonl and checkpoints/.
        state: a checkpoint to resume from (without "optimizer": weights to start from), or None.
        hooks: samples and metrics of the EMA.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        store: Features,
        folder: Path,
        state: Checkpoint | None,
        hooks: Hooks | None = None,
    ):
        self.config = config
        self.accelerator = accelerator
        self.store = store
        self.folder = folder
        self.hooks = hooks or Hooks()
        training = config.training
        validate_processes(config, accelerator.num_processes)
        # Noise schedule and loss
        self.diffusion = build_process(**config.process)
        # Model, EMA, optimizer and the counters of the log, as in the checkpoint if there is one
        self.step = 0 if state is None else state["step"]
        self.last_step = schedules.total_steps(config, len(store))
        self.log_sums = LogSums(accelerator)
        self.guard = FiniteGuard(training.max_skipped_steps, self.report_skipped, self.report_stop)
        self.build(state)
        if state is not None and "optimizer" in state:
            load_optimizer(self.optimizer, state["optimizer"])
            self.log_sums.load_state_dict(state["averages"])
            self.guard.load_state_dict(state["skipped"])
        # Data order, log, signals and watch
        self.order = self.make_order()
        self.last_unexplained = -1  # the last skipped step whose latents were all finite
        self.log = RunLog(folder, accelerator, self.step)
        self.stop = StopRequest(accelerator)
        self.watch = ProcessWatch(accelerator.process_index, accelerator.num_processes, training.rank_timeout)

    def build(self, state: Checkpoint | None) -> None:
        """Make model, EMA and optimizer, with weights from the seed or from a checkpoint."""
        training = self.config.training
        sharded = is_sharded(self.accelerator)
        torch.manual_seed(training.seed)
        # A model that is to be sharded may fit into the memory of the host only
        model = build_model(self.config).to("cpu" if sharded else self.accelerator.device)
        self.ema = ModelEmaV3(model, decay=training.ema_decay, exclude_buffers=True)
        self.weight_averages = WeightAverages(self.config, model)
        self.terms = Terms(self.config, self.store)
        self.terms.modules.to(self.accelerator.device)
        optimizer = make_optimizer(model, training, self.terms.modules.parameters())
        if state is not None:
            model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            if "optimizer" in state:
                saved = {"posthoc": state.get("posthoc", {}), **state.get("weight_averages", {})}
                self.weight_averages.load_state_dict(saved, self.step)
                self.terms.modules.load_state_dict(state.get("terms", {}))
        models = [model, self.ema.module, self.terms.modules]
        launch.check_same_start(self.accelerator, self.config, self.store, self.step, models)
        # Compile and distribute them
        if training.compile:
            compile_parts(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.terms.prepare(self.accelerator)
        if sharded:
            self.ema.module = fsdp2_prepare_model(self.accelerator, self.ema.module)
        # Find the parameters that do not change in the first steps
        self.frozen: list[nn.Parameter] = []
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if any(is_part(name, entry) for entry in training.frozen):
                self.frozen.append(parameter)

    # ----------------------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Train to the last step. Returns False if a signal ended it early, after a last checkpoint."""
        try:
            self.run_steps()
            self.watch.close()
        except RuntimeError:
            self.watch.explain()
            raise
        self.stop.restore()
        if self.step >= self.last_step:
            self.warn_of_late_ema("holds")
        return self.step >= self.last_step

    def run_steps(self) -> None:
        """Steps, each followed by what is due: log line, checkpoint, samples, evaluation.

        If the loader fails or a file of the features cannot be read, the program exits with one line, after a last
        checkpoint if no other process waits for this step.
        """
        logging = self.config.logging
        evaluation = self.config.evaluation
        saved_step = self.step
        failure: NoBatch | OneProcessError | None = None
        self.start_clock()
        self.finish_interrupted_step()
        # Leaving the block ends the loader processes, whatever has happened
        with (
            contextlib.closing(self.batches()) as batches,
            self.progress_bar() as bar,
            self.profiler() as profiler,
        ):
            while self.step < self.last_step and not self.stop.requested():
                complete_rows = self.log_sums.sizes()
                try:
                    self.optimizer_step(batches)
                except (NoBatch, OneProcessError) as error:
                    # Forget the part of the step that was done
                    self.log_sums.cut(complete_rows)
                    failure = error
                    break
                bar.update()
                if profiler is not None:
                    profiler.step()
                if self.is_due(logging.log_every) or self.step == self.last_step:
                    bar.set_postfix_str(self.report())
                if self.is_due(logging.ckpt_every):
                    self.save()
                    saved_step = self.step
                if self.is_due(logging.sample_every):
                    self.draw_samples()
                if self.is_due(evaluation.every):
                    self.run_evaluation()
        # Keep what was learned since the last checkpoint
        can_save = failure is None or self.accelerator.num_processes == 1
        if saved_step != self.step and can_save:
            self.save()
        if isinstance(failure, OneProcessError):
            raise failure
        if failure is not None:
            print(f"\n{failure}", file=sys.stderr, flush=True)
            sys.exit(128 + self.stop.received if self.stop.received else 1)

    def is_due(self, every: int) -> bool:
        """Whether an action with this interval follows the current step. An interval of 0 means never."""
        return every > 0 and self.step % every == 0

    def optimizer_step(self, batches: Iterator[Batch]) -> None:
        """Accumulate gradients over the micro-batches, then update weights, EMA and other averages."""
        training = self.config.training
        set_learning_rate(self.optimizer, schedules.learning_rate(self.step, training))
        # Accumulate gradients; processes add theirs up after the last micro-batch
        accumulation = training.gradient_accumulation_steps
        for micro_step in range(accumulation):
            is_last = micro_step == accumulation - 1
            with contextlib.nullcontext() if is_last else self.no_sync():
                batch = self.next_batch(batches)
                loss = nan_gradients_if_not_finite(self.loss(batch))
                self.accelerator.backward(loss / accumulation)
        # Hide the gradients of frozen parameters from the norm and from the optimizer
        if self.step < training.frozen_steps:
            for parameter in self.frozen:
                parameter.grad = None
        # Update the weights if the gradients are finite, then the EMA
        parameters = [*self.model.parameters(), *self.terms.modules.parameters()]
        norm = full_tensor(self.accelerator.clip_grad_norm_(parameters, training.longest_gradient))
        local_batch = training.global_batch_size // self.accelerator.num_processes
        self.log_sums.add({"grad_norm": norm.expand(local_batch)})
        self.guard.update(self.optimizer, norm, self.step)
        self.optimizer.zero_grad()
        self.ema.decay = ema_decay(self.step, training)
        self.ema.update(self.accelerator.unwrap_model(self.model))
        self.step += 1
        self.weight_averages.update(self.accelerator.unwrap_model(self.model), self.step)
        self.watch.at(self.step, None)

    def no_sync(self) -> contextlib.ExitStack:
        """A block in which the processes keep their gradients to themselves."""
        stack = contextlib.ExitStack()
        for module in (self.model, *self.terms.owners):
            stack.enter_context(self.accelerator.no_sync(module))
        return stack

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch. Raises NoBatch if the loader fails, or gives none for too long."""
        self.watch.at(self.step, "reading images")
        patience = self.config.training.rank_timeout
        start = time.monotonic()
        try:
            with self.stop.limit_wait(patience):
                batch = next(batches)
        except EndlessWait:
            seconds = time.monotonic() - start
            raise NoBatch(
                f"error: data.feature_path: '{self.config.data.feature_path}' has given no batch for "
                f"{seconds:.0f} s; run the same command again to resume"
            ) from None
        self.watch.at(self.step, "training")
        return batch

    def loss(self, batch: Batch) -> Tensor:
        """Forward pass and loss of one micro-batch. All terms go to the averages."""
        x0 = self.on_device(batch.x0)  # (B, C, S, S)
        noise = self.on_device(batch.noise)
        t = self.on_device(batch.t)  # (B,)
        labels = self.on_device(batch.labels)
        columns = {name: self.on_device(values) for name, values in batch.columns.items()}
        # Multi-budget training drops the same fraction in the whole batch
        fraction = schedules.drop_fraction(self.step, self.config.training)
        drop = x0.new_full((len(x0),), fraction) if fraction else None  # (B,)

        x_t = self.diffusion.add_noise(x0, t, noise)
        options: dict[str, Any] = {}
        if draws_at_random(self.config):
            options["draw"] = self.on_device(self.draws(batch))
        if self.config.data.conditions:
            options["conditions"] = self.conditions(columns, labels)
        if self.terms.blocks:
            options["hidden"] = self.terms.blocks
        out = forward(self.accelerator, self.model, x_t, t, labels, drop, **options)
        parts = self.diffusion.losses(out.prediction.float(), x0, x_t, t, noise)
        batch = Batch(x0, noise, t, labels, batch.images, columns)
        losses = total_loss(parts, self.terms(out, batch, self.step))

        # Log all terms. A scalar is repeated per sample, so that all averages have the same weights
        terms = {**losses, **kept_fractions(out.routing)}
        self.log_sums.add({name: values.expand(len(x0)) for name, values in terms.items()})
        # An average loss hides where it is made: layout is decided in the noisiest tenths, detail in the others
        timesteps = self.config.diffusion.diffusion_steps
        by_timestep = {"loss": losses["diffusion_loss"], "kept": out.routing.boundary.float().mean(1)}
        self.log_sums.add_by_timestep(by_timestep, t, timesteps)
        return losses["loss"]

    def conditions(self, columns: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The conditions beside the labels (B,), by name: (B, ...), NaN where the label was dropped."""
        is_dropped = labels == self.config.data.num_classes
        conditions = {}
        for name in self.config.data.conditions:
            values = columns[name].float()
            rows = is_dropped.view(-1, *[1] * (values.ndim - 1))
            conditions[name] = values.masked_fill(rows, math.nan)
        return conditions

    def draws(self, batch: Batch) -> Tensor:
        """What a random router draws from: (B,) int64, a function of seed, step and image."""
        offset = rng(self.config.training.seed, "router", self.step).integers(1 << 40)
        return batch.images + int(offset)

    def on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.accelerator.device, non_blocking=True)

    # ------------------------------------------------------------------------------- what the loop is made of

    def make_order(self) -> Order:
        """The images of every micro-step from the current step to the last, for this process."""
        training = self.config.training
        accumulation = training.gradient_accumulation_steps
        return Order(
            images=len(self.store),
            global_batch=training.global_batch_size,
            seed=training.seed,
            micro_steps=range(self.step * accumulation, self.last_step * accumulation),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def batches(self) -> Generator[Batch, None, None]:
        """Micro-batches from the current step to the last."""
        config = self.config
        samples = Samples(
            self.store,
            config.training.seed,
            config.diffusion.diffusion_steps,
            config.training.class_dropout_prob,
            null_label=config.data.num_classes,
            timestep_sampling=config.diffusion.timestep_sampling,
        )
        pin_memory = self.accelerator.device.type == "cuda"
        workers = self.config.data.num_workers
        loader = make_loader(self.order, samples, workers, pin_memory)
        return read_batches(loader, self.config.training.rank_timeout)

    def progress_bar(self) -> tqdm:
        hidden = not self.accelerator.is_main_process
        return tqdm(total=self.last_step, initial=self.step, unit="step", disable=hidden)

    def profiler(self) -> AbstractContextManager[torch.profiler.profile | None]:
        """The profiler of the main process, if the configuration asks for one."""
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return make_profiler(self.config, self.folder)

    # --------------------------------------------------------------------------------- samples and evaluation

    def draw_samples(self) -> None:
        """Draw the grid of this step. Collective."""
        if self.hooks.draw_samples is not None:
            self.hooks.draw_samples(self.ema.module, self.step)

    def run_evaluation(self) -> None:
        """Evaluate the EMA of this step and log its metrics, unless it was skipped. Collective."""
        if self.hooks.evaluate is not None:
            metrics = self.hooks.evaluate(self.ema.module, self.step)
            if metrics:
                self.log.evaluation(self.step, metrics)

    def finish_interrupted_step(self) -> None:
        """Draw the samples and metrics of the resumed step, if the run ended before them. Collective."""
        is_resumed = (self.folder / "checkpoints" / f"{self.step:07d}.pt").exists()
        has_grid = grid_path(self.folder, self.step).exists()
        has_metrics = self.log.has_evaluation(self.step)
        # The main process decides for all, because only it writes these files
        is_resumed, has_grid, has_metrics = broadcast_object_list([is_resumed, has_grid, has_metrics])
        if is_resumed and self.is_due(self.config.logging.sample_every) and not has_grid:
            self.draw_samples()
        if is_resumed and self.is_due(self.config.evaluation.every) and not has_metrics:
            self.run_evaluation()

    # ------------------------------------------------------------------------------------------------ reports

    def start_clock(self) -> None:
        """Begin a window of time between two log lines."""
        self.window_start = time.perf_counter()
        self.window_first_step = self.step

    def report(self) -> str:
        """Write what was measured since the last report to every log; return a short summary. Collective."""
        statistics = self.log_sums.reduce()
        self.guard.read_pending_flags()
        kept = statistics["kept_effective"]
        tflop = training_tflop(self.config, kept)
        # Collect the scalars
        scalars = flatten_statistics(statistics)
        scalars["tflop_per_image"] = tflop
        scalars |= self.schedule_values()
        scalars |= self.speed(tflop)
        self.start_clock()
        # Write them to every log
        self.log.metrics(self.step, scalars)
        losses = [f"{name}_loss" for name in self.terms.modules]
        keys = [*SUMMARY[:2], *losses, *SUMMARY[2:]]
        summary = " ".join(f"{key}={scalars[key]:.4g}" for key in keys if key in scalars)
        self.log.line(f"step {self.step:7d}: {summary}")
        return f"loss={scalars['loss']:.4f} kept={kept['mean']:.3f}"

    def schedule_values(self) -> dict[str, float]:
        """What the schedules said in the last step, and the skipped steps so far."""
        training = self.config.training
        last = self.step - 1
        return {
            "downsample_factor": schedules.downsample_factor(last, training),
            "drop_fraction": schedules.drop_fraction(last, training),
            "skipped_steps": self.guard.total,
            "learning_rate": schedules.learning_rate(last, training),
        }

    def speed(self, tflop_per_image: float) -> dict[str, float]:
        """Steps and images per second since the last report, and the share of the peak FLOP/s if known."""
        training = self.config.training
        seconds = time.perf_counter() - self.window_start
        steps_per_sec = (self.step - self.window_first_step) / seconds
        images_per_step = training.global_batch_size * training.gradient_accumulation_steps
        images_per_sec = steps_per_sec * images_per_step
        speed = {"steps_per_sec": steps_per_sec, "images_per_sec": images_per_sec}
        peak = launch.total_peak_flops(self.accelerator)
        if peak is not None:
            speed["model_flop_utilisation"] = images_per_sec * tflop_per_image * 1e12 / peak
        return speed

    def report_start(self) -> None:
        """Log what is about to be trained."""
        parameters = sum(parameter.numel() for parameter in self.ema.module.parameters())
        start = f"resuming from step {self.step}" if self.step else "starting"
        processes = f"{self.accelerator.num_processes} x {self.accelerator.device}"
        size = f"{parameters:,} parameters, {len(self.store):,} images, {self.last_step:,} steps"
        precision = self.accelerator.mixed_precision
        # Only the main process writes lines
        deviation = self.latent_deviation() if self.accelerator.is_main_process else math.nan
        latents = f"latents of standard deviation {deviation:.3g}"
        self.log.line(f"{self.config.model.name}: {size}, {latents}, {start}, {processes}, {precision}")
        self.warn_of_scale(deviation)
        if self.step < self.last_step:
            self.warn_of_late_ema("will hold")

    def latent_deviation(self) -> float:
        """Standard deviation of the next latents, at most FIRST_IMAGES of them; NaN if they cannot be read."""
        training = self.config.training
        micro_step = self.step * training.gradient_accumulation_steps
        latents = []
        for image in self.order.global_batch_of(micro_step)[:FIRST_IMAGES].tolist():
            # An image that cannot be read ends training when its batch is due
            with contextlib.suppress(UserError):
                latents.append(self.store.latent(image, sample_stream(training.seed, micro_step, image)))
        return float(np.std(latents)) if latents else math.nan

    def warn_of_scale(self, deviation: float) -> None:
        """Log a warning if the standard deviation of the latents is far from 1, and the prediction depends on it.

        A prediction of the noise hides the scale. A velocity is made of noise and latents, in fixed shares.
        """
        diffusion = self.config.diffusion
        if diffusion.objective == "gaussian" and diffusion.prediction == "epsilon":
            return
        if deviation < 1 / FAR_DEVIATION or deviation > FAR_DEVIATION:
            self.log.line(
                f"warning: the latents have a standard deviation of {deviation:.3g}, and a network that does not "
                "predict epsilon expects about 1; extract features with an autoencoder whose scaling factor gives "
                "that, or predict epsilon"
            )

    def warn_of_late_ema(self, verb: str) -> None:
        """Log a warning if the run is too short for its EMA to forget the first weights.

        Args:
            verb: "will hold" before the last step, "holds" after it.
        """
        share = initial_share(self.last_step, self.config.training)
        if share <= MAX_INITIAL_SHARE:
            return
        # This decay leaves e^-5 = 0.7 %
        decay = max(1 - 5 / self.last_step, 0)
        self.log.line(
            f"warning: after {self.last_step} steps the EMA, which samples are drawn from, {verb} {share:.0%} of "
            f"the initial weights; use training.ema_warmup=true or training.ema_decay={decay:.4g} in a new run, "
            "or sample with --weights model"
        )

    def report_skipped(self, step: int) -> None:
        """Log a step whose update was skipped, with its images, and which of their latents are not finite."""
        if not self.accelerator.is_main_process:
            return
        accumulation = self.config.training.gradient_accumulation_steps
        images: list[str] = []
        bad: list[str] = []
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            for image in self.order.global_batch_of(micro_step).tolist():
                images.append(str(image))
                if not self.store.is_finite(image):
                    bad.append(self.store.describe(image))
        if not bad:
            self.last_unexplained = step
        cause = f"; not finite in the features: {', '.join(bad)}" if bad else "; all their latents are finite"
        self.log.line(
            f"step {step + 1:7d}: loss or gradient is not finite, update skipped "
            f"({self.guard.total} so far); images {', '.join(images)}{cause}"
        )

    def report_stop(self, step: int) -> None:
        """Log why the run ends after too many skipped steps."""
        checkpoints = list_checkpoints(self.folder / "checkpoints")
        last_good = checkpoints[-1] if checkpoints else "none"
        # A step whose latents were all finite leaves the weights
        if self.last_unexplained <= step - self.guard.in_a_row:
            remedy = "the features named above are to blame: extract them again"
        elif checkpoints:
            remedy = (
                "the latents are finite, so the weights are to blame: resume from it under another --output "
                "with training.resume_from_ckpt and a lower training.learning_rate"
            )
        else:
            remedy = (
                "the latents are finite, so the weights are to blame: start again with a lower "
                "training.learning_rate or more training.lr_warmup_steps"
            )
        self.log.line(
            f"error: {self.guard.in_a_row} steps in a row up to {step + 1} had a non-finite loss or "
            f"gradient; the last good checkpoint is {last_good}; {remedy}"
        )

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint from the main process. Collective."""
        # Gather what is spread over the processes
        averages = self.log_sums.state_dict()
        skipped = self.guard.state_dict()
        weights = {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if is_sharded(self.accelerator):
            weights = gather_full_state(weights)
        # Only the main process writes
        if self.accelerator.is_main_process:
            weight_averages = self.weight_averages.state_dict(self.step)
            state: Checkpoint = {
                "step": self.step,
                "config": to_dict(self.config),
                "autoencoder": self.store.autoencoder,
                "features": self.store.fingerprint(),
                "class_names": self.store.class_names,
                "model": weights["model"],
                "ema": weights["ema"],
                "optimizer": weights["optimizer"],
                "terms": self.terms.modules.state_dict(),
                "posthoc": weight_averages.pop("posthoc", {}),
                "weight_averages": weight_averages,
                "averages": averages,
                "skipped": skipped,
                "precision": self.accelerator.mixed_precision,
            }
            # Before the checkpoint: a run that is killed between the two writes the snapshots again
            self.weight_averages.save_snapshots(self.folder, self.step)
            path = save_checkpoint(self.folder / "checkpoints", state, self.config.logging.ckpt_keep)
            self.log.line(f"step {self.step:7d}: saved {path}")
        self.accelerator.wait_for_everyone()
