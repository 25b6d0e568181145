"""Gaussian diffusion, its samplers and guidance. Nothing here knows the network behind `denoise`."""

from diffusion.gaussian import GaussianDiffusion, create_diffusion

__all__ = ["GaussianDiffusion", "create_diffusion"]
