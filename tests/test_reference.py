"""The readable twin of the network against the network itself, outputs and gradients."""

import functools

import pytest
import torch

from config import config_from_dict
from models import build_model, reference

SMALL = {
    "model": {
        "hnet": {
            "arch_layout": ["c1", ["D1d1"], "c1"],
            "d_model": [64, 64],
            "num_heads": [4, 4],
            "enc_dec_dim_factor": [2, None],
            "dechunk_kernel_sigma": 1.5,
        },
        "init": "released",
    },
    "data": {"image_size": 48, "latent_stride": 8, "num_classes": 3},
}


@pytest.fixture
def model():
    network = build_model(config_from_dict(SMALL))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # the head starts at zero
        network.router.residual_scorer[-1].bias.zero_()  # about half of the tokens are boundaries
    return network


@pytest.mark.parametrize("drop", [None, 0.0, 0.3, 0.9])
def test_outputs_and_gradients_agree(model, drop):
    x_t = torch.randn(3, 4, 6, 6, requires_grad=True)
    t = torch.tensor([5, 500, 990])
    labels = torch.tensor([0, 2, 3])
    fraction = None if drop is None else torch.full((3,), drop)

    results = []
    for network in (model, functools.partial(reference.forward, model)):
        output = network(x_t, t, labels, fraction, hidden=(0,))
        loss = output.prediction.square().mean() + output.routing.prob.mean()
        gradients = torch.autograd.grad(loss, [x_t, *model.parameters()], allow_unused=True)
        results.append((output, gradients))

    (ours, our_gradients), (plain, plain_gradients) = results
    assert torch.equal(ours.routing.keep, plain.routing.keep)
    torch.testing.assert_close(ours.routing.prob, plain.routing.prob)
    torch.testing.assert_close(ours.prediction, plain.prediction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.hidden[0], plain.hidden[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.packing.token_index, plain.packing.token_index)
    for our_gradient, plain_gradient in zip(our_gradients, plain_gradients, strict=True):
        scale = plain_gradient.abs().max().item()
        torch.testing.assert_close(our_gradient, plain_gradient, rtol=1e-3, atol=1e-4 * scale + 1e-8)


def test_some_tokens_are_dropped_and_some_are_no_boundaries(model):
    """Otherwise the test above would say little."""
    x_t = torch.randn(3, 4, 6, 6)
    routing = model(x_t, torch.tensor([5, 500, 990]), torch.tensor([0, 2, 3]), 0.3).routing
    assert (routing.keep.sum(1) < routing.boundary.sum(1)).all()
    assert (routing.boundary.sum(1) < 36).all()
