"""What a step takes on an H100 at least: a model from bytes, products and launches, counted operation by operation.

The step runs on fake tensors of a CUDA device, which have shapes and types but neither values nor memory, so a
machine without a GPU can count. Each operation reads its inputs and writes its outputs once, each of the network's
Triton kernels too; what torch.compile fuses beside them would move less. An operation takes as long as its bytes
or its products, whichever is longer. The step takes the sum over its operations, or as long as the host needs to
launch them; as a CUDA graph it takes the sum.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.meters import medians, saved_bytes
from benchmarks.report import Row
from benchmarks.step_functions import EMA_DECAY, TrainingStep, sampling_step, training_loss
from benchmarks.workload import Case, Setup, Workload, build_workload, downsampling
from models import build_model
from models.blocks import DiTBlock
from models.ops import cpu_attention, norm_silu, rows
from models.types import DenoiserOutput, Packing

# Rates that real programs reach on an H100 SXM: shares of the data sheet's
BANDWIDTH = 0.85 * 3.35e12  # bytes per second
RATES = {"bfloat16": 0.60 * 989e12, "TF32": 0.60 * 494e12, "float32": 0.75 * 67e12}  # FLOP/s
LAUNCH = 5e-6  # seconds of the host per kernel, on a fast core
DATA_SHEET = 989e12  # bfloat16 FLOP/s, for the MFU

TRAINING = (Case("DCDiT-B-N4", 256), Case("DCDiT-B-N4", 32), Case("DiT-B-2", 256))
SAMPLING = (Case("DCDiT-B-N4", 1), Case("DCDiT-B-N4", 8), Case("DCDiT-B-N4", 64), Case("DiT-B-2", 8))
DROPPED = (0.0, 0.3, 0.6, 0.9)

# Kernels of an operation, where they are several
KERNELS = {
    "native_group_norm": 3,
    "native_group_norm_backward": 4,
    "native_layer_norm_backward": 3,
    "_fused_rms_norm_backward": 3,
    "convolution_backward": 3,
    "sort": 4,
}
COPIES = 5  # of each parameter: itself, its gradient, two averages of AdamW, the EMA
TENSORS_PER_KERNEL = 30  # of operations on lists, such as the optimizer's
# Operations that read or write only the rows that an index names
GATHERING = ("index_select", "index", "embedding", "gather", "take")
SCATTERING = ("index_copy_", "scatter_")


@dataclass
class Counts:
    """What the operations of a step add up to."""

    launches: int = 0
    bytes: int = 0
    pass_bytes: int = 0  # those of operations without products
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RATES, 0.0))
    memory_seconds: float = 0.0  # of operations that wait for memory
    product_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RATES, 0.0))

    @property
    def device_seconds(self) -> float:
        """All operations, one after another."""
        return self.memory_seconds + sum(self.product_seconds.values())

    @property
    def seconds(self) -> float:
        """The device or the host, whichever takes longer."""
        return max(self.device_seconds, self.launches * LAUNCH)

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values())

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.pass_bytes + other.pass_bytes,
            {name: flops + other.flops[name] for name, flops in self.flops.items()},
            self.memory_seconds + other.memory_seconds,
            {name: seconds + other.product_seconds[name] for name, seconds in self.product_seconds.items()},
        )


class Counter(TorchDispatchMode):
    """Counts the operations in a `with` block."""

    def __init__(self, tf32: bool):
        super().__init__()
        self.tf32 = tf32
        self.counts = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if launches_nothing(function):
            return result
        name = function._schema.name.split("::")[1]
        moved = moved_bytes(name, args, kwargs, result)
        flops = product_flops(function, args, kwargs, result)
        precision = self.precision(args)

        # Waits for memory or for products
        counts = self.counts
        memory = moved / BANDWIDTH
        products = flops / RATES[precision]
        if products > memory:
            counts.product_seconds[precision] += products
        else:
            counts.memory_seconds += memory
        counts.bytes += moved
        if not flops:
            counts.pass_bytes += moved
        counts.flops[precision] += flops
        counts.launches += kernels(name, args)
        return result

    def precision(self, args: tuple) -> str:
        """Of the products of an operation."""
        dtypes = [leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if torch.bfloat16 in dtypes:
            return "bfloat16"
        return "TF32" if self.tf32 else "float32"


def launches_nothing(function: Any) -> bool:
    """Whether an operation only makes a view, asks a question or reserves memory."""
    schema = function._schema
    if function.namespace == "prim":
        return True
    alias = schema.returns[0].alias_info if schema.returns else None
    is_view = alias is not None and not alias.is_write
    return is_view or "empty" in schema.name or "lift_fresh" in schema.name or "_unsafe_view" in schema.name


def moved_bytes(name: str, args: tuple, kwargs: dict, result: Any) -> int:
    """Inputs read and outputs written."""
    inputs = [size(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = [size(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if name.startswith(("_foreach", "_fused_adam")) and name.endswith("_"):
        # In place: lists are read, and those that change are written
        return sum(inputs) + sum(size(leaf) for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
    if name in GATHERING:
        inputs = [min(value, sum(outputs)) for value in inputs]
    if name in SCATTERING:
        # The target stays in place but for the rows that are written
        source = inputs[-1]
        return 2 * source + sum(inputs[1:-1])
    return sum(inputs) + sum(outputs)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def product_flops(function: Any, args: tuple, kwargs: dict, result: Any) -> float:
    """FLOPs of matrix products, convolutions and attention."""
    if function.namespace == "dc_dit":
        # Samples of equal length here
        qkv = args[1] if "backward" in function._schema.name else args[0]
        tokens, _, heads, width = qkv.shape
        samples = len(args[-1])
        forward = 4 * heads * width * tokens * tokens / samples
        return 2.5 * forward if "backward" in function._schema.name else forward
    formula = flop_registry.get(function._overloadpacket)
    return float(formula(*args, **kwargs, out_val=result)) if formula else 0.0


def kernels(name: str, args: tuple) -> int:
    """How many kernels an operation launches."""
    if name.startswith(("_foreach", "_fused_adam")):
        return math.ceil(len(args[0]) / TENSORS_PER_KERNEL)
    return KERNELS.get(name, 1)


# ------------------------------------------------------------------------------------------------- Triton

_LIBRARY = torch.library.Library("benchmarks", "DEF")
_LIBRARY.define("kernel(Tensor[] tensors) -> ()")


@torch.library.register_fake("benchmarks::kernel")
def _compute_nothing(tensors: list[Tensor]) -> None:
    return None


class CountedKernel:
    """In place of a Triton kernel: an operation that reads or writes each of its tensors once."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if self.name == "_statistics":
            # It reads one row of each sample
            tensors[0] = tensors[0][:, :, 0, 0]
        torch.ops.benchmarks.kernel(tensors)


