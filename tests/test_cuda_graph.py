"""Steps as CUDA graphs, with a stand-in for torch.cuda that records and replays on the CPU.

The stand-in keeps what makes a CUDA graph different from a function: recording runs Python once and changes nothing;
a replay runs the recorded kernels on the same memory and with the numbers of the recording; values must not reach the
host, nor host data a tensor, while recording. tests/test_gpu.py runs the same comparison with torch.cuda.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qgm_ext as qgm
from qgm_ext import algorithms, cuda_graph, topology

aten = torch.ops.aten
# What needs a value on the host, or brings one from there: a stream that is being captured refuses both.
HOST = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.lift_fresh.default,
}
# Arguments that an operator writes although its schema does not say so.
HIDDEN_WRITES = {aten.native_batch_norm.default: (3, 4)}


class Recorder(TorchDispatchMode):
    """Keeps every operator call with its very tensors, and the memory from before the first write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for k, argument in enumerate(func._schema.arguments):
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or k in HIDDEN_WRITES.get(func, ()):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self._save(tensor)
        out = func(*args, **kwargs)
        for tensor in self._fresh(func, out):
            self._own.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, out))
        return out

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    @staticmethod
    def _fresh(func: Any, out: Any) -> list[Tensor]:
        """The results of a call that lie in memory of their own."""
        outs = out if isinstance(out, (tuple, list)) and len(func._schema.returns) > 1 else [out]
        pairs = zip(func._schema.returns, outs, strict=False)
        return [
            t for ret, value in pairs if ret.alias_info is None for t in tree_leaves(value) if isinstance(t, Tensor)
        ]

    def undo(self) -> None:
        for storage, values in self._before.values():
            storage.copy_(values)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for place, value in zip(self._fresh(func, out), self._fresh(func, again), strict=True):
                    place.detach().copy_(value)


class StandIn:
    def __init__(self) -> None:
        self.on_side, self.records, self.replays = 0, 0, 0

    def on_side_stream(self, run: Callable[[], Tensor]) -> Tensor:
        self.on_side += 1
        return run().clone()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.records += 1
        recorder, drawn = Recorder(), torch.get_rng_state()
        try:
            with recorder:
                result = run()
        finally:
            recorder.undo()
            torch.set_rng_state(drawn)

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay, result


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graph, "runtime_of", lambda device: stand_in)
    return stand_in


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def batch(t: int, n: int = 8, size: int = 6, inputs: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return (
        torch.randn(n, size, *inputs, generator=generator),
        torch.randint(0, 3, (n, size), generator=generator),
    )


class Pair:
    """A simulator that replays and one that does not, in step."""

    def __init__(
        self, model: nn.Module, topo: topology.Topology, algorithm: str, lr: float = 0.1, **options: Any
    ) -> None:
        self.sims = [qgm.Simulator(model, topo, algorithm, lr=lr, cuda_graph=on, **options) for on in (True, False)]
        self.graphs = self.sims[0]._graphs

    def step(self, loss_fn: Any, pair: tuple[Tensor, Tensor], lr: float | None = None) -> None:
        losses = [sim.step(loss_fn, pair, lr=lr) for sim in self.sims]
        assert torch.equal(*losses)
        self.check()

    def check(self) -> None:
        replayed, plain = (sim.state_dict() for sim in self.sims)
        pairs = zip(tree_leaves(replayed), tree_leaves(plain), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
        assert torch.equal(self.sims[0].g, self.sims[1].g)
        assert self.sims[0].opt.bytes_sent_per_step == self.sims[1].opt.bytes_sent_per_step


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.3}], ids=["", "clipped"])
def test_replayed_steps_have_the_bits_of_launched_ones(
    runtime: StandIn, engine: str, options: dict[str, float]
) -> None:
    pair = Pair(mlp(), topology.ring(8), "qg_dsgdm_n", engine=engine, **options)
    for t in range(8):
        pair.step(F.cross_entropy, batch(t))
    assert pair.graphs.recordings == (0, 1)
    assert (runtime.on_side, runtime.records, runtime.replays) == (3, 1, 5)


def test_losses_belong_to_the_caller(runtime: StandIn) -> None:
    sim = qgm.Simulator(mlp(), topology.ring(8), "qg_dsgdm_n", lr=0.1, cuda_graph=True)
    losses = [sim.step(F.cross_entropy, batch(t)) for t in range(6)]
    assert len({loss.data_ptr() for loss in losses}) == 6
    assert not torch.equal(losses[4], losses[5])


