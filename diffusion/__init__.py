"""The diffusion processes, their samplers and guidance. Nothing here knows the network behind `denoise`."""

from diffusion.gaussian import GaussianDiffusion, create_diffusion
from diffusion.process import OBJECTIVES, Process, build_process

__all__ = ["OBJECTIVES", "GaussianDiffusion", "Process", "build_process", "create_diffusion"]
