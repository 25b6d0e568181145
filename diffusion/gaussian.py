"""Gaussian diffusion with epsilon or velocity prediction and (optionally) a learned variance range.

The notation is that of DDPM (arXiv 2006.11239) and improved DDPM (arXiv 2102.09672). Coefficient tables are
computed once in float64 and gathered in float32. Images and latents are (B, C, ...). `i` (B,) counts the
steps of this process, `t` (B,) those of the process that the network was trained on: they differ after
respacing.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusion import schedule

# Table -> its values at the steps of a batch, shaped to broadcast over (B, ...)
Entries = dict[str, Tensor]


class GaussianDiffusion:
    """A diffusion process over the given betas.

    Args:
        betas: (steps,) float64.
        learn_sigma: the network predicts variance logits in the second half of its channels (improved DDPM,
            section 3.1).
        predicts: "epsilon" (the noise), or "velocity" (arXiv 2202.00512, section 4): signal * noise - sigma * x_0
            where x_t = signal * x_0 + sigma * noise. A network that predicts it does not have to pass x_t through.
        timesteps: (steps,) the original timestep of each step; None if they are the same.
    """

    def __init__(
        self,
        betas: np.ndarray,
        learn_sigma: bool,
        predicts: str = "epsilon",
        timesteps: np.ndarray | None = None,
    ):
        self.steps = len(betas)
        self.learn_sigma = learn_sigma
        self.predicts = predicts
        self.timesteps = np.arange(len(betas)) if timesteps is None else timesteps

        alpha_bar = np.cumprod(1 - betas)
        previous = np.append(1.0, alpha_bar[:-1])

        # The posterior's variance is 0 at the first step; its logarithm takes the second step's there
        variance = betas * (1 - previous) / (1 - alpha_bar)
        clipped = np.append(variance[1], variance[1:]) if len(betas) > 1 else betas

        self.tables = {
            "betas": betas,
            "alpha_bar": alpha_bar,
            "alpha_bar_previous": previous,
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
            "sqrt_recip_alpha_bar": np.sqrt(1 / alpha_bar),
            "sqrt_recip_alpha_bar_minus_one": np.sqrt(1 / alpha_bar - 1),
            "posterior_x0": betas * np.sqrt(previous) / (1 - alpha_bar),
            "posterior_x_t": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
            "posterior_log_variance": np.log(clipped),
            "log_betas": np.log(betas),
            "fixed_large_log_variance": np.log(np.append(clipped[0], betas[1:])),
        }
        self._on_device: dict[torch.device, Tensor] = {}  # (tables, steps)

    def entries(self, i: Tensor, ndim: int) -> Entries:
        """Entries i (B,) of all tables, float32, shaped to broadcast over (B, ...) with ndim dimensions.

        One gather serves all: on a GPU each would take a launch.
        """
        if i.device not in self._on_device:
            tables = np.stack(list(self.tables.values()))
            self._on_device[i.device] = torch.as_tensor(tables).to(i.device, torch.float32)
        gathered = self._on_device[i.device].index_select(1, i)  # (tables, B)
        shaped = gathered.view(len(self.tables), -1, *[1] * (ndim - 1))
        return dict(zip(self.tables, shaped.unbind()))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0 (DDPM, equation 4)."""
        at = self.entries(t, x0.ndim)
        return at["sqrt_alpha_bar"] * x0 + at["sqrt_one_minus_alpha_bar"] * noise

    def predict_x0(self, x_t: Tensor, at: Entries, epsilon: Tensor) -> Tensor:
        """The x_0 that an epsilon implies (DDPM, equation 15)."""
        return at["sqrt_recip_alpha_bar"] * x_t - at["sqrt_recip_alpha_bar_minus_one"] * epsilon

    def posterior_mean(self, x0: Tensor, x_t: Tensor, at: Entries) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        return at["posterior_x0"] * x0 + at["posterior_x_t"] * x_t

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network output -> epsilon or velocity, and variance logits (None without a learned variance)."""
        if not self.learn_sigma:
            return prediction, None
        value, logits = prediction.chunk(2, dim=1)
        return value, logits

    def predict_epsilon(self, prediction: Tensor, x_t: Tensor, at: Entries) -> Tensor:
        """The epsilon that a network output implies."""
        value, _ = self.split(prediction)
        if self.predicts == "epsilon":
            return value
        return at["sqrt_alpha_bar"] * value + at["sqrt_one_minus_alpha_bar"] * x_t

    def target(self, x0: Tensor, at: Entries, noise: Tensor) -> Tensor:
        """What the network learns to predict: epsilon or velocity."""
        if self.predicts == "epsilon":
            return noise
        return at["sqrt_alpha_bar"] * noise - at["sqrt_one_minus_alpha_bar"] * x0

    def reverse(self, prediction: Tensor, x_t: Tensor, at: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), and the implied x_0; nothing is clipped."""
        _, logits = self.split(prediction)
        x0 = self.predict_x0(x_t, at, self.predict_epsilon(prediction, x_t, at))
        return self.posterior_mean(x0, x_t, at), self.log_variance(logits, x_t, at), x0

    def log_variance(self, logits: Tensor | None, x_t: Tensor, at: Entries) -> Tensor:
        """Log-variance of the model: learned (improved DDPM, equation 15), or the fixed large one."""
        if logits is None:
            return at["fixed_large_log_variance"].expand_as(x_t)
        # Interpolate between log beta-tilde and log beta
        share = (logits + 1) / 2
        return share * at["log_betas"] + (1 - share) * at["posterior_log_variance"]

    def losses(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms per sample (B,); training minimises their sum.

        Returns:
            "mse": mean squared error of epsilon or velocity. "vb" (with a learned variance only): the variational
            bound in bits per dimension, with a gradient to the variance alone (improved DDPM, equation 16 with
            weight 1).
        """
        at = self.entries(t, x0.ndim)
        value, logits = self.split(prediction)
        terms = {"mse": _mean((self.target(x0, at, noise) - value) ** 2)}
        if logits is not None:
            only_variance = torch.cat([value.detach(), logits], dim=1)
            terms["vb"] = self.variational_bound(only_variance, x0, x_t, t == 0, at)
        return terms

    def variational_bound(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, is_first: Tensor, at: Entries
    ) -> Tensor:
        """The variational bound: (B,) bits per dimension.

        It is the KL divergence of the posterior to the model, and at the first step, where `is_first` (B,), the
        negative log-likelihood of an 8-bit x_0.
        """
        mean, log_variance, _ = self.reverse(prediction, x_t, at)

        # All steps but the first
        true_mean = self.posterior_mean(x0, x_t, at)
        kl = normal_kl(true_mean, at["posterior_log_variance"], mean, log_variance)

        # The first
        likelihood = discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(is_first, -_mean(likelihood), _mean(kl)) / math.log(2)


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two normal distributions, element by element, in nats."""
    difference = log_variance2 - log_variance1
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (difference - 1 + torch.exp(-difference) + distance)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability (nats) of x in bins of width 2/255 on [-1, 1], the outer bins open (DDPM, equation 13)."""
    precision = torch.exp(-log_scale)
    upper = _normal_cdf(precision * (x - mean + 1 / 255))
    lower = _normal_cdf(precision * (x - mean - 1 / 255))
    inner = upper - lower
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, inner))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function, as the released checkpoints were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def create_diffusion(
    noise_schedule: str = "linear",
    diffusion_steps: int = 1000,
    learn_sigma: bool = True,
    sampling_steps: int | None = None,
    predicts: str = "epsilon",
) -> GaussianDiffusion:
    """Build a diffusion process; `sampling_steps` respaces it for sampling.

    Raises:
        ValueError: unknown schedule, or sampling_steps outside [1, diffusion_steps].
    """
    betas = schedule.betas(noise_schedule, diffusion_steps)
    if sampling_steps is None:
        return GaussianDiffusion(betas, learn_sigma, predicts)
    timesteps = schedule.respaced_timesteps(diffusion_steps, sampling_steps)
    return GaussianDiffusion(schedule.respaced_betas(betas, timesteps), learn_sigma, predicts, timesteps)
