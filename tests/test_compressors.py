"""Compressors: what they promise of every vector, their sizes, hand-made cases and wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, algorithms, compressors, topology
from qgm_ext.compressors import BFloat16, Identity, Int8, Qsgd, RandomK, ScaledSign, TopK
from qgm_ext.flat import FlatLayout

F64 = torch.float64


def rows(d, count=4, seed=0):
    return torch.tensor(np.random.RandomState(seed).randn(count, d))


def generators(count, key=0):
    return [compressors.generator(key, row) for row in range(count)]


def error(compressor, values, key=0):
    return (compressor(values, generators(len(values), key)) - values).square().sum(1) / values.square().sum(1)


@pytest.mark.parametrize("d", [1, 15, 16, 17, 1001])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_top_k_keeps_the_largest_and_at_least_their_share_of_the_energy(d, ratio):
    values, compressor = rows(d), TopK(ratio)
    kept = compressor(values)
    k = max(1, int(d * (1 - ratio)))
    assert ((kept != 0).sum(1) == k).all()
    assert ((kept == 0) | (kept == values)).all()
    expected = np.sort(values.abs().numpy(), axis=1)[:, ::-1][:, :k]
    np.testing.assert_array_equal(np.sort(kept.abs().numpy(), axis=1)[:, ::-1][:, :k], expected)
    assert (kept.square().sum(1) >= k / d * values.square().sum(1) * (1 - 1e-12)).all()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 0.999])
def test_top_k_keeps_what_a_stable_sort_puts_first(ratio):
    generator = torch.Generator().manual_seed(1)
    many_ties = torch.randint(-3, 4, (5, 203), generator=generator).double()
    for values in (rows(203), many_ties, torch.zeros(2, 7)):
        k = TopK(ratio).kept(values.shape[1])
        index = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(TopK(ratio)(values), torch.zeros_like(values).scatter_(1, index, values.gather(1, index)))


def test_top_k_does_not_hide_nan():
    assert TopK(0.5)(torch.tensor([[1.0, float("nan"), 3.0, 2.0]])).isnan()[0, 1]


def test_top_k_takes_the_first_of_equal_numbers():
    assert TopK(0.5)(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("d", "ratio", "kept"), [(100, 0.9, 9), (1000, 0.9, 99), (35, 0.8, 6), (1, 0.99, 1)])
def test_the_number_kept_is_computed_in_floating_point_as_the_authors_do(d, ratio, kept):
    assert TopK(ratio).kept(d) == RandomK(ratio).kept(d) == kept


@pytest.mark.parametrize("compressor", [RandomK(0.75, unbiased=True), Qsgd(2, unbiased=True)], ids=repr)
def test_unbiased_compressors_have_the_vector_as_their_mean(compressor):
    values = rows(12, 1)
    draws = 4000
    many = compressor(values.expand(draws, 12), generators(draws))
    deviation = many.std(0) / draws**0.5
    assert ((many.mean(0) - values[0]).abs() <= 5 * deviation + 1e-12).all()
    assert many.std(0).max() > 0.1  # it is random


@pytest.mark.parametrize(
    "compressor", [TopK(0.9), RandomK(0.9), Qsgd(1), Qsgd(4), Qsgd(7), ScaledSign(), ScaledSign(1)], ids=repr
)
@pytest.mark.parametrize("d", [1, 16, 1001])
def test_biased_compressors_are_contractions(compressor, d):
    """E ||Q(x) - x||^2 <= (1 - delta) ||x||^2 with delta > 0."""
    values = rows(d)
    mean = torch.stack([error(compressor, values, key) for key in range(30)]).mean(0)
    assert (mean < 1).all()


def test_unbiased_forms_are_no_contractions():
    assert (error(RandomK(0.9, unbiased=True), rows(1001)) > 1).all()
    assert (error(Qsgd(1, unbiased=True), rows(1001)) > 1).all()


def test_qsgd_rounds_to_the_two_nearest_levels():
    values = rows(50)
    got = Qsgd(3, unbiased=True)(values, generators(4))
    level = got.abs() / values.norm(dim=1, keepdim=True) * 7
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-12)
    assert ((level - values.abs() / values.norm(dim=1, keepdim=True) * 7).abs() < 1).all()
    assert (got * values >= 0).all()
    shrink = 1 + min(50 / 49, 50**0.5 / 7)
    torch.testing.assert_close(Qsgd(3)(values, generators(4)) * shrink, got, rtol=1e-14, atol=0)


def test_scaled_sign_by_hand_and_both_signs_of_zero():
    values = torch.tensor([[2.0, -4.0, 0.0, 6.0]])
    assert ScaledSign(0)(values).tolist() == [[3.0, -3.0, 0.0, 3.0]]
    assert ScaledSign(1)(values).tolist() == [[3.0, -3.0, 3.0, 3.0]]


@pytest.mark.parametrize("name", compressors.NAMES)
def test_zero_stays_zero_and_the_argument_is_left_alone(name):
    compressor = compressors.make(name)
    zero, values = torch.zeros(3, 7, dtype=F64), rows(7, 3)
    assert torch.equal(compressor(zero, generators(3)), zero)
    before = values.clone()
    out = compressor(values, generators(3))
    assert torch.equal(values, before)
    assert out.data_ptr() != values.data_ptr()
    assert out.dtype == values.dtype
    compressor.compress_(values, generators(3))
    assert torch.equal(values, out)


PACKED = [
    Identity(), TopK(0.7), RandomK(0.7), RandomK(0.5, unbiased=True), Qsgd(1), Qsgd(7), Qsgd(16),
    Qsgd(4, unbiased=True), ScaledSign(0), ScaledSign(1), BFloat16(), Int8(),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("compressor", PACKED, ids=repr)
def test_a_packed_message_has_its_bytes_and_unpacks_to_the_same_bits(compressor, dtype):
    sender, receiver = (compressors.generator(5) for _ in range(2))
    whole = compressors.generator(5)
    for d in (1, 7, 64, 1001):  # one stream of numbers goes through all vectors
        for values in (rows(d, 1).to(dtype), torch.zeros(1, d, dtype=dtype), rows(d, 1).to(dtype).round()):
            expected = compressor(values, [whole] if compressor.is_random else [])
            packed = compressor.pack(values[0], sender)
            assert packed.dtype == torch.uint8
            assert len(packed) == compressor.packed_bytes(d, dtype.itemsize)
            out = torch.full((d,), 7.0, dtype=dtype)
            odd = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]  # bytes may begin anywhere
            compressor.unpack(odd, out, receiver)
            assert torch.equal(out, expected[0])


@pytest.mark.parametrize("compressor", PACKED, ids=repr)
def test_a_packed_message_does_not_hide_nan(compressor):
    values = torch.ones(16)
    values[3] = float("nan")
    out = torch.empty(16)
    seed = 0
    while isinstance(compressor, RandomK) and 3 not in torch.randperm(16, generator=compressors.generator(seed))[:4]:
        seed += 1
    compressor.unpack(compressor.pack(values, compressors.generator(seed)), out, compressors.generator(seed))
    assert out.isnan().any()


def test_a_packed_message_has_the_bytes_that_are_counted_but_for_signs_of_zero():
    for compressor in PACKED:
        more = -(-2 * 100 // 8) - -(-100 // 8) if compressor == ScaledSign(0) else 0
        assert compressor.packed_bytes(100) == compressor.message_bytes(100) + more


def test_places_of_another_seed_are_refused():
    with pytest.raises(ValueError, match="places drawn from another seed"):
        RandomK(0.5).unpack(
            RandomK(0.5).pack(torch.ones(4), compressors.generator(1)), torch.empty(4), compressors.generator(2)
        )


@pytest.mark.parametrize("name", compressors.NAMES)
def test_bits_do_not_depend_on_threads_and_rows(name):
    values = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(compressors.make(name)(values, generators(2)))
            found.append(
                torch.cat([compressors.make(name)(values[i : i + 1], [one]) for i, one in enumerate(generators(2))])
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", ["qsgd", "random_k"])
def test_a_rows_message_does_not_depend_on_the_other_rows(name):
    values, compressor = rows(40), compressors.make(name)
    sources = generators(4)
    alone = compressor(values[2:3], [compressors.generator(0, 2)])
    assert torch.equal(compressor(values, sources)[2:3], alone)
    assert not torch.equal(compressor(values, generators(4, key=1))[2:3], alone)


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [(Identity(), 400), (TopK(0.9), 72), (RandomK(0.9), 44), (Qsgd(7), 104), (Qsgd(3), 54), (ScaledSign(), 17)],
    ids=lambda value: repr(value),
)
def test_message_bytes_of_a_hundred_numbers(compressor, expected):
    assert compressor.message_bytes(100) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK(1.0), r"ratio must be in \[0, 1\), got 1.0"),
        (lambda: RandomK(-0.1), r"ratio must be in \[0, 1\), got -0.1"),
        (lambda: Qsgd(0), "bits must be an integer from 1 to 16, got 0"),
        (lambda: ScaledSign(2), "sign_of_zero must be 0 or 1, got 2"),
        (lambda: compressors.make("topk"), "compressor 'topk' is not known, did you mean 'top_k'?"),
        (lambda: compressors.make("zip"), "compressor 'zip' is not known, there are bfloat16, int8"),
        (lambda: Qsgd(3)(rows(5), generators(1)), "generators must be one for each of the 4 rows, got 1"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("order", ["atc", "cta"])
@pytest.mark.parametrize("name", compressors.NAMES)
def test_choco_agrees_on_the_mean_with_every_compressor(name, order):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centre = x.mean(0)
    opt = StackedOptimizer(
        x.clone(), topology.ring(8), "choco_sgd", lr=0.0, compressor=name, gamma=0.1, ratio=0.6, order=order
    )
    for _ in range(600):
        opt.step(torch.zeros_like(x))
    torch.testing.assert_close(opt.x.mean(0), centre, rtol=1e-9, atol=1e-9)
    assert opt.consensus_distance() < 0.1 * float((x - centre).square().sum(1).mean().sqrt())


def test_choco_compresses_segments_each_for_itself():
    algorithm = algorithms.get("choco_sgd", lr=0.1, compressor="sign")
    x = torch.tensor([[0.0, -3.0, 0.0, 1.0, 4.0]])
    algorithm.compress_(x, 0, [(0, 2), (3, 2)])
    assert x.tolist() == [[1.5, -1.5, 0.0, 2.5, 2.5]]  # sign(0) = +1; nothing between parameters
    layout = FlatLayout([(3,), (2, 5)])
    opt = StackedOptimizer(
        layout.allocate(4, dtype=torch.float32, device="cpu"), topology.ring(4), algorithm, layout=layout
    )
    g = layout.allocate(4, dtype=torch.float32, device="cpu")
    for view in layout.views(g):
        view.fill_(1.0)
    opt.step(g)
    assert opt.bytes_sent == 8 * ((1 + 4) + (2 + 4))
    assert (opt.x[:, 3:64] == 0).all()
    assert (opt.x[:, 74:] == 0).all()
    with pytest.raises(ValueError, match="layout has 128 elements, but x has rows of 5"):
        StackedOptimizer(torch.zeros(4, 5), topology.ring(4), "dsgd", lr=0.1, layout=layout)
