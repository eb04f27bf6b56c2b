"""DistilBERT for classification, transformers' own; weights from a folder, nothing is fetched.

Sanh et al., "DistilBERT, a distilled version of BERT" (2019, arXiv 1910.01108); the quasi-global momentum and RelaySum
papers fine-tune it on AG News.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._checks import check_sizes

__all__ = ["DistilBert", "distilbert", "distilbert_small"]


class DistilBert(nn.Module):
    """Token numbers [B, L], 0 where a text has ended, to logits [B, num_classes].

    Args:
        model: a DistilBertForSequenceClassification of transformers.
    """

    feature_layer = "model.dropout"  # what the classifier gets

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify texts."""
        logits: Tensor = self.model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
        return logits


def distilbert(
    input_shape: Sequence[int],
    num_classes: int,
    vocabulary: int = 30522,
    pretrained: str | None = None,
    **configuration: Any,
) -> DistilBert:
    """Build a DistilBERT; of the usual size it has 6 layers of 768 units and 67 million parameters.

    Args:
        input_shape: (L,), tokens of a text.
        num_classes: number of logits.
        vocabulary: number of tokens.
        pretrained: folder with a DistilBERT as ``save_pretrained`` of transformers writes it; its classifier is new
            where it has none for so many classes. None: random weights.
        **configuration: fields of transformers' DistilBertConfig, without ``pretrained``.
    Raises: ValueError if a size or the folder does not fit; ImportError without transformers.
    """
    check_sizes(input_shape=input_shape, num_classes=num_classes, vocabulary=vocabulary)
    if len(input_shape) != 1:
        raise ValueError(f"input_shape must be (tokens of a text,), got {tuple(input_shape)}")
    try:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification
    except ImportError as error:
        raise ImportError("distilbert comes with transformers: pip install 'qgm_ext[text]'") from error
    if pretrained is None:
        made = DistilBertConfig(**{"vocab_size": vocabulary, "num_labels": num_classes, **configuration})
        return DistilBert(DistilBertForSequenceClassification(made))
    try:
        model = DistilBertForSequenceClassification.from_pretrained(
            str(pretrained), num_labels=num_classes, local_files_only=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained {pretrained} holds no DistilBERT that transformers can load: {error}") from error
    if model.config.vocab_size < vocabulary or model.config.max_position_embeddings < input_shape[0]:
        raise ValueError(
            f"pretrained {pretrained} knows {model.config.vocab_size} tokens in texts of up to "
            f"{model.config.max_position_embeddings}; the data have {vocabulary} and {input_shape[0]}"
        )
    model.train()
    return DistilBert(model)


def distilbert_small(input_shape: Sequence[int], num_classes: int, vocabulary: int = 4096) -> DistilBert:
    """A DistilBERT with random weights that a laptop trains: 2 layers of 64 units, without dropout.

    Raises: as :func:`distilbert`.
    """
    small: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    none: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return distilbert(input_shape, num_classes, vocabulary, **small, **none)
