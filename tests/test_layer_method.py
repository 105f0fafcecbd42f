"""Layers that cannot be explained are named; a layer's input is explained as an output is."""

import pytest
import torch
from torch import nn

from captum_llm_ext import LayerSaliency


class Net(nn.Module):
    """Two layers, of which one may run twice and another never does."""

    def __init__(self, runs=1):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.idle, self.runs = nn.Linear(4, 4), runs

    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(self.runs):
            x = self.first(x)
        return self.last(x.sum(1))


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("runs", "layer", "message"),
    [
        (2, "first", "layer Linear runs more than once in one pass"),
        (1, "idle", "layer Linear does not run in the model's forward"),
        (1, None, "the model does not expose which one embeds token ids"),
    ],
)
def test_unsupported_layer_is_refused(runs, layer, message):
    net = Net(runs)
    method = LayerSaliency(net, layer and getattr(net, layer))
    with pytest.raises(ValueError, match=message):
        method.attribute(IDS, target=1)


def test_layer_input_equals_previous_layer_output():
    net = Net()
    inputs = LayerSaliency(net, net.first).attribute(IDS, target=1, attribute_to_layer_input=True)
    outputs = LayerSaliency(net, net.embedding).attribute(IDS, target=1)
    assert torch.equal(inputs, outputs)
    weights = net.first.weight.T @ net.last.weight[1]  # a linear net: the same at every place
    assert torch.allclose(inputs[0], weights.norm().expand(3), atol=1e-6)


def test_gradient_of_token_ids_is_refused():
    net = Net()
    method = LayerSaliency(net, net.embedding)
    with pytest.raises(ValueError, match="layer Embedding gives no numbers that have gradients"):
        method.attribute(IDS, target=1, attribute_to_layer_input=True)