def test_a_replayed_step_counts_as_gradient_in_the_timings(runtime: StandIn) -> None:
    sim = qgm.Simulator(mlp(), topology.ring(8), "qg_dsgdm_n", lr=0.1, cuda_graph=True)
    seen = []
    for t in range(6):
        sim.step(F.cross_entropy, batch(t))
        seen.append(sim.timings)
    assert seen[3].optimizer == seen[5].optimizer == seen[2].optimizer > 0
    assert seen[5].gradient > seen[4].gradient > seen[3].gradient > seen[2].gradient


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_batch_statistics_move_once_in_every_replay(runtime: StandIn, engine: str) -> None:
    pair = Pair(normalised(), topology.ring(4), "dsgdm", engine=engine)
    for t in range(7):
        pair.step(F.cross_entropy, batch(t, 4, inputs=(1, 5)))
    assert int(pair.sims[0].models[3][1].num_batches_tracked) == 7
    assert runtime.replays == 4


def test_another_lr_is_another_recording_and_an_old_one_is_found_again(runtime: StandIn) -> None:
    pair = Pair(mlp(), topology.ring(8), "qg_dsgdm_n")
    for t, lr in enumerate([0.1] * 5 + [0.05] * 3 + [0.1] * 2):
        pair.step(F.cross_entropy, batch(t), lr=lr)
    # 0.05 runs once behind replayed gradients before it is recorded with them.
    assert pair.graphs.recordings == (1, 2)
    assert runtime.records == 3


def test_numbers_that_are_always_new_are_launched_after_the_replayed_gradients(runtime: StandIn) -> None:
    pair = Pair(mlp(), topology.ring(8), "qg_dsgdm_n")
    for t in range(30):
        pair.step(F.cross_entropy, batch(t), lr=0.1 / (t + 1))
    assert pair.graphs.recordings == (1, 0)
    assert runtime.replays == 27
    (program,) = pair.graphs._programs
    assert len(program.met) == cuda_graph.MOST_UPDATES


