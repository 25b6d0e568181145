"""Evaluations of a network whose shapes are known in advance, as CUDA graphs.

A small batch waits for the host, which launches hundreds of kernels per evaluation. Under a token budget, and in a static DiT,
every evaluation launches the same ones: they are recorded once and then launched together.
"""

import torch
from torch import Tensor, nn

from models.dc_dit import DCDiT
from models.types import DenoiserOutput, Routing

WARM_UP = 3  # evaluations before the recording: kernels are chosen, and compiled, in the first ones


class GraphedDenoiser(nn.Module):
    """A denoiser for sampling, called like the one that it wraps; without a fixed number of tokens it evaluates as before.

    There is one graph per batch size and token budget; they share their memory. The weights must stay where they are.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.recordings: dict[tuple, Recording] = {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        drop: Tensor | float | None = None,
        tokens: list[int] | None = None,
    ) -> DenoiserOutput:
        """As of models.dc_dit.DCDiT, without gradients."""
        if isinstance(self.model, DCDiT) and tokens is None:
            return self.model(x_t, t, labels, drop)
        kind = (len(x_t), torch.is_autocast_enabled("cuda"), *(tokens or ()))
        if kind not in self.recordings:
            self.recordings[kind] = Recording(self.model, (x_t, t, labels), tokens, self.pool, self.stream)
        return self.recordings[kind].replay(x_t, t, labels)


class Recording:
    """One CUDA graph: the inputs and outputs it was recorded with are read and written again at every replay."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], tokens: list[int] | None, pool, stream):
        self.inputs = tuple(x.clone() for x in inputs)
        # Without its cache, autocast's copies of the weights belong to the graph and live as long as it does.
        with torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    model(*self.inputs, tokens=tokens)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may write images meanwhile.
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.output = model(*self.inputs, tokens=tokens)

    def replay(self, *inputs: Tensor) -> DenoiserOutput:
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        prediction, routing = self.output
        return DenoiserOutput(prediction.clone(), Routing(*(x.clone() for x in routing)))
