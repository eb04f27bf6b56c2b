"""Tests of qgm_ext.models: shapes, deterministic weights, one training step, torch.func.vmap over workers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from qgm_ext import Simulator, data, models, topology
from qgm_ext.models import registry
from qgm_ext.models.features import Recorder

SMALL = ["cnn", "mlp"]
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (2, 9, 13)]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_have_the_right_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = models.get(name, shape, 7)
    assert model(torch.randn(5, *shape)).shape == (5, 7)
    assert not list(model.buffers())


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_fixes_the_weights(name: str) -> None:
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(nn.utils.parameters_to_vector(models.get(name, (1, 8, 8), 10).parameters()))
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


@pytest.mark.parametrize("name", SMALL)
def test_steps_of_sgd_learn_one_batch(name: str) -> None:
    torch.manual_seed(0)
    model = models.get(name, (1, 8, 8), 10)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28)], ids=str)
def test_vmap_over_workers_gives_each_workers_gradient(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    workers = [models.get(name, shape, 10).double() for _ in range(3)]
    x, y = torch.randn(3, 4, *shape, dtype=torch.float64), torch.randint(0, 10, (3, 4))
    params, _ = stack_module_state(workers)

    def loss(p: dict[str, torch.Tensor], batch_x: torch.Tensor, batch_y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(workers[0], p, (batch_x,)), batch_y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it has to fall back to a slow loop
        grads = vmap(grad(loss))(params, x, y)
    for i, model in enumerate(workers):
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(grads[key][i], parameter.grad, rtol=1e-10, atol=1e-12)


def test_mlp_has_the_layers_asked_for() -> None:
    model = models.mlp((1, 28, 28), 10)
    linear = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert linear == [(784, 128), (128, 64), (64, 10)]
    assert [type(m).__name__ for m in models.mlp((5,), 2, hidden=())] == ["Flatten", "Linear"]


def test_cnn_has_the_layers_asked_for() -> None:
    model = models.cnn((3, 28, 28), 10, channels=(6, 8, 10), groups=2)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [6, 8, 10]
    assert [m.num_groups for m in model if isinstance(m, nn.GroupNorm)] == [2, 2, 2]
    assert model[-1].in_features == 10 * 3 * 3


@pytest.mark.parametrize("name", ["cnn", "lenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_are_those_of_the_textbook_order_in_any_memory_format(name: str, channels: int) -> None:
    torch.manual_seed(0)
    model = models.get(name, (channels, 21, 18), 10).double()
    layers = list(model)
    for k in range(len(layers) - 1):  # the textbook's order: ReLU, then the maximum
        if isinstance(layers[k], nn.MaxPool2d) and isinstance(layers[k + 1], nn.ReLU):
            layers[k], layers[k + 1] = layers[k + 1], layers[k]
    assert [type(layer) for layer in layers] != [type(layer) for layer in model]
    textbook = nn.Sequential(*layers)
    x = torch.randn(4, channels, 21, 18, dtype=torch.float64)
    x[:2, :, 3:] = 0.5  # plain areas, where all values of a window are equal
    results = []
    for network in (textbook, model):
        given = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(network(given), torch.arange(4))
        results.append([loss, *torch.autograd.grad(loss, [given, *network.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["cnn", "lenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_feature_maps_lie_channels_last_on_the_cpu(name: str, channels: int) -> None:
    model = models.get(name, (channels, 21, 18), 10)
    maps = []
    for layer in model:
        layer.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    model(torch.randn(4, channels, 21, 18))
    maps = [output for output in maps if output.dim() == 4]
    assert len(maps) >= 6
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in maps)
    assert not any(output.is_contiguous() for output in maps)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "error", "message"),
    [
        ("cn", (1, 8, 8), 10, {}, ValueError, "unknown model 'cn'; did you mean 'cnn'\\? Known: cnn, distilbert, "),
        ("xyz", (1, 8, 8), 10, {}, ValueError, "unknown model 'xyz'. Known: cnn, distilbert, distilbert_small, lenet"),
        ("resnet20_gn", (8, 8), 10, {}, ValueError, r"input_shape must be \(channels, height, width\), got \(8, 8\)"),
        ("resnet20_gn", (1, 8, 8), 10, {"groups": 3}, ValueError, "groups=3 must divide the 16 channels"),
        ("resnet20_gn", (1, 8, 8), 10, {"channels": (4, 8)}, ValueError, "channels must be of three stages"),
        ("resnet20_gn", (1, 8, 8), 10, {"norm": "evonrm"}, ValueError, "norm 'evonrm' is not known, did you mean 'evo"),
        (
            "resnet20_evonorm",
            (1, 8, 8),
            10,
            {"channels": (48, 64, 64)},
            ValueError,
            "divisible by the 32 groups, got 48",
        ),
        (
            "lenet",
            (3, 15, 32),
            10,
            {},
            ValueError,
            r"with 16x16 or more, got \(3, 15, 32\)",
        ),
        ("resnet18_bn", (1, 64, 64), 10, {}, ValueError, r"\(3, height, width\) with 32x32 or more, got \(1, 64, 64\)"),
        ("text_mlp", (1, 8), 10, {}, ValueError, r"input_shape must be \(tokens of a text,\), got \(1, 8\)"),
        ("distilbert", (1, 8), 10, {}, ValueError, r"input_shape must be \(tokens of a text,\), got \(1, 8\)"),
        ("text_mlp", (8,), 10, {"vocabulary": 0}, ValueError, "vocabulary must be integers >= 1, got 0"),
        ("vgg11", (3, 28, 28), 10, {}, ValueError, "five layers that halve the image need 32x32 or more, got 28x28"),
        ("vgg11", (3, 32, 32), 10, {"slim": 3}, ValueError, "slim must divide 64, got 3"),
        ("vgg11", (3, 32, 32), 10, {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ("mlp", (1, 0, 8), 10, {}, ValueError, r"input_shape must be integers >= 1, got \(1, 0, 8\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": (64, -1)}, ValueError, r"hidden must be integers >= 1, got \(64, -1\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": (64, 1.5)}, TypeError, r"hidden must be integers >= 1, got \(64, 1.5\)"),
        ("mlp", (1, 8, 8), 10, {"hidden": "64"}, TypeError, "hidden must be integers >= 1, got '64'"),
        ("mlp", (1, 8, 8), 0, {}, ValueError, "num_classes must be integers >= 1, got 0"),
        ("mlp", (1, 8, 8), 10, {"hiden": (64,)}, TypeError, "hiden"),
        ("cnn", (8, 8), 10, {}, ValueError, r"input_shape must be \(channels, height, width\), got \(8, 8\)"),
        ("cnn", (1, 3, 8), 10, {}, ValueError, "2 layers that halve the image need 4x4 or more, got 3x8"),
        (
            "cnn",
            (1, 8, 8),
            10,
            {"groups": 3},
            ValueError,
            r"groups=3 must divide every entry of channels, got \(16, 32\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    name: str, shape: Any, classes: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        models.get(name, shape, classes, **options)


# The paper's models ---------------------------------------------------------------------------------------------------

PAPER = ["resnet20_bn", "resnet20_evonorm", "resnet20_gn", "vgg11"]
LARGE = ["resnet18_bn", "resnet18_evonorm", "resnet18_gn"]
TEXTS = ["distilbert", "distilbert_small", "text_mlp"]


def narrow(name: str, num_classes: int = 10) -> nn.Sequential:
    """The model with few channels, so that tests are quick."""
    options: dict[str, Any] = {"slim": 32, "dropout": 0.0} if name == "vgg11" else {"channels": (4, 8, 8)}
    return models.get(name, (3, 32, 32), num_classes, **options)


def test_every_model_is_tested() -> None:
    assert sorted([*SMALL, *PAPER, *LARGE, *TEXTS, "lenet"]) == models.names()
    assert [name for name in models.names() if models.takes_texts(name)] == TEXTS


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [
        ("resnet20_bn", 272_474, 64),
        ("resnet20_evonorm", 272_474, 64),
        ("resnet20_gn", 272_474, 64),
        ("vgg11", 9_750_922, 512),
        ("lenet", 62_006, 84),
    ],
)
def test_paper_model_has_its_size_and_features(name: str, parameters: int, features: int) -> None:
    model = models.get(name, (3, 32, 32), 10).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(models.feature_layer(model))
    layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen[0].shape == (2, features)


def test_resnet_convolutions_start_from_their_fan_out() -> None:
    torch.manual_seed(0)
    model = models.resnet20((3, 32, 32), 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_evonorm_is_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    norm = models.EvoNormS0(64).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64))
        norm.bias.copy_(torch.rand(64))
    out = norm(x)
    for b in range(2):
        for group in range(32):  # two channels each
            channels = slice(2 * group, 2 * group + 2)
            values = x[b, channels]
            deviation = (((values - values.mean()) ** 2).sum() / (values.numel() - 1) + 1e-5).sqrt()
            swish = values * torch.sigmoid(values)
            expected = swish / deviation * norm.weight[channels, None, None] + norm.bias[channels, None, None]
            torch.testing.assert_close(out[b, channels], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAPER)
def test_paper_model_trains_in_the_simulator(name: str) -> None:
    torch.manual_seed(0)
    engine = "loop" if name == "resnet20_bn" else "vmap"
    x, y = torch.randn(2, 6, 3, 32, 32), torch.randint(0, 10, (2, 6))
    results = []
    for used in ("loop", engine):
        torch.manual_seed(1)
        sim = Simulator(narrow(name), topology.ring(2), "qg_dsgdm_n", lr=0.05, engine=used)
        losses = [sim.step(nn.functional.cross_entropy, (x, y)).mean().item() for _ in range(4)]
        assert losses[-1] < losses[0]
        results.append(sim.opt.x.clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_batch_statistics_stay_with_their_worker() -> None:
    torch.manual_seed(0)
    sim = Simulator(narrow("resnet20_bn"), topology.complete(2), "dsgd", lr=0.05)
    x = torch.stack([torch.randn(4, 3, 32, 32), 5 + torch.randn(4, 3, 32, 32)])
    sim.step(nn.functional.cross_entropy, (x, torch.zeros(2, 4, dtype=torch.int64)))
    first, second = (dict(model.named_buffers()) for model in sim.models)
    assert all(not torch.equal(first[key], second[key]) for key in first if key.endswith("running_mean"))
    assert torch.equal(sim.opt.x[0], sim.opt.x[1])


# Larger models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "engine"), [("resnet18_bn", "loop"), ("resnet18_gn", "loop"), ("resnet18_evonorm", "vmap")]
)
def test_resnet18_is_torchvisions_and_runs_in_the_simulator(name: str, engine: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = models.get(name, (3, 32, 32), 7)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in torchvision.models.resnet18(num_classes=7).parameters()
    )
    kinds = {type(module).__name__ for module in model.modules()}
    norms = {"resnet18_bn": "BatchNorm2d", "resnet18_gn": "GroupNorm", "resnet18_evonorm": "EvoNormS0"}
    assert kinds & {*norms.values(), "ReLU"} == {norms[name], *(() if name.endswith("evonorm") else ("ReLU",))}
    sim = Simulator(model, topology.ring(2), "qg_dsgdm_n", lr=0.001, engine=engine)
    x, y = torch.randn(2, 3, 3, 32, 32), torch.randint(0, 7, (2, 3))
    before = sim.opt.x.clone()
    losses = sim.step(nn.functional.cross_entropy, (x, y))
    assert losses.isfinite().all()
    assert not torch.equal(sim.opt.x, before)


def test_resnet18_with_batch_norm_is_torchvisions_function() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = models.get("resnet18_bn", (3, 64, 64), 5).eval()
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), theirs(x))


@pytest.mark.parametrize("algorithm", ["ccl", "gut", "qg_gutm"])
def test_methods_of_other_papers_run_with_evonorm(algorithm: str) -> None:
    torch.manual_seed(0)
    sim = Simulator(narrow("resnet20_evonorm"), topology.ring(4), algorithm, lr=0.01)
    before = sim.opt.x.clone()
    losses = sim.step(nn.functional.cross_entropy, (torch.randn(4, 4, 3, 32, 32), torch.randint(0, 10, (4, 4))))
    assert losses.isfinite().all()
    assert sim.opt.x.isfinite().all()
    assert not torch.equal(sim.opt.x, before)


def texts(count: int, length: int = 8, vocabulary: int = 40) -> torch.Tensor:
    tokens = torch.randint(1, vocabulary, (count, length))
    tokens[:, -2:] = 0
    return tokens


@pytest.mark.parametrize(("name", "lr"), [("text_mlp", 0.01), ("distilbert_small", 0.001)])
def test_text_models_ignore_padding_and_learn(name: str, lr: float) -> None:
    if name != "text_mlp":
        pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = models.get(name, (8,), 4, vocabulary=40)
    x, y = texts(12), torch.arange(12) % 4
    with torch.no_grad():
        short = model(x[:, :-2])
        torch.testing.assert_close(model(x), short, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(model(torch.zeros_like(x))).all()
    batches = x.view(2, 6, 8), y.view(2, 6)
    sim = Simulator(model, topology.ring(2), "qg_dadam", lr=lr, engine=models.default_engine(name, "cpu"))
    losses = [sim.step(nn.functional.cross_entropy, batches).mean().item() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_distilbert_has_the_papers_size() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model = models.get("distilbert", (128,), 4)
    assert sum(p.numel() for p in model.parameters()) == 66_956_548  # as distilbert-base-uncased with 4 classes


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "gossip", "ring", "##s", "average"]


def write_pretrained(folder: Path, vocabulary: int = len(WORDS), length: int = 16) -> None:
    """A small DistilBERT and its tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.DistilBertTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    tokenizer.save_pretrained(str(folder))
    small = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": length}
    torch.manual_seed(5)
    config = transformers.DistilBertConfig(vocab_size=vocabulary, **small)
    transformers.DistilBertModel(config).save_pretrained(str(folder))


