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
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def table(self, name: str, i: Tensor, ndim: int) -> Tensor:
        """Entries i (B,) of a table, float32, shaped to broadcast over (B, ...) with ndim dimensions."""
        if i.device not in self._on_device:
            tables = {}
            for key, values in self.tables.items():
                tables[key] = torch.as_tensor(values).to(i.device, torch.float32)
            self._on_device[i.device] = tables
        entries = self._on_device[i.device][name][i]
        return entries.view(-1, *[1] * (ndim - 1))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0 (DDPM, equation 4)."""
        signal = self.table("sqrt_alpha_bar", t, x0.ndim)
        sigma = self.table("sqrt_one_minus_alpha_bar", t, x0.ndim)
        return signal * x0 + sigma * noise

    def predict_x0(self, x_t: Tensor, i: Tensor, epsilon: Tensor) -> Tensor:
        """The x_0 that an epsilon implies (DDPM, equation 15)."""
        scale = self.table("sqrt_recip_alpha_bar", i, x_t.ndim)
        noise_scale = self.table("sqrt_recip_alpha_bar_minus_one", i, x_t.ndim)
        return scale * x_t - noise_scale * epsilon

    def posterior_mean(self, x0: Tensor, x_t: Tensor, i: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        x0_share = self.table("posterior_x0", i, x_t.ndim)
        x_t_share = self.table("posterior_x_t", i, x_t.ndim)
        return x0_share * x0 + x_t_share * x_t

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network output -> epsilon or velocity, and variance logits (None without a learned variance)."""
        if not self.learn_sigma:
            return prediction, None
        value, logits = prediction.chunk(2, dim=1)
        return value, logits

    def predict_epsilon(self, prediction: Tensor, x_t: Tensor, i: Tensor) -> Tensor:
        """The epsilon that a network output implies."""
        value, _ = self.split(prediction)
        if self.predicts == "epsilon":
            return value
        signal = self.table("sqrt_alpha_bar", i, x_t.ndim)
        sigma = self.table("sqrt_one_minus_alpha_bar", i, x_t.ndim)
        return signal * value + sigma * x_t

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network learns to predict: epsilon or velocity."""
        if self.predicts == "epsilon":
            return noise
        signal = self.table("sqrt_alpha_bar", t, x0.ndim)
        sigma = self.table("sqrt_one_minus_alpha_bar", t, x0.ndim)
        return signal * noise - sigma * x0

    def reverse(self, prediction: Tensor, x_t: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), and the implied x_0; nothing is clipped."""
        _, logits = self.split(prediction)
        x0 = self.predict_x0(x_t, i, self.predict_epsilon(prediction, x_t, i))
        return self.posterior_mean(x0, x_t, i), self.log_variance(logits, x_t, i), x0

    def log_variance(self, logits: Tensor | None, x_t: Tensor, i: Tensor) -> Tensor:
        """Log-variance of the model: learned (improved DDPM, equation 15), or the fixed large one."""
        if logits is None:
            return self.table("fixed_large_log_variance", i, x_t.ndim).expand_as(x_t)
        # Interpolate between log beta-tilde and log beta
        low = self.table("posterior_log_variance", i, x_t.ndim)
        high = self.table("log_betas", i, x_t.ndim)
        share = (logits + 1) / 2
        return share * high + (1 - share) * low

    def losses(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms per sample (B,); training minimises their sum.

        Returns:
            "mse": mean squared error of epsilon or velocity. "vb" (with a learned variance only): the variational
            bound in bits per dimension, with a gradient to the variance alone (improved DDPM, equation 16 with
            weight 1).
        """
        value, logits = self.split(prediction)
        terms = {"mse": _mean((self.target(x0, t, noise) - value) ** 2)}
        if logits is not None:
            only_variance = torch.cat([value.detach(), logits], dim=1)
            terms["vb"] = self.variational_bound(only_variance, x0, x_t, t)
        return terms

    def variational_bound(self, prediction: Tensor, x0: Tensor, x_t: Tensor, i: Tensor) -> Tensor:
        """The variational bound: (B,) bits per dimension.

        It is the KL divergence of the posterior to the model at i > 0, and the negative log-likelihood of an
        8-bit x_0 at i = 0.
        """
        mean, log_variance, _ = self.reverse(prediction, x_t, i)

        # i > 0
        true_mean = self.posterior_mean(x0, x_t, i)
        true_log_variance = self.table("posterior_log_variance", i, x_t.ndim)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)

        # i = 0
        likelihood = discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(i == 0, -_mean(likelihood), _mean(kl)) / math.log(2)


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
