"""The training loop: micro-steps, optimizer steps, EMA, logging, checkpoints. `Trainer.train` is the place to start reading."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from config import Config, to_dict, validate_processes
from data.autoencoder import hash_weights
from data.features import FeatureStore
from diffusion import create_diffusion
from models import build_model, compile_parts
from processes.agreement import check_agreement
from processes.sharding import forward, is_sharded, shard_state, whole, whole_tensor
from processes.stop import StopRequest
from processes.watch import ProcessWatch
from training import schedules
from training.batches import Batch, Order, Samples, make_loader, next_batch
from training.guard import FiniteGuard, poison
from training.losses import ratio_loss
from training.tracking import Averages, RunLog, kept_fractions
from weights.checkpoint import list_checkpoints, save_checkpoint


class Trainer:
    """One run in one folder.

    Args:
        config: checked configuration.
        accelerator: device, precision, processes and trackers.
        store: the features to train on.
        folder: gets log.txt, metrics.jsonl and checkpoints/.
        state: a checkpoint to go on from (without "optimizer": weights to start from), or None.
        flops_per_image: of one forward pass, given mean and mean square of the kept tokens; only reported.
        peak_flops: of all devices together in this precision, per second; None where it is not known.
        draw_samples: called as (ema_model, step) on every process every `logging.sample_every` steps.
        evaluate: likewise every `evaluation.every` steps; the main process gets scalars, which are logged.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        store: FeatureStore,
        folder: Path,
        state: dict | None,
        flops_per_image: Callable[[float, float], float],
        peak_flops: float | None,
        draw_samples: Callable[[torch.nn.Module, int], None],
        evaluate: Callable[[torch.nn.Module, int], dict[str, float]] | None = None,
    ):
        self.config, self.accelerator, self.store, self.folder = config, accelerator, store, folder
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.draw_samples, self.evaluate = draw_samples, evaluate
        validate_processes(config, accelerator.num_processes)
        self.diffusion = create_diffusion(
            config.diffusion.noise_schedule, config.diffusion.diffusion_steps, config.training.learn_sigma
        )
        self.build(state)
        self.averages = Averages(accelerator)
        self.guard = FiniteGuard(config.training.max_skipped_steps, self.report_skipped, self.report_stop)
        if state is not None and "optimizer" in state:  # and not only the first weights
            self.averages.load_state_dict(state["averages"])
            self.guard.load_state_dict(state["skipped"])
        self.log = RunLog(folder, accelerator, self.step)
        self.last_step = total_steps(config, len(store))
        self.stop = StopRequest(accelerator)
        self.watch = ProcessWatch(
            accelerator.process_index, accelerator.num_processes, config.training.rank_timeout
        )

    def build(self, state: dict | None) -> None:
        """Model, EMA and optimizer, fresh from the seed or from a checkpoint; the same on every process."""
        training = self.config.training
        torch.manual_seed(training.seed)
        sharded = is_sharded(self.accelerator)
        model = build_model(self.config).to(
            "cpu" if sharded else self.accelerator.device
        )  # whole, it may fit the host only
        self.ema = ModelEmaV3(model, decay=training.ema_decay, exclude_buffers=True)
        fused = self.accelerator.device.type in ("cpu", "cuda")
        groups = parameter_groups(model, training.lr_scales)
        optimizer = torch.optim.AdamW(
            groups, lr=training.learning_rate, weight_decay=training.weight_decay, fused=fused
        )
        if state is not None:
            model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
        self.step = state["step"] if state is not None else 0
        facts = starting_facts(self.config, self.store, self.step, model, self.ema.module)
        check_agreement(self.accelerator, facts)
        if training.compile:
            compile_parts(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if sharded:
            self.ema.module = fsdp2_prepare_model(self.accelerator, self.ema.module)
        named = list(self.accelerator.unwrap_model(self.model).named_parameters())
        self.frozen = [x for name, x in named if name.startswith(tuple(training.frozen))]
        if state is not None and "optimizer" in state:
            self.optimizer.load_state_dict(shard_state(state["optimizer"], self.optimizer))
            for group, own in zip(
                self.optimizer.param_groups, groups
            ):  # loading brings the saved options back
                group.update(weight_decay=training.weight_decay, fused=fused, lr_scale=own["lr_scale"])

    def train(self) -> bool:
        """Train to the last step. Returns False when a signal ended it early (a checkpoint is written then too)."""
        try:
            self.run_steps()
        except RuntimeError:
            self.watch.explain()
            raise
        self.watch.close()
        self.stop.restore()
        return self.step >= self.last_step

    def run_steps(self) -> None:
        """Steps with their reports, checkpoints and grids, up to the last one or to a signal."""
        logging = self.config.logging
        bar = tqdm(
            total=self.last_step, initial=self.step, unit="step", disable=not self.accelerator.is_main_process
        )
        self.window_start = time.perf_counter(), self.step
        batches = iter(self.batches())
        saved = self.step
        self.observe(broadcast_object_list([self.observed()])[0])
        with bar, self.profiler() as profiler:
            while self.step < self.last_step and not self.stop.requested():
                self.optimizer_step(batches)
                bar.update()
                if profiler is not None:
                    profiler.step()
                if self.step % logging.log_every == 0 or self.step == self.last_step:
                    bar.set_postfix_str(self.report())
                if self.step % logging.ckpt_every == 0:
                    saved = self.save()
                self.observe()
        if saved != self.step:
            self.save()

    def observe(self, done: tuple[str, ...] = ()) -> None:
        """Grid and metrics of the EMA at the steps that have them, but for what is done already. Collective."""
        grids, metrics = self.config.logging.sample_every, self.config.evaluation.every
        if grids and self.step % grids == 0 and "grid" not in done:
            self.draw_samples(self.ema.module, self.step)
        if metrics and self.step % metrics == 0 and "metrics" not in done:
            self.log.evaluation(self.step, self.evaluate(self.ema.module, self.step))

    def observed(self) -> tuple[str, ...]:
        """What of `observe` this run has behind it at its first step: all, unless it was ended between checkpoint and there."""
        if not (self.folder / "checkpoints" / f"{self.step:07d}.pt").exists():
            return "grid", "metrics"  # the first step of a new run
        grid = (self.folder / GRIDS / f"{self.step:07d}.png").exists()
        return (*(["grid"] if grid else []), *(["metrics"] if self.log.has_evaluation(self.step) else []))

    def batches(self):
        """Micro-batches from the current step to the last."""
        training, data, accelerator = self.config.training, self.config.data, self.accelerator
        accumulation = training.gradient_accumulation_steps
        self.order = Order(
            len(self.store), training.global_batch_size, training.seed, self.step * accumulation, self.last_step * accumulation,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        samples = Samples(
            self.store,
            training.seed,
            self.config.diffusion.diffusion_steps,
            training.class_dropout_prob,
            data.num_classes,
        )
        return make_loader(
            self.order, samples, data.num_workers, pin_memory=accelerator.device.type == "cuda"
        )

    def optimizer_step(self, batches) -> None:
        """Accumulate gradients over the micro-batches, then update weights and EMA."""
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = schedules.learning_rate(self.step, training) * group["lr_scale"]
        accumulation = training.gradient_accumulation_steps
        for micro_step in range(accumulation):
            last = micro_step == accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                self.watch.at(self.step, "reading images")
                batch = next_batch(batches)
                self.watch.at(self.step, "training")
                self.accelerator.backward(poison(self.loss(batch)) / accumulation)
        if self.step < training.frozen_steps:
            for parameter in self.frozen:
                parameter.grad = None  # neither the norm nor the optimizer sees it
        norm = whole_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), training.max_grad_norm))
        self.averages.add(
            "grad_norm", norm.expand(training.global_batch_size // self.accelerator.num_processes)
        )
        self.guard.update(self.optimizer, norm, self.step)
        self.optimizer.zero_grad()
        self.ema.update(self.accelerator.unwrap_model(self.model))
        self.step += 1
        self.watch.at(self.step, None)

    def loss(self, batch: Batch) -> Tensor:
        """Forward pass and loss of one micro-batch; its terms go to the averages."""
        training = self.config.training
        x0, noise, t, labels = (x.to(self.accelerator.device, non_blocking=True) for x in batch[:4])
        x_t = self.diffusion.add_noise(x0, t, noise)
        fraction = schedules.drop_fraction(self.step, training)
        drop = x0.new_full((len(x0),), fraction) if fraction else None
        prediction, routing = forward(self.accelerator, self.model, x_t, t, labels, drop)
        terms = self.diffusion.losses(prediction.float(), x0, x_t, t, noise)
        diffusion_loss = sum(terms.values())
        loss = diffusion_loss.mean()
        logged = {**terms, "diffusion_loss": diffusion_loss, **kept_fractions(routing)}
        if training.ratio_loss_weight > 0:
            factor = schedules.downsample_factor(self.step, training)
            ratio = ratio_loss(routing, factor, training.ratio_batch_size)
            loss = loss + training.ratio_loss_weight * ratio
            logged["ratio_loss"] = ratio
        for name, values in {"loss": loss, **logged}.items():
            self.averages.add(
                name, values.expand(len(x0))
            )  # a scalar weighs as many samples as it stands for
        return loss

    def report(self) -> str:
        """Reduce what was measured since the last report, write it to every log, and return a short summary."""
        statistics = self.averages.reduce()
        self.guard.settle()
        training, tokens = self.config.training, self.config.tokens
        scalars = {name: values["mean"] for name, values in statistics.items()}
        for name in ("kept_natural", "kept_effective"):
            scalars.update({f"{name}_{key}": value for key, value in statistics[name].items()})
            del scalars[name]
        kept = statistics["kept_effective"]
        squared = (kept["mean"] ** 2 + kept["std"] ** 2) * tokens**2
        forward = self.flops_per_image(kept["mean"] * tokens, squared)
        scalars["tflop_per_image"] = (
            3 * forward / 1e12
        )  # a backward pass costs two forward passes; recomputation not counted
        scalars["downsample_factor"] = schedules.downsample_factor(self.step - 1, training)
        scalars["drop_fraction"] = schedules.drop_fraction(self.step - 1, training)
        scalars["skipped_steps"] = self.guard.total
        scalars["learning_rate"] = schedules.learning_rate(self.step - 1, training)
        now, (since, first) = time.perf_counter(), self.window_start
        self.window_start = now, self.step
        scalars["steps_per_sec"] = (self.step - first) / (now - since)
        images = training.global_batch_size * training.gradient_accumulation_steps
        scalars["images_per_sec"] = scalars["steps_per_sec"] * images
        if self.peak_flops:
            scalars["model_flop_utilisation"] = (
                scalars["images_per_sec"] * scalars["tflop_per_image"] * 1e12 / self.peak_flops
            )
        self.log.metrics(self.step, scalars)
        summary = " ".join(f"{key}={scalars[key]:.4g}" for key in SUMMARY if key in scalars)
        if self.accelerator.is_main_process:
            self.log.line(f"step {self.step:7d}: {summary}")
        return f"loss={scalars['loss']:.4f} kept={kept['mean']:.3f}"

    def save(self) -> int:
        """Write a checkpoint from the main process; returns the step."""
        averages, skipped = self.averages.state_dict(), self.guard.state_dict()
        model, ema = self.accelerator.unwrap_model(self.model), self.ema.module
        weights = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if is_sharded(self.accelerator):
            weights = whole(weights)
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "config": to_dict(self.config),
                "autoencoder": self.store.autoencoder,
                "features": self.store.fingerprint(),
                "class_names": self.store.class_names,
                **weights,
                "averages": averages,
                "skipped": skipped,
            }
            path = save_checkpoint(self.folder / "checkpoints", state, self.config.logging.ckpt_keep)
            self.log.line(f"step {self.step:7d}: saved {path}")
        self.accelerator.wait_for_everyone()
        return self.step

    def report_skipped(self, step: int) -> None:
        """Log a step whose update was left out, with its images."""
        accumulation = self.config.training.gradient_accumulation_steps
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        images = ", ".join(
            str(image) for micro_step in micro_steps for image in self.order.global_batch_of(micro_step)
        )
        self.log.line(
            f"step {step + 1:7d}: loss or gradient is not finite, update skipped ({self.guard.total} so far); images {images}"
        )

    def report_stop(self, step: int) -> None:
        """Log why the run ends."""
        good = list_checkpoints(self.folder / "checkpoints")
        self.log.line(
            f"error: {self.guard.in_a_row} steps in a row up to {step + 1} had a non-finite loss or gradient; the last good "
            f"checkpoint is {good[-1] if good else 'none'}: look at the images named above, or go on from it under another "
            "--output with training.resume_from_ckpt and a lower training.learning_rate"
        )

    def profiler(self):
        """A torch profiler over `training.profile_steps` of the main process, with traces in profiler/; or nothing."""
        if not (self.config.training.profile and self.accelerator.is_main_process):
            return contextlib.nullcontext()
        first, last = self.config.training.profile_steps
        schedule = torch.profiler.schedule(
            wait=max(first - 1, 0), warmup=1, active=last - first + 1, repeat=1
        )
        write = torch.profiler.tensorboard_trace_handler(str(self.folder / "profiler"))
        return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