def test_recorded_updates_are_bounded(runtime: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_UPDATES", 2)
    pair = Pair(mlp(), topology.ring(8), "dsgd")
    for t, lr in enumerate([0.1] * 4 + [0.2] * 3 + [0.3] * 3 + [0.1] * 3):
        pair.step(F.cross_entropy, batch(t), lr=lr)
    assert pair.graphs.recordings == (1, 2)
    assert runtime.records == 5


def test_a_time_varying_topology_is_recorded_once_a_period(runtime: StandIn) -> None:
    pair = Pair(mlp(), topology.one_peer_exponential(8), "qg_dsgdm_n")
    for t in range(12):
        pair.step(F.cross_entropy, batch(t))
    assert pair.graphs.recordings == (0, 3)


# Whose update is launched after the replay, and why.
NEW_NUMBERS = {"d_adam", "cadam"}  # bias corrections


@pytest.mark.parametrize("name", [n for n in algorithms.names() if not algorithms.get_class(n).needs_model])
def test_every_algorithm_replays_to_the_same_bits(runtime: StandIn, name: str) -> None:
    topo = topology.binary_tree(7) if name.startswith("relay") else topology.ring(7)
    pair = Pair(mlp(), topo, name)
    for t in range(9):
        pair.step(F.cross_entropy, batch(t, 7))
    gradients, whole = pair.graphs.recordings
    plannable = pair.sims[0].opt.plan() is not None
    assert whole == 0 or plannable
    if name in NEW_NUMBERS:
        assert (gradients, whole) == (1, 0)
    elif plannable:
        assert whole >= 1
    assert runtime.replays == 6


def test_numbers_of_each_worker_are_no_part_of_a_recording(runtime: StandIn) -> None:
    for topo, name, options in (
        (topology.random_directed(8, 0.3, seed=1), "sgp", {}),
        (topology.chain(8), "relaysgd", {"fill": "current"}),
    ):
        pair = Pair(mlp(), topo, name, **options)
        before = [pair.sims[0].opt.plan().parts[0]]
        for t in range(9):
            pair.step(F.cross_entropy, batch(t, topo.num_workers))
            before.append(pair.sims[0].opt.plan().parts[0])
        numbers = [part.row_scalars if name == "sgp" else part.counts for part in before]
        assert not torch.equal(numbers[3], numbers[4])
        assert pair.graphs.recordings == (0, 1)


def test_gradients_that_are_not_finite_are_left_out_with_their_batch_statistics(runtime: StandIn) -> None:
    pair = Pair(normalised(), topology.ring(4), "dsgdm", on_nonfinite="skip")
    for t in range(8):
        x, y = batch(t, 4, inputs=(1, 5))
        if t in (1, 5):
            x[2] = float("inf")
        pair.step(F.cross_entropy, (x, y)) if t not in (1, 5) else [s.step(F.cross_entropy, (x, y)) for s in pair.sims]
        for sims in zip(*(sim.state_dict()["buffers"] for sim in pair.sims), strict=True):
            assert all(torch.equal(sims[0][key], sims[1][key]) for key in sims[0])
    assert torch.equal(pair.sims[0].opt.x, pair.sims[1].opt.x)
    assert pair.sims[0].opt.skipped_steps == 2
    assert pair.graphs.recordings == (1, 0)


def test_whatever_a_recording_depends_on_makes_another_program(runtime: StandIn) -> None:
    pair = Pair(normalised(), topology.ring(4), "dsgdm")

    def steps(count: int, size: int = 6, loss_fn: Any = F.cross_entropy) -> None:
        for t in range(count):
            pair.step(loss_fn, batch(t, 4, size, (1, 5)))

    steps(4)
    assert runtime.records == 1
    steps(4, size=3)
    assert runtime.records == 2
    steps(1)  # the first one is still there
    assert runtime.on_side == 6
    for sim in pair.sims:
        sim.eval()
    steps(4)
    assert runtime.records == 3
    for sim in pair.sims:
        sim.models[1][1].running_mean = torch.full((4,), 0.5)
    steps(4)
    assert runtime.records == 4
    for sim in pair.sims:
        sim.clip_grad_norm = 0.1
    steps(4)
    assert runtime.records == 5
    assert len(pair.graphs._programs) == cuda_graph.MOST_PROGRAMS
    steps(4, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    assert runtime.records == 6


def test_a_loss_that_is_another_object_in_every_step_is_warned_of(runtime: StandIn) -> None:
    sim = qgm.Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1, cuda_graph=True)
    for t in range(4):
        sim.step(nn.CrossEntropyLoss(), batch(t, 4))
    with pytest.warns(UserWarning, match="cuda_graph=True gains nothing here: the loss function"):
        sim.step(nn.CrossEntropyLoss(), batch(4, 4))
    assert runtime.records == 0


def test_what_is_written_between_replays_is_where_the_next_one_starts(runtime: StandIn) -> None:
    pair = Pair(mlp(), topology.ring(8), "qg_dsgdm_n")
    for t in range(5):
        pair.step(F.cross_entropy, batch(t))
    for sim in pair.sims:
        sim.models[2][0].weight.data = torch.ones(7, 5)
    pair.step(F.cross_entropy, batch(5))
    fresh = Pair(mlp(), topology.ring(8), "qg_dsgdm_n")
    for sim in pair.sims:
        sim.load_state_dict(fresh.sims[0].state_dict())
    pair.step(F.cross_entropy, batch(6))
    assert pair.sims[0].num_steps == 1
    assert runtime.records == 1


def test_step_closure_takes_nested_batches(runtime: StandIn) -> None:
    def closure(model: nn.Module, given: dict[str, Any]) -> Tensor:
        return given["scale"] * F.cross_entropy(model(given["pair"][0]), given["pair"][1])

    sims = [qgm.Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1, cuda_graph=on) for on in (True, False)]
    for t in range(7):
        x, y = batch(t, 4)
        # Memory of their own: a library's sums may depend on how inputs are aligned.
        batches = [{"pair": (x[i].clone(), y[i].clone()), "scale": 2.0, "name": None} for i in range(4)]
        assert torch.equal(*(sim.step_closure(closure, batches) for sim in sims))
    assert torch.equal(sims[0].opt.x, sims[1].opt.x)
    assert runtime.replays == 4
    with pytest.raises(TypeError, match="cuda_graph=True takes batches of tensors, numbers, strings, .* got object"):
        sims[0].step_closure(closure, [object()] * 4)
    with pytest.raises(
        ValueError, match="cuda_graph=True needs batches on the models' device, cpu, got a tensor on meta"
    ):
        sims[0].step_closure(closure, [torch.zeros(1, device="meta")] * 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda loss: loss * (1.0 if loss.item() > 0 else 2.0),
        lambda loss: loss + torch.tensor(1.0),
    ],
    ids=["value to the host", "host data to a tensor"],
)
def test_a_model_that_talks_to_the_host_is_named_and_nothing_changes(
    runtime: StandIn, wrong: Callable[[Tensor], Tensor]
) -> None:
    def loss_fn(scores: Tensor, classes: Tensor) -> Tensor:
        return wrong(F.cross_entropy(scores, classes))

    sim = qgm.Simulator(normalised(), topology.ring(4), "dsgdm", lr=0.1, cuda_graph=True)
    for t in range(3):
        sim.step(loss_fn, batch(t, 4, inputs=(1, 5)))
    before = [leaf.clone() for leaf in tree_leaves(sim.state_dict()) if isinstance(leaf, Tensor)]
    with pytest.raises(RuntimeError, match=r"cuda_graph=True can't record this step; .*not permitted"):
        sim.step(loss_fn, batch(3, 4, inputs=(1, 5)))
    after = [leaf for leaf in tree_leaves(sim.state_dict()) if isinstance(leaf, Tensor)]
    assert all(map(torch.equal, before, after))
    assert sim.num_steps == 3
    sim.step(F.cross_entropy, batch(3, 4, inputs=(1, 5)))
    assert sim.num_steps == 4