@contextlib.contextmanager
def counted_kernels() -> Iterator[None]:
    """In a `with` block, fake tensors take the way through the Triton kernels, which are counted and not run."""
    from triton.runtime import JITFunction

    with contextlib.ExitStack() as stack:
        modules = {}
        for name in ("triton_rows", "triton_norm"):
            modules[name] = importlib.import_module(f"models.ops.{name}")
            for key, value in list(vars(modules[name]).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(mock.patch.object(modules[name], key, CountedKernel(key)))
        for user in (rows, norm_silu):
            find = mock.patch.object(user, "find_kernels", lambda name, *_: modules[name])
            stack.enter_context(find)
        yield


@contextlib.contextmanager
def fake_gpu(fused: bool = True) -> Iterator[None]:
    """A block in which tensors are fake; `fused`: with the network's Triton kernels, where there is Triton."""
    has_kernels = fused and importlib.util.find_spec("triton") is not None
    with FakeTensorMode(), counted_kernels() if has_kernels else contextlib.nullcontext():
        yield


# ------------------------------------------------------------------------------------------------- steps


class FakeWorkload(Workload):
    """A workload of fake tensors, in bfloat16."""

    def autocast(self) -> contextlib.AbstractContextManager:
        return half_precision()


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    """Autocast of CUDA, which `torch.autocast` refuses where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def fake_workload(case: Case) -> FakeWorkload:
    """A model and a batch of fake tensors, within a FakeTensorMode."""
    config = case.config()
    device = torch.device("cuda")
    with device:
        model = build_model(config)
        x = torch.empty(case.batch, *config.latent_shape)
        whole = torch.empty(case.batch, dtype=torch.int64)
        prob = torch.empty(case.batch, config.latent_grid.cells)
    for block in model.blocks:
        assert isinstance(block, DiTBlock)
        # One operation that the counter knows, in place of the kernel that this machine would choose
        block.attn.attend = attend  # type: ignore[method-assign]
    return FakeWorkload(config, model, x, whole, whole, torch.empty_like(x), prob, bf16=True)


def attend(qkv: Tensor, packing: Packing) -> Tensor:
    """Attention as one operation on fake tensors."""
    return cpu_attention.attend(qkv, packing.lengths)


def count_training(case: Case, tf32: bool, dropped: float = 0.0) -> Counts:
    """A training step on about one token in N: forward and backward pass, clipping, optimizer and EMA."""
    forward, backward, update = count_phases(case, tf32, dropped)
    return forward + backward + update


def count_phases(
    case: Case, tf32: bool, dropped: float = 0.0, fused: bool = True
) -> tuple[Counts, Counts, Counts]:
    """The same in parts: forward pass and loss; backward pass; clipping, optimizer and EMA."""
    with fake_gpu(fused):
        workload = fake_workload(case)
        parameters: list[Tensor] = list(workload.model.parameters())
        loss = training_loss(workload, forward_with(workload.model, budget(case, dropped)))
        optimizer = torch.optim.AdamW(parameters, fused=True)
        averages = [torch.empty_like(parameter) for parameter in parameters]

        for _ in range(2):  # in the first step the optimizer makes its state
            with Counter(tf32) as forward_counter:
                value = loss()
            with Counter(tf32) as backward_counter:
                backward(value)
            with Counter(tf32) as update_counter:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_lerp_(averages, parameters, 1 - EMA_DECAY)
    return forward_counter.counts, backward_counter.counts, update_counter.counts


def count_memory(case: Case) -> int:
    """Bytes of a training step: weights, gradients, AdamW, EMA, and what the backward pass needs."""
    with fake_gpu():
        workload = fake_workload(case)
        parameters = list(workload.model.parameters())
        known = [*parameters, *workload.model.buffers(), *workload.inputs, workload.noise]
        saved = saved_bytes(training_loss(workload, forward_with(workload.model, budget(case, 0.0))), known)
        state = COPIES * sum(size(parameter) for parameter in parameters)
    return saved + state


def count_sampling(case: Case, dropped: float) -> Counts:
    """A guided evaluation of the network under a token budget."""
    with fake_gpu():
        workload = fake_workload(case)
        forward = forward_with(workload.sampled_model, budget(case, dropped))
        step = sampling_step(workload, forward, workload.prob)
        with Counter(tf32=False) as counter:
            step()
    return counter.counts


def budget(case: Case, dropped: float) -> int | None:
    """Tokens that are left of one in N; None for a static DiT."""
    config = case.config()
    if config.is_static:
        return None
    return round((1 - dropped) * config.tokens / downsampling(config))


def forward_with(model: nn.Module, tokens: int | None) -> Callable[[Tensor, Tensor, Tensor], DenoiserOutput]:
    """The network under a token budget: fake tensors have no values from which to count tokens."""

    def forward(x: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        return model(x, t, labels, tokens=tokens)

    return forward


def backward(loss: Tensor) -> None:
    """`loss.backward()`, node by node: PyTorch's own engine asks for the GPU of its tensors."""
    assert loss.grad_fn is not None
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in reversed(children_first(loss.grad_fn)):
            given = [fit(gradient, like) for gradient, like in zip(gradients.pop(node), node._input_metadata)]
            if node.name() == "torch::autograd::AccumulateGrad":
                node.variable.grad = given[0]
                continue
            results = node(*given) if callable(node) else node.apply(*given)
            if not isinstance(results, tuple):
                results = (results,)
            for (parent, place), gradient in zip(node.next_functions, results):
                if parent is None or gradient is None:
                    continue
                waiting = gradients.setdefault(parent, [None] * len(parent._input_metadata))
                before = waiting[place]
                waiting[place] = gradient if before is None else before + gradient


def children_first(root: Any) -> list[Any]:
    """All nodes of a graph, those that a node leads to before it."""
    order = []
    seen = {root}
    waiting = [(root, iter(root.next_functions))]
    while waiting:
        node, parents = waiting[-1]
        for parent, _ in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append((parent, iter(parent.next_functions)))
                break
        else:
            order.append(node)
            waiting.pop()
    return order


def fit(gradient: Tensor | None, like: Any) -> Tensor | None:
    """A gradient in the shape and type of what it is the gradient of."""
    if gradient is None:
        return None
    shape = tuple(like.shape)
    if tuple(gradient.shape) != shape:
        gradient = gradient.sum_to_size(shape)
    return gradient.to(like.dtype)


# ------------------------------------------------------------------------------------------------- table


class CountedStep(NamedTuple):
    """One row before it is measured."""

    name: str
    case: Case
    dropped: float
    tf32: bool = False
    fused: bool = True


def measure_roofline(setup: Setup) -> list[Row]:
    """Prediction for an H100 and, on a GPU, the measured time beside it."""
    steps = [CountedStep("training", case, 0.0) for case in TRAINING]
    steps.insert(1, CountedStep("training, TF32", TRAINING[0], 0.0, tf32=True))
    for case in (TRAINING[0], TRAINING[-1]):
        steps.insert(0, CountedStep("training without Triton", case, 0.0, fused=False))
    for case in SAMPLING:
        for dropped in DROPPED if not case.config().is_static else DROPPED[:1]:
            steps.append(CountedStep("guided sampling", case, dropped))
    return [row_of(step, setup) for step in steps]


def row_of(step: CountedStep, setup: Setup) -> Row:
    """One row of the table, times in milliseconds."""
    if step.name.startswith("training"):
        forward, backward, update = count_phases(step.case, step.tf32, fused=step.fused)
    else:
        forward, backward, update = count_sampling(step.case, step.dropped), Counts(), Counts()
    counts = forward + backward + update
    measured = measure(step, setup) if setup.device.type == "cuda" and step.fused else None
    return {
        "step": step.name,
        **step.case.columns,
        "dropped": step.dropped,
        "launches": counts.launches,
        "GB": counts.bytes / 1e9,
        "GB forward": forward.bytes / 1e9,
        "GB backward": backward.bytes / 1e9,
        "of them without products, forward": forward.pass_bytes / 1e9,
        "backward": backward.pass_bytes / 1e9,
        "TFLOP": counts.all_flops / 1e12,
        "memory ms": counts.memory_seconds * 1e3,
        **{f"{name} ms": seconds * 1e3 for name, seconds in counts.product_seconds.items()},
        "launching ms": counts.launches * LAUNCH * 1e3,
        "predicted ms": counts.seconds * 1e3,
        "as a graph ms": counts.device_seconds * 1e3,
        "MFU": counts.all_flops / counts.seconds / DATA_SHEET,
        "measured ms": "-" if measured is None else measured * 1e3,
    }


def measure(step: CountedStep, setup: Setup) -> float:
    """Seconds of the step on this GPU."""
    fixed = Setup(setup.device, setup.bf16, setup.seconds, step.tf32)
    workload = build_workload(step.case.config(), step.case.batch, fixed)
    if step.name.startswith("training"):
        run: Callable[[], object] = TrainingStep(workload, workload.model)
    else:
        forward = forward_with(workload.sampled_model, budget(step.case, step.dropped))
        run = sampling_step(workload, forward, workload.prob)
    return medians({"step": run}, setup.device, setup.seconds / 2)["step"]
