"""Texts: how they become rows of token numbers, AG News, and a task made of the Debian package fortunes.

torchtext, which used to read AG News, is archived and does not import beside a current torch; its files are read here.
"""

from __future__ import annotations

import csv
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .datasets import Dataset, Root, find, register
from .grey_images import is_third_of_five

__all__ = ["PADDING", "HashTokenizer", "PretrainedTokenizer", "Tokenizer"]

PADDING = 0
_START = 1
_WORD = re.compile(r"\w+|[^\w\s]")

_AGNEWS_LENGTH = 128
_AGNEWS_CLASSES = 4
_AGNEWS_URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{}"
_AGNEWS_MD5 = {"train.csv": "b1a00f826fdfbd249f79597b59e1dc12", "test.csv": "d52ea96a97a2d943681189a97654912d"}
_FORTUNES = "/usr/share/games/fortunes"
_FORTUNES_LENGTH = 48
_FORTUNES_FEWEST = 500


class Tokenizer(Protocol):
    """Makes texts rows of numbers.

    Attributes:
        vocabulary: every number is in [0, vocabulary).
    """

    vocabulary: int

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Token numbers, int64 [N, length]; 0 where a text has ended, and what is longer is cut off."""


class HashTokenizer:
    """Words and punctuation marks in lower case, numbered by a checksum: nothing to train, store or download.

    0 is padding, 1 begins every text, and the others are words; rare ones share a number.

    Args:
        vocabulary: V >= 3.

    Example:
        >>> HashTokenizer(1000).encode(["The ring, the ring!", ""], 6)
        tensor([[  1, 498, 566, 832, 498, 566],
                [  1,   0,   0,   0,   0,   0]])
    """

    def __init__(self, vocabulary: int = 4096) -> None:
        if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or vocabulary < 3:
            raise ValueError(f"vocabulary must be an integer of at least 3, got {vocabulary!r}")
        self.vocabulary = vocabulary

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """As in :class:`Tokenizer`."""
        out = np.full((len(texts), length), PADDING, dtype=np.int64)
        for row, text in zip(out, texts, strict=True):
            words = _WORD.findall(text.lower())[: length - 1]
            row[0] = _START
            row[1 : 1 + len(words)] = [2 + zlib.crc32(word.encode()) % (self.vocabulary - 2) for word in words]
        return torch.from_numpy(out)


class PretrainedTokenizer:
    """The tokenizer of a pretrained model, from a folder as ``save_pretrained`` of transformers writes it.

    Args:
        folder: with the tokenizer's files; nothing is fetched.

    Raises:
        ValueError: if there is no tokenizer in it, or its padding is not number 0.
        ImportError: without transformers.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError("pretrained tokenizers need transformers: pip install 'qgm_ext[text]'") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{os.fspath(folder)} holds no tokenizer that transformers can load: {error}") from error
        padding = self._tokenizer.pad_token_id
        if padding != PADDING:
            raise ValueError(f"padding must be token {PADDING}; in {os.fspath(folder)} it is {padding}")
        self.vocabulary = len(self._tokenizer)

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """As in :class:`Tokenizer`."""
        encoded = self._tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _load_agnews(root: Root, download: bool = False, tokenizer: Tokenizer | None = None) -> Dataset:
    tokenizer = tokenizer or HashTokenizer(32768)
    if download:
        _fetch(Path("data" if root is None else root).expanduser() / "ag_news_csv")
    hint = (
        "`qgm train --data agnews --download` fetches them where there is internet; elsewhere take them from "
        f"{_AGNEWS_URL.format('')}"
    )
    folders = ("ag_news_csv", "AG_NEWS", "datasets/AG_NEWS", "agnews", "")
    folder = find("agnews", root, folders, ("train.csv", "test.csv"), hint)
    (train, train_y), (test, test_y) = (_read_csv(folder / name) for name in ("train.csv", "test.csv"))
    return Dataset(
        name="agnews",
        train_x=tokenizer.encode(train, _AGNEWS_LENGTH),
        train_y=torch.from_numpy(train_y),
        test_x=tokenizer.encode(test, _AGNEWS_LENGTH),
        test_y=torch.from_numpy(test_y),
        num_classes=_AGNEWS_CLASSES,
        vocabulary=tokenizer.vocabulary,
    )


def _fetch(folder: Path) -> None:
    try:
        from torchvision.datasets.utils import download_url
    except ImportError as error:
        raise ImportError("fetching agnews needs torchvision: pip install 'qgm_ext[vision]'") from error
    try:
        for name, md5 in _AGNEWS_MD5.items():
            download_url(_AGNEWS_URL.format(name), str(folder), name, md5)
    except (OSError, RuntimeError) as error:  # the latter for a wrong checksum
        raise OSError(f"agnews could not be fetched: {error}") from error


def _read_csv(path: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    """A line is "class","title","description" with classes from 1; a backslash stands for a line break."""
    texts, labels = [], []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != 3 or row[0] not in [str(label + 1) for label in range(_AGNEWS_CLASSES)]:
                raise ValueError(
                    f'{path}, line {number}: must be "class","title","description" with a class of 1 to '
                    f"{_AGNEWS_CLASSES}, got {row!r}"
                )
            texts.append(f"{row[1]} {row[2]}".replace("\\", " "))
            labels.append(int(row[0]) - 1)
    if not texts:
        raise ValueError(f"{path}: holds no texts")
    return texts, np.array(labels, dtype=np.int64)


def _load_fortunes(root: Root, tokenizer: Tokenizer | None = None) -> Dataset:
    tokenizer = tokenizer or HashTokenizer()
    hint = "on Debian and Ubuntu `apt-get install fortunes`"
    folder = find("fortunes", root, ("fortunes", ""), ("computers",), hint, _FORTUNES)
    texts: list[str] = []
    labels: list[int] = []
    classes = 0
    # Without a suffix: a .dat file is an index, a .u8 file a link to the same text.
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.suffix):
        own = [text for text in re.split(r"^%\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE) if text.strip()]
        if len(own) >= _FORTUNES_FEWEST:
            texts += own
            labels += [classes] * len(own)
            classes += 1
    if classes < 2:
        raise ValueError(f"{folder} must hold at least two files of {_FORTUNES_FEWEST} texts or more, got {classes}")
    x, y = tokenizer.encode(texts, _FORTUNES_LENGTH), np.array(labels, dtype=np.int64)
    is_test = torch.from_numpy(is_third_of_five(y))
    return Dataset(
        name="fortunes",
        train_x=x[~is_test],
        train_y=torch.from_numpy(y)[~is_test],
        test_x=x[is_test],
        test_y=torch.from_numpy(y)[is_test],
        num_classes=classes,
        vocabulary=tokenizer.vocabulary,
    )


register("agnews", _load_agnews, ("download", "tokenizer"))
register("fortunes", _load_fortunes, ("tokenizer",))
