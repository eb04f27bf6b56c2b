"""Which layer's output are a model's features, and how to get at them: for methods that compare features of workers.

What is done with them is the business of :mod:`qgm_ext.algorithms.ccl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

_Model = TypeVar("_Model", bound=nn.Module)


def declare_feature_layer(model: _Model, layer: str) -> _Model:
    """Say that the output of submodule ``layer`` are the features of ``model``, [B, ...]; returns the model.

    It sets the attribute ``feature_layer``, which copies of the model keep; a class may also define it itself.

    Args:
        model: any module. layer: name of one of its submodules, as ``named_modules`` has it.

    Raises:
        ValueError: if there is no such submodule.

    Example:
        >>> model = declare_feature_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "1")
        >>> feature_layer(model)
        '1'
    """
    _check(model, layer)
    vars(model)["feature_layer"] = layer
    return model


def feature_layer(model: nn.Module) -> str:
    """The layer that was declared.

    Raises:
        ValueError: if none was, or the model has no such submodule.
    """
    layer: Any = getattr(model, "feature_layer", None)
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} does not say which layer's output are its features; name the last hidden layer by "
            "qgm_ext.models.declare_feature_layer(model, name)"
        )
    _check(model, layer)
    return str(layer)


@dataclass(frozen=True)
class Features:
    """What a worker's model made of its batch.

    Args:
        features: output of the feature layer, [B, F].
        output: what the model returned, if it is one tensor.
    """

    features: Tensor
    output: Tensor | None


class Recorder:
    """Keeps what a layer and the whole model returned inside the block.

    Args:
        model: whose forward is to come.
        layer: name of the submodule.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self._model, self._layer = model, layer
        self._seen: list[Any] = []
        self._output: Tensor | None = None

    def __enter__(self) -> Recorder:
        self._handles = [
            self._model.get_submodule(self._layer).register_forward_hook(self._keep_features),
            self._model.register_forward_hook(self._keep_output),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self) -> Features:
        """What they returned.

        Raises:
            ValueError: if the layer did not run exactly once, or returned something else than one tensor [B, ...].
        """
        if len(self._seen) != 1 or not isinstance(self._seen[0], Tensor) or self._seen[0].dim() < 2:
            got = f"{len(self._seen)} results" if len(self._seen) != 1 else _describe(self._seen[0])
            raise ValueError(
                f"feature layer {self._layer!r} must return one tensor [B, ...] in a forward pass, got {got}"
            )
        return Features(self._seen[0].flatten(1), self._output)

    def _keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(output)

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else None


def _check(model: nn.Module, layer: Any) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        raise ValueError(
            f"feature layer must be a submodule of {type(model).__name__} ({', '.join(names)}), got {layer!r}"
        )


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
