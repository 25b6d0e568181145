"""Evaluations of a network whose shapes are known in advance, as CUDA graphs.

A small batch waits for the host, which launches hundreds of kernels per evaluation. Under a token budget, and
in a static DiT, every evaluation launches the same ones: they are recorded once and then launched together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.dc_dit import DCDiT
from models.types import DenoiserOutput, Routing
from sampling.half_weights import with_half_weights

# Evaluations before the recording: kernels are chosen, and compiled, in the first ones
WARM_UP = 3


class GraphedDenoiser(nn.Module):
    """A denoiser for sampling, called like the network that it wraps; there is a graph where tokens are fixed.

    There is one graph per batch size and token budget; they share their memory. The weights must not change.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # Made when the first recording in half precision asks for it
        self.half_model: nn.Module | None = None
        self.recordings: dict[tuple, Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        drop: Tensor | float | None = None,
        tokens: list[int] | None = None,
        draw: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
    ) -> DenoiserOutput:
        """Arguments and result are those of models.dc_dit.DCDiT; no gradients. Random routers get no graph."""
        if isinstance(self.model, DCDiT) and (tokens is None or draw is not None):
            return self.model(x_t, t, labels, drop, tokens, draw, conditions=conditions)
        shapes = (len(x_t), torch.is_autocast_enabled("cuda"), *(tokens or ()))
        if shapes not in self.recordings:
            inputs = (x_t, t, labels)
            network = self.model
            if torch.is_autocast_enabled("cuda"):
                if self.half_model is None:
                    self.half_model = with_half_weights(self.model, torch.get_autocast_dtype("cuda"))
                network = self.half_model
            options = {"tokens": tokens, "conditions": conditions or {}}
            self.recordings[shapes] = Recording(network, inputs, options, self.pool, self.stream)
        return self.recordings[shapes].replay((x_t, t, labels), conditions or {})


class Recording:
    """One CUDA graph: every replay reads and writes the inputs and outputs it was recorded with."""

    def __init__(
        self,
        network: nn.Module,
        inputs: tuple[Tensor, ...],
        options: dict[str, Any],
        pool: Any,
        stream: torch.cuda.Stream,
    ):
        self.inputs = tuple(x.clone() for x in inputs)
        self.conditions = {name: values.clone() for name, values in options["conditions"].items()}
        options = options | {"conditions": self.conditions}
        # Without its cache, autocast's copies belong to the graph and live as long as it does.
        with torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            # Warm up on another stream, as recording requires
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    network(*self.inputs, **options)
            torch.cuda.current_stream().wait_stream(stream)
            # "thread_local": other threads may write images meanwhile.
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.output = network(*self.inputs, **options)

    def replay(self, inputs: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> DenoiserOutput:
        """Evaluate the network on other values; the results are copies, which later replays leave alone."""
        for recorded, given in zip(self.inputs, inputs):
            recorded.copy_(given)
        for name, recorded in self.conditions.items():
            recorded.copy_(conditions[name])
        self.graph.replay()
        routing = Routing(*[x.clone() for x in self.output.routing])
        packing = self.output.packing
        copies: dict[str, Any] = {
            name: value.clone() for name, value in packing._asdict().items() if isinstance(value, Tensor)
        }
        return DenoiserOutput(self.output.prediction.clone(), routing, packing._replace(**copies))
