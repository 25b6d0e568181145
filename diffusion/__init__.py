"""Gaussian diffusion, its samplers and guidance; knows nothing of the network behind `denoise`."""

from diffusion.gaussian import GaussianDiffusion, create_diffusion

__all__ = ["GaussianDiffusion", "create_diffusion"]
