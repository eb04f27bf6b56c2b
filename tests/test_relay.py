"""RelaySGD against the paper's own form, its steady state, message layouts and trees; bits on every path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import qgm_ext as qgm
from qgm_ext import _cpu, ops, topology

F64 = torch.float64
TREES = {
    "chain": topology.chain(8),
    "star": topology.star(8),
    "binary": topology.binary_tree(8),
    "spanning": topology.spanning_tree(topology.torus(8)),
    "alone": topology.chain(1),
    "two": topology.chain(2),
}


def academic(tree: topology.Topology, x: torch.Tensor, steps: list[torch.Tensor], fill: str) -> torch.Tensor:
    """RelaySum as the paper writes it: messages with counts, zero at the start, missing models filled in."""
    n, start = len(x), x.clone()
    neighbours = [tree.neighbors(i) for i in range(n)]
    m = {(i, j): torch.zeros_like(x[0]) for i in range(n) for j in neighbours[i]}
    k = dict.fromkeys(m, 0)
    for u in steps:
        half = x + u
        m, k = (
            {(i, j): half[i] + sum(m[o, i] for o in neighbours[i] if o != j) for i, j in m},
            {(i, j): 1 + sum(k[o, i] for o in neighbours[i] if o != j) for i, j in k},
        )
        total = [sum(k[j, i] for j in neighbours[i]) for i in range(n)]
        x = torch.stack(
            [
                (
                    half[i]
                    + sum(m[j, i] for j in neighbours[i])
                    + (n - 1 - total[i]) * (start if fill == "initial" else half)[i]
                )
                / n
                for i in range(n)
            ]
        )
    return x


@pytest.mark.parametrize("fill", ["initial", "current"])
@pytest.mark.parametrize("name", TREES)
def test_relaysgd_is_the_papers_relay_sum(name, fill):
    tree = TREES[name]
    n = tree.num_workers
    start = torch.randn(1, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).expand(n, 5).clone()
    gradients = [torch.randn(n, 5, dtype=F64, generator=torch.Generator().manual_seed(t)) for t in range(12)]
    opt = qgm.StackedOptimizer(start.clone(), tree, "relaysgd", lr=0.1, momentum=0.0, fill=fill)
    for g in gradients:
        opt.step(g)
    torch.testing.assert_close(
        opt.x, academic(tree, start, [-0.1 * g for g in gradients], fill), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", ["chain", "binary"])
def test_steady_state_is_the_mean_of_models_as_old_as_their_way(name):
    tree = TREES[name]
    distance = torch.from_numpy(tree.trees().trees[0].distances())
    opt = qgm.StackedOptimizer(torch.zeros(8, 3, dtype=F64), tree, "relaysgd", lr=0.1, momentum=0.0)
    halves = []
    for t in range(15):
        g = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(t))
        halves.append(opt.x - 0.1 * g)
        opt.step(g)
    expected = [sum(halves[14 - max(int(distance[i, j]) - 1, 0)][j] for j in range(8)) / 8 for i in range(8)]
    torch.testing.assert_close(opt.x, torch.stack(expected), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fill", ["initial", "current"])
def test_without_updates_an_equal_start_stays(fill):
    opt = qgm.StackedOptimizer(torch.full((8, 4), 3.0), TREES["chain"], "relaysgd", lr=0.1, fill=fill)
    for _ in range(12):
        opt.step(torch.zeros(8, 4))
        torch.testing.assert_close(opt.x, torch.full((8, 4), 3.0))


@pytest.mark.parametrize("algorithm", ["relaysgd", "relaysgd_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_trees_at_once_are_one_tree_for_even_and_one_for_odd_coordinates(algorithm, dtype):
    both = topology.double_binary_trees(9)
    even = topology.binary_tree(9)
    odd = mirrored(even)
    for dim in (1, 2, 127, 128, 129, 300):
        start = torch.ones(9, dim).to(dtype)
        opts = [
            qgm.StackedOptimizer(start[:, k::2].clone(), tree, algorithm, lr=0.1)
            for k, tree in enumerate((even, odd))
            if start[:, k::2].shape[1]
        ]
        together = qgm.StackedOptimizer(start.clone(), both, algorithm, lr=0.1)
        for t in range(6):
            g = torch.randn(9, dim, generator=torch.Generator().manual_seed(t)).to(dtype)
            together.step(g)
            for k, opt in enumerate(opts):
                opt.step(g[:, k::2].contiguous())
        for k, opt in enumerate(opts):
            assert torch.equal(together.x[:, k::2], opt.x), (dim, k)


def mirrored(tree: topology.Topology) -> topology.Topology:
    """The tree with worker w renamed n - 1 - w."""
    return topology.from_matrix(tree.matrix()[::-1, ::-1].copy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_do_not_depend_on_simd_level_or_threads_and_follow_the_order_of_the_header(dtype):
    tree, n, dim = TREES["binary"].trees(), 8, 3001
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    g = torch.randn(n, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    messages = torch.randn(14, dim, generator=torch.Generator().manual_seed(3))
    counts = torch.arange(1.0, 9.0)[None]
    level, threads, limit = _cpu.simd_level(), torch.get_num_threads(), _cpu.set_elements_per_thread(1000)
    results = []
    try:
        levels = ["baseline", "avx2", "avx512"]
        best = levels.index(_cpu.build_info()["simd_best"])
        for name, count in itertools.product(levels[: best + 1], (1, 3)):
            _cpu.set_simd_level(name)
            torch.set_num_threads(count)
            out, kept = x.clone(), messages.clone()
            ops.relay_step_(out, g, [], kept, tree.tensors("cpu"), counts, "dsgd", [0.1, 1e-2])
            results.append((out, kept))
    finally:
        _cpu.set_simd_level(level)
        _cpu.set_elements_per_thread(limit)
        torch.set_num_threads(threads)
    xs, gs, old = x.float().numpy(), g.float().numpy(), messages.numpy()
    h = xs - np.float32(0.1) * (gs + np.float32(1e-2) * xs)
    to, frm = tree.trees[0].edges
    new, mixed = np.empty_like(old), np.empty_like(h)
    for e in range(14):
        new[e] = h[frm[e]]
        for f in range(14):
            if to[f] == frm[e] and frm[f] != to[e]:
                new[e] = new[e] + old[f]
    for i in range(n):
        total = np.float32(i + 1) * h[i]
        for e in np.flatnonzero(to == i):
            total = total + new[e]
        mixed[i] = total * (np.float32(1) / np.float32(n))
    for out, kept in results:
        assert torch.equal(kept, torch.from_numpy(new))
        assert torch.equal(out, torch.from_numpy(mixed).to(dtype))


def test_graphs_that_are_no_trees_are_refused_and_spanning_tree_is_named():
    for graph in (topology.ring(8), topology.exponential(8)):
        with pytest.raises(ValueError, match=r"needs a tree, but topology .*spanning_tree\(topology\)"):
            qgm.StackedOptimizer(torch.zeros(8, 3), graph, "relaysgd", lr=0.1)
    with pytest.raises(ValueError, match="needs a static tree"):
        qgm.StackedOptimizer(torch.zeros(8, 3), topology.one_peer_exponential(8), "relaysgd", lr=0.1)
    tree = topology.spanning_tree(topology.social())
    assert tree.trees().num_edges == 62
    qgm.StackedOptimizer(torch.zeros(32, 3), tree, "relaysgd", lr=0.1).step(torch.ones(32, 3))
    with pytest.raises(ValueError, match="needs all workers to start from the same parameters"):
        qgm.StackedOptimizer(torch.eye(8), TREES["chain"], "relaysgd", lr=0.1)
    with pytest.raises(ValueError, match="fill must be one of initial, current, got 'zero'"):
        qgm.algorithms.get("relaysgd", lr=0.1, fill="zero")


def test_binary_trees_are_numbered_as_in_the_code():
    tree = topology.binary_tree(8)
    assert [tree.neighbors(w) for w in range(8)] == [[1], [0, 2, 3], [1, 4, 5], [1, 6, 7], [2], [2], [3], [3]]
    assert tree.trees().reached(0)[0].tolist() == [1, 3, 3, 3, 1, 1, 1, 1]
    chain = topology.chain(8).trees()
    assert chain.reached(5)[0].min() == 6
    assert chain.reached(6)[0].tolist() == [7] * 8


def test_relay_step_names_the_wrong_argument():
    tree, x = TREES["chain"].trees(), torch.zeros(8, 6)
    messages, counts = torch.zeros(14, 6), torch.ones(1, 8)

    def step(**changes):
        a = {"x": x, "g": torch.zeros(8, 6), "messages": messages, "counts": counts, "rule": "dsgd", **changes}
        ops.relay_step_(a["x"], a["g"], [], a["messages"], tree.tensors("cpu"), a["counts"], a["rule"], [0.1, 0.0])

    step()
    for changes, message in (
        ({"messages": torch.zeros(13, 6)}, r"messages must be \[14, 6\] float32"),
        ({"counts": torch.ones(8)}, r"counts must be \[1, 8\] float32"),
        ({"rule": "exact_diffusion"}, "takes 1 state vectors"),
        ({"rule": "dsgd_cta"}, "rule 'dsgd_cta' can't be relayed"),
        ({"g": x}, "overlap in memory"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**changes)
    torch.library.opcheck(
        torch.ops.qgm_ext.relay_step_.default,
        (x, torch.zeros(8, 6), [], messages, *tree.tensors("cpu"), counts, "dsgd", [0.1, 0.0]),
    )
