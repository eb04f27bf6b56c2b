"""Models by name: small ones, sixteen of which train on a laptop, and those of the papers.

Those without batch norm hold no buffers and change nothing in place, so ``torch.func.functional_call`` and ``vmap``
work on them (but for DistilBERT). The simulator takes any other module as well. Each says which layer's output are its
features, the input of the classifier.
"""

from __future__ import annotations

from functools import partial

from .cnn import cnn, lenet
from .distilbert import distilbert, distilbert_small
from .features import declare_feature_layer, feature_layer
from .mlp import mlp, text_mlp
from .norms import EvoNormS0
from .registry import default_engine, draws, get, names, register, takes, takes_texts
from .resnet import resnet18, resnet20
from .vgg import vgg11

__all__ = [
    "EvoNormS0",
    "cnn",
    "declare_feature_layer",
    "default_engine",
    "distilbert",
    "distilbert_small",
    "draws",
    "feature_layer",
    "get",
    "lenet",
    "mlp",
    "names",
    "register",
    "resnet18",
    "resnet20",
    "takes",
    "takes_texts",
    "text_mlp",
    "vgg11",
]

register("cnn", cnn)
register("lenet", lenet)
register("mlp", mlp)
for _name, _norm in (("bn", "batch"), ("gn", "group"), ("evonorm", "evonorm")):
    register(f"resnet18_{_name}", partial(resnet18, norm=_norm))
    register(f"resnet20_{_name}", partial(resnet20, norm=_norm))
register("vgg11", vgg11, draws=True)
register("text_mlp", text_mlp, texts=True)
register("distilbert", distilbert, texts=True, draws=True, batched=False)
register("distilbert_small", distilbert_small, texts=True, batched=False)