def test_what_can_not_be_replayed_is_refused(runtime: StandIn) -> None:
    with pytest.raises(ValueError, match="cuda_graph=True can't replay ngc, which takes several gradients a step"):
        qgm.Simulator(mlp(), topology.ring(4), "ngc", lr=0.1, cuda_graph=True)
    with pytest.raises(TypeError, match="cuda_graph must be True or False, got 'yes'"):
        qgm.Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1, cuda_graph="yes")
    sim = qgm.Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1, cuda_graph=True)
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got -1"):
        sim.step(F.cross_entropy, batch(0, 4), lr=-1)


def test_cpu_models_are_refused_by_the_name_of_the_option() -> None:
    with pytest.raises(ValueError, match="cuda_graph=True is for models on a CUDA device, these are on cpu"):
        qgm.Simulator(mlp(), topology.ring(4), "dsgd", lr=0.1, cuda_graph=True)


def test_a_plan_changes_nothing_and_says_what_is_launched() -> None:
    opt = qgm.StackedOptimizer(torch.zeros(4, 3), topology.ring(4), "qg_dsgdm_n", lr=0.5)
    first, second = opt.plan(), opt.plan(0.25)
    assert first.key == opt.plan().key != second.key
    assert (opt.num_steps, opt.bytes_sent) == (0, 0)
    opt.step(torch.ones(4, 3))
    assert opt.bytes_sent == first.bytes_sent == 4 * 2 * 3 * 4
    checking = qgm.StackedOptimizer(torch.zeros(4, 3), topology.ring(4), "dsgd", lr=0.5, on_nonfinite="skip")
    assert checking.plan() is None
    compressing = qgm.StackedOptimizer(torch.zeros(4, 3), topology.ring(4), "choco_sgd", lr=0.5)
    assert compressing.plan() is None
    norming = qgm.StackedOptimizer(torch.zeros(4, 3), topology.ring(4), "qg_dadam", lr=0.5)
    assert norming.plan() is None


class Calls:
    """torch.cuda as a list of what was called, with names for streams and graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream = "current"
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, _name=name, **kwargs: self.context(_name, args, kwargs))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.make("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.make("current"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.make("graph"))

    def make(self, name: str) -> Any:
        calls = self

        class Named:
            def wait_stream(self, other: Any) -> None:
                calls.log.append(f"{name} waits for {other}")

            def replay(self) -> None:
                calls.log.append("replay")

            def __repr__(self) -> str:
                return name

        return Named()

    @contextmanager
    def context(self, name: str, args: Any, kwargs: Any) -> Iterator[None]:
        self.log.append(f"{name} {' '.join(map(str, [*args, *kwargs.values()]))}")
        try:
            yield
        finally:
            self.log.append(f"end of {name}")


def test_torch_cuda_is_used_as_its_documentation_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    runtime = cuda_graph.runtime_of(torch.device("cuda", 0))
    calls.log.clear()

    def run() -> Tensor:
        calls.log.append("run")
        return torch.ones(1)

    def fail() -> Tensor:
        raise ValueError("no step")

    warm_up = ["side waits for current", "stream side", "run", "end of stream", "current waits for side"]
    assert torch.equal(runtime.on_side_stream(run), torch.ones(1))
    assert calls.log == warm_up
    calls.log.clear()
    with pytest.raises(ValueError, match="no step"):
        runtime.on_side_stream(fail)
    assert calls.log == [call for call in warm_up if call != "run"]
    calls.log.clear()
    replay, _ = runtime.record(run)
    replay()
    assert calls.log == [
        "device cuda:0", "graph graph pool side thread_local", "run", "end of graph", "end of device", "replay",
    ]  # fmt: skip