def test_distilbert_starts_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_pretrained(tmp_path / "model")
    stored = transformers.DistilBertModel.from_pretrained(str(tmp_path / "model"), local_files_only=True)
    tokenizer = data.PretrainedTokenizer(tmp_path / "model")
    tokens = tokenizer.encode(["Gossip rings", "average"], 6)
    assert tokens.tolist() == [[2, 5, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]]
    model = models.get("distilbert", (6,), 3, vocabulary=tokenizer.vocabulary, pretrained=str(tmp_path / "model"))
    assert all(module.training for module in model.modules())
    for name, value in stored.state_dict().items():
        assert torch.equal(model.model.distilbert.state_dict()[name], value)
    with Recorder(model.eval(), models.feature_layer(model)) as recorder:
        scores = model(tokens)
    assert torch.equal(model.model.classifier(recorder.result().features), scores)
    with pytest.raises(ValueError, match="knows 9 tokens in texts of up to 16; the data have 9 and 20"):
        models.get("distilbert", (20,), 3, vocabulary=9, pretrained=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="holds no DistilBERT that transformers can load"):
        models.get("distilbert", (6,), 3, vocabulary=9, pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere holds no tokenizer that transformers can load"):
        data.PretrainedTokenizer(tmp_path / "nowhere")


def test_other_packages_register_models_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    def linear(input_shape: Sequence[int], num_classes: int) -> nn.Module:
        return nn.Linear(*input_shape, num_classes)

    models.register("own", linear, draws=True, batched=False)
    assert models.get("own", (4,), 2).in_features == 4
    assert (models.default_engine("own", "cpu"), models.default_engine("own", "cuda:0")) == ("loop", "loop")
    assert (models.default_engine("mlp", "cpu"), models.default_engine("mlp", "cuda")) == ("threads", "vmap")
    with pytest.raises(ValueError, match="there is a model 'own' already"):
        models.register("own", linear)