GRIDS = "samples"  # folder of grids in the run's folder
SUMMARY = (
    "loss", "diffusion_loss", "ratio_loss", "grad_norm", "kept_natural_mean", "kept_effective_mean", "tflop_per_image",
    "steps_per_sec", "images_per_sec", "model_flop_utilisation",
)  # fmt: skip


def starting_facts(
    config: Config, store: FeatureStore, step: int, *models: torch.nn.Module
) -> dict[str, Any]:
    """What all processes of a run must agree on before the first step.

    Of the features these are the hashes in the manifest (of file names and labels in the official layout), not those
    of the bytes on each machine's disk, which `python -m data.features --verify` reads.
    """
    return {
        "configuration": hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest(),
        "features": store.fingerprint(),
        "step": step,
        "weights": [hash_weights(model) for model in models],
    }


def parameter_groups(model: torch.nn.Module, lr_scales: dict[str, float]) -> list[dict]:
    """Optimizer groups by factor on the learning rate; the first prefix that fits a name decides, and 1 where none does."""
    groups: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        scale = next((scale for prefix, scale in lr_scales.items() if name.startswith(prefix)), 1.0)
        groups.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def total_steps(config: Config, images: int) -> int:
    """Optimizer steps of the whole run."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    micro_steps = training.epochs * (images // training.global_batch_size)
    return micro_steps // training.gradient_accumulation_steps
