"""Declaring the layer whose output are a model's features, and recording it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qgm_ext import models
from qgm_ext.models.features import Recorder


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("name", [name for name in models.names() if name != "distilbert"])  # as distilbert_small
def test_our_models_declare_the_input_of_their_classifier(name):
    for needed, package in (("resnet18", "torchvision"), ("distilbert", "transformers")):
        if name.startswith(needed):
            pytest.importorskip(package, reason=f"{package} is not installed")
    shape = (8,) if models.takes_texts(name) else (3, 32, 32)
    model = models.get(name, shape, 10).eval()
    x = torch.randint(0, 100, (5, 8)) if models.takes_texts(name) else torch.randn(5, *shape)
    with Recorder(model, models.feature_layer(model)) as recorder:
        scores = model(x)
    found = recorder.result()
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.equal(classifier(found.features), scores)
    assert torch.equal(found.output, scores)


def test_a_linear_classifier_has_its_input_as_features():
    model = models.mlp((4,), 3, ())
    x = torch.randn(5, 4)
    with Recorder(model, models.feature_layer(model)) as recorder:
        model(x)
    assert torch.equal(recorder.result().features, x)


def test_copies_keep_the_declaration_and_a_class_may_make_it():
    model = models.declare_feature_layer(net(), "1")
    assert models.feature_layer(copy.deepcopy(model)) == "1"

    class Own(nn.Sequential):
        feature_layer = "0"

    assert models.feature_layer(Own(nn.Linear(2, 2))) == "0"
    assert model.state_dict().keys() == net().state_dict().keys()


def test_features_are_flattened_and_hooks_are_gone_afterwards():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with Recorder(model, "0") as recorder:
        model(torch.zeros(5, 1, 4, 4))
    assert recorder.result().features.shape == (5, 8)
    with pytest.raises(RuntimeError), Recorder(model, "0"):
        model(torch.zeros(5, 3, 4, 4))
    assert not any(module._forward_hooks for module in model.modules())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.pair = nn.Linear(2, 2), nn.LSTM(2, 2)

    def forward(self, x):
        self.pair(x)
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer", r"feature layer 'layer' must return one tensor \[B, ...\] in a forward pass, got 2 results"),
        ("pair", "feature layer 'pair' must return one tensor .* got tuple"),
    ],
)
def test_a_layer_that_has_no_one_result_is_refused(layer, message):
    model = Twice()
    with Recorder(model, layer) as recorder:
        model(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=message):
        recorder.result()


def test_wrong_declarations_are_named():
    with pytest.raises(ValueError, match=r"feature layer must be a submodule of Sequential \(0, 1, 2\), got 'fc'"):
        models.declare_feature_layer(net(), "fc")
    with pytest.raises(ValueError, match="Sequential does not say which layer's output are its features; name the"):
        models.feature_layer(net())
