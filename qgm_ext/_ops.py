"""The ops as torch sees them: schemas, argument checks and dispatch to the native kernels; qgm_ext/ops.py has them as
users call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from qgm_ext._native import DTYPES, Rule, compute_dtype, get_rule, native

__all__ = ["REDUCE_BLOCK", "Prepared", "block_sums_shape", "prepare_local_step", "prepare_merge"]

# The codes of csrc/mixing.h.
_FORMS = {"identity": 0, "mean": 1, "sparse": 2, "dense": 2}
#: Coordinates that a reduction sums together first: kReduceBlock of csrc/arguments.h.
REDUCE_BLOCK = 4096
_REDUCE_LANES = 256  # kReduceLanes


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_like(
    op: str, name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        wanted = f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {_describe(tensor)}")
    if tensor.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(f"{op}: {name} must be contiguous along its last dimension, got strides {tensor.stride()}")


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def _check_rows_of_state(op: str, state: Sequence[Tensor], x: Tensor) -> None:
    """State vectors of stacked workers, [n, D] with one row stride."""
    for k, vector in enumerate(state):
        _check_like(op, f"state[{k}]", vector, x.shape, compute_dtype(x.dtype), x.device)
        if vector.stride(0) != state[0].stride(0):
            raise ValueError(
                f"{op}: all state vectors must have one row stride, "
                f"got {state[0].stride(0)} and, for state[{k}], {vector.stride(0)}"
            )


def _check_x(op: str, x: Tensor, dimensions: int) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != dimensions or x.numel() == 0:
        wanted = "[n, D] with n >= 1 and D >= 1" if dimensions == 2 else "[D] with D >= 1"
        raise ValueError(f"{op}: x must have shape {wanted}, got {list(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{op}: x must be contiguous along its last dimension, got strides {x.stride()}")
    if dimensions == 2 and x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{op}: the rows of x must not overlap, got shape {list(x.shape)} with strides {x.stride()}")


def _check_disjoint(op: str, written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse buffers that share memory: a kernel would read what it has already overwritten."""
    spans = []
    for kind, tensors in ((True, written), (False, read)):
        for name, tensor in tensors:
            begin = tensor.data_ptr()
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((begin, begin + extent * tensor.element_size(), kind, name))
    spans.sort()
    end, writes, previous = spans[0][1:]
    for begin, stop, kind, name in spans[1:]:
        if begin < end and (kind or writes):
            raise ValueError(f"{op}: {previous} and {name} overlap in memory; each must have its own")
        if stop > end:
            end, previous, writes = stop, name, kind


def _check_counts(op: str, rule: Rule, state: Sequence[Tensor], hyper: Sequence[float]) -> None:
    _check_states(op, rule, state)
    _check_hyper(op, rule, hyper)


def _check_states(op: str, rule: Rule, state: Sequence[Tensor]) -> None:
    if len(state) != rule.states:
        raise ValueError(f"{op}: rule {rule.name!r} takes {rule.states} state vectors, got {len(state)}")


def _check_hyper(op: str, rule: Rule, hyper: Sequence[float]) -> None:
    if len(hyper) != rule.hyper:
        raise ValueError(f"{op}: rule {rule.name!r} takes {rule.hyper} hyper-parameters, got {len(hyper)}")


def _row_scalars(op: str, rule: Rule, row_scalars: Tensor | None, x: Tensor) -> int:
    """The address of a rule's numbers for each worker, or 0 for a rule that has none."""
    if row_scalars is None:
        if rule.row_scalars:
            raise ValueError(f"{op}: rule {rule.name!r} takes {rule.row_scalars} row_scalars a worker, got none")
        return 0
    if not rule.row_scalars:
        raise ValueError(f"{op}: rule {rule.name!r} takes no row_scalars, got {_describe(row_scalars)}")
    shape = torch.Size((*x.shape[:-1], rule.row_scalars))
    _check_like(op, "row_scalars", row_scalars, shape, compute_dtype(x.dtype), x.device)
    _check_contiguous(op, "row_scalars", row_scalars)
    return row_scalars.data_ptr()


def _block_sums(op: str, rule: Rule, block_sums: Tensor | None, x: Tensor) -> int:
    """The address where a rule's pass leaves its block sums, or 0 for a rule that has no norm."""
    if block_sums is None:
        if rule.norm_state >= 0:
            raise ValueError(f"{op}: rule {rule.name!r} sums squares of its state and needs block_sums, got none")
        return 0
    if rule.norm_state < 0:
        raise ValueError(f"{op}: rule {rule.name!r} takes no block_sums, got {_describe(block_sums)}")
    _check_like(op, "block_sums", block_sums, block_sums_shape(x), torch.float64, x.device)
    _check_contiguous(op, "block_sums", block_sums)
    return block_sums.data_ptr()


def block_sums_shape(x: Tensor) -> torch.Size:
    """Of the block sums of x: one number for each row and :data:`REDUCE_BLOCK` coordinates."""
    return torch.Size((*x.shape[:-1], -(-x.shape[-1] // REDUCE_BLOCK)))


def _launch(device: torch.device) -> tuple[int, ...]:
    """What a native call needs besides its data: the thread count, or the device and its current stream."""
    if device.type == "cpu":
        return (torch.get_num_threads(),)
    return (device.index, torch.cuda.current_stream(device).cuda_stream)


def _gossip_step(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    row_offsets: Tensor,
    columns: Tensor,
    weights: Tensor,
    form: str,
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
    block_sums: Tensor | None = None,
) -> None:
    op, device = "gossip_step_", x.device
    _check_x(op, x, 2)
    known = get_rule(op, device.type, rule)
    _check_counts(op, known, state, hyper)
    shape, compute = x.shape, compute_dtype(x.dtype)
    _check_like(op, "g", g, shape, x.dtype, device)
    _check_rows_of_state(op, state, x)
    if form not in _FORMS:
        raise ValueError(f"{op}: form must be one of {', '.join(_FORMS)}, got {form!r}")
    _check_like(op, "row_offsets", row_offsets, torch.Size((shape[0] + 1,)), torch.int32, device)
    _check_like(op, "columns", columns, columns.shape, torch.int32, device)
    _check_like(op, "weights", weights, columns.shape, compute, device)
    _check_disjoint(op, [("x", x), *((f"state[{k}]", vector) for k, vector in enumerate(state))], [("g", g)])
    sums, lanes = _block_sums(op, known, block_sums, x), None
    if sums and device.type == "cuda":  # freed on return, as in _reduce
        lanes = torch.empty((*block_sums_shape(x), _REDUCE_LANES), dtype=compute, device=device)
    native(device.type).gossip_step(
        known.code,
        DTYPES[x.dtype],
        x.data_ptr(),
        g.data_ptr(),
        [vector.data_ptr() for vector in state],
        shape[0],
        shape[1],
        x.stride(0),
        g.stride(0),
        state[0].stride(0) if state else 0,
        _FORMS[form],
        row_offsets.data_ptr(),
        columns.data_ptr(),
        weights.data_ptr(),
        columns.numel(),
        hyper,
        _row_scalars(op, known, row_scalars, x),
        sums,
        0 if lanes is None else lanes.data_ptr(),
        *_launch(device),
    )


def _relay_step(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    messages: Tensor,
    offsets: Tensor,
    senders: Tensor,
    reverse: Tensor,
    counts: Tensor,
    rule: str,
    hyper: list[float],
) -> None:
    op, device = "relay_step_", x.device
    _check_x(op, x, 2)
    known = get_rule(op, device.type, rule)
    _check_counts(op, known, state, hyper)
    compute, (n, dim), trees = compute_dtype(x.dtype), x.shape, offsets.shape[0]
    _check_like(op, "g", g, x.shape, x.dtype, device)
    _check_rows_of_state(op, state, x)
    edges = 2 * (n - 1)
    _check_like(op, "messages", messages, torch.Size((edges, dim)), compute, device)
    _check_like(op, "offsets", offsets, torch.Size((trees, n + 1)), torch.int32, device)
    _check_like(op, "senders", senders, torch.Size((trees, edges)), torch.int32, device)
    _check_like(op, "reverse", reverse, torch.Size((trees, edges)), torch.int32, device)
    _check_like(op, "counts", counts, torch.Size((trees, n)), compute, device)
    for name, tensor in (("offsets", offsets), ("senders", senders), ("reverse", reverse), ("counts", counts)):
        _check_contiguous(op, name, tensor)
    kept = [("messages", messages)] if edges else []
    _check_disjoint(op, [("x", x), *kept, *((f"state[{k}]", v) for k, v in enumerate(state))], [("g", g)])
    native(device.type).relay_step(
        rule,
        DTYPES[x.dtype],
        x.data_ptr(),
        g.data_ptr(),
        [vector.data_ptr() for vector in state],
        n,
        dim,
        x.stride(0),
        g.stride(0),
        state[0].stride(0) if state else 0,
        trees,
        offsets.data_ptr(),
        senders.data_ptr(),
        reverse.data_ptr(),
        messages.data_ptr(),
        messages.stride(0),
        counts.data_ptr(),
        hyper,
        *_launch(device),
    )


class Prepared:
    """A half of a step on tensors that have been checked: x, g, the state and the messages.

    Where they are in memory is asked anew each time, for ``share_memory()`` moves a tensor.
    """

    def __init__(
        self,
        op: str,
        rule: Rule,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        messages: Sequence[Tensor],
        *numbers: Any,
    ) -> None:
        self._op, self._rule, self._x, self._g, self._state, self._messages = op, rule, x, g, state, messages
        self._kernel = getattr(native(x.device.type), op.removesuffix("_"))
        self._kind, self._numbers = (rule.code, DTYPES[x.dtype]), numbers
        self._merges = op == "merge_"

    def __call__(self, hyper: list[float], row_scalars: Tensor | None = None, block_sums: Tensor | None = None) -> None:
        """Take it with the rule's numbers, as in :func:`qgm_ext.ops.local_step_` and :func:`qgm_ext.ops.merge_`.

        Raises:
            ValueError: if these don't fit.
        """
        if profiler._is_profiler_enabled:  # which knows by itself only of what torch dispatches
            with profiler.record_function(f"qgm_ext::{self._op}"):
                self.run(hyper, row_scalars, block_sums)
        else:
            self.run(hyper, row_scalars, block_sums)

    def run(self, hyper: list[float], row_scalars: Tensor | None, block_sums: Tensor | None) -> None:
        """The same without a label for the profiler."""
        op, rule, x = self._op, self._rule, self._x
        _check_hyper(op, rule, hyper)
        extra = [_row_scalars(op, rule, row_scalars, x)]
        if self._merges:
            extra.append(_block_sums(op, rule, block_sums, x))
        self._kernel(
            *self._kind,
            x.data_ptr(),
            self._g.data_ptr(),
            [vector.data_ptr() for vector in self._state],
            [message.data_ptr() for message in self._messages],
            *self._numbers,
            x.numel(),
            hyper,
            *extra,
            *_launch(x.device),
        )


def prepare_local_step(x: Tensor, g: Tensor, state: list[Tensor], messages: list[Tensor], rule: str) -> Prepared:
    """:func:`qgm_ext.ops.local_step_` of these tensors, to be taken again and again.

    Torch's dispatcher and the checks take several times as long as the kernel does with a few thousand numbers.

    Args, Raises: as there.
    """
    op, device = "local_step_", x.device
    _check_x(op, x, 1)
    known = get_rule(op, device.type, rule)
    _check_states(op, known, state)
    if len(messages) != known.messages:
        raise ValueError(f"{op}: rule {rule!r} makes {known.messages} messages, got {len(messages)} to write")
    compute = compute_dtype(x.dtype)
    _check_like(op, "g", g, x.shape, x.dtype, device)
    written = [
        *((f"state[{k}]", vector) for k, vector in enumerate(state)),
        *((f"messages[{k}]", message) for k, message in enumerate(messages)),
    ]
    for name, vector in written:
        _check_like(op, name, vector, x.shape, compute, device)
    _check_disjoint(op, written, [("x", x), ("g", g)])
    return Prepared(op, known, x, g, state, messages)


def _local_step(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    messages: list[Tensor],
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
) -> None:
    prepare_local_step(x, g, state, messages, rule).run(hyper, row_scalars, None)


def prepare_merge(
    x: Tensor, g: Tensor, state: list[Tensor], received: list[Tensor], weights: list[float], mean: bool, rule: str
) -> Prepared:
    """:func:`qgm_ext.ops.merge_` of these tensors and weights, as :func:`prepare_local_step`."""
    op, device = "merge_", x.device
    _check_x(op, x, 1)
    known = get_rule(op, device.type, rule)
    _check_states(op, known, state)
    if not weights or len(received) != known.messages * len(weights):
        raise ValueError(
            f"{op}: rule {rule!r} has {known.messages} messages a worker, so received must hold {known.messages} "
            f"times as many tensors as there are weights (at least 1), got {len(received)} and {len(weights)}"
        )
    compute = compute_dtype(x.dtype)
    _check_like(op, "g", g, x.shape, x.dtype, device)
    states = [(f"state[{k}]", vector) for k, vector in enumerate(state)]
    inputs = [(f"received[{k}]", message) for k, message in enumerate(received)]
    for name, vector in (*states, *inputs):
        _check_like(op, name, vector, x.shape, compute, device)
    _check_disjoint(op, [("x", x), *states], [("g", g), *inputs])
    return Prepared(op, known, x, g, state, received, weights, mean)


def _merge(
    x: Tensor,
    g: Tensor,
    state: list[Tensor],
    received: list[Tensor],
    weights: list[float],
    mean: bool,
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
    block_sums: Tensor | None = None,
) -> None:
    prepare_merge(x, g, state, received, weights, mean, rule).run(hyper, row_scalars, block_sums)


def _reduce(op: str, x: Tensor, out: Tensor) -> Tensor:
    _check_x(op, x, 2)
    module = native(x.device.type)
    scratch: tuple[int, ...] = ()
    if x.device.type == "cuda":
        # One sum per row and block of coordinates. Freed on return: the caching allocator reuses it in stream order.
        sums = torch.empty(block_sums_shape(x), dtype=torch.float64, device=x.device)
        scratch = (sums.data_ptr(),)
    kernel, where = getattr(module, op), _launch(x.device)
    kernel(DTYPES[x.dtype], x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), out.data_ptr(), *scratch, *where)
    return out


def _squared_norms(x: Tensor) -> Tensor:
    return _reduce("squared_norms", x, torch.empty(x.shape[:1], dtype=torch.float64, device=x.device))


def _sum_blocks(block_sums: Tensor) -> Tensor:
    if block_sums.dim() != 2 or block_sums.dtype != torch.float64 or not block_sums.is_contiguous():
        raise ValueError(f"sum_blocks: block_sums must be [n, blocks] float64, contiguous, got {_describe(block_sums)}")
    out = torch.empty(block_sums.shape[:1], dtype=torch.float64, device=block_sums.device)
    native(block_sums.device.type).sum_blocks(
        block_sums.data_ptr(), *block_sums.shape, out.data_ptr(), *_launch(block_sums.device)
    )
    return out


def _consensus_distance(x: Tensor) -> Tensor:
    return _reduce("consensus_distance", x, torch.empty((), dtype=torch.float64, device=x.device))


def _rows_are_finite(x: Tensor) -> Tensor:
    return _reduce("rows_are_finite", x, torch.empty(x.shape[:1], dtype=torch.bool, device=x.device))


_library = torch.library.Library("qgm_ext", "DEF")  # type: ignore[no-untyped-call]
_SCHEMAS: dict[str, tuple[str, Any]] = {
    "gossip_step_": (
        "(Tensor(a!) x, Tensor g, Tensor(b!)[] state, Tensor row_offsets, Tensor columns, Tensor weights, "
        "str form, str rule, float[] hyper, Tensor? row_scalars=None, Tensor(c!)? block_sums=None) -> ()",
        _gossip_step,
    ),
    "relay_step_": (
        "(Tensor(a!) x, Tensor g, Tensor(b!)[] state, Tensor(c!) messages, Tensor offsets, Tensor senders, "
        "Tensor reverse, Tensor counts, str rule, float[] hyper) -> ()",
        _relay_step,
    ),
    "local_step_": (
        "(Tensor x, Tensor g, Tensor(a!)[] state, Tensor(b!)[] messages, str rule, float[] hyper, "
        "Tensor? row_scalars=None) -> ()",
        _local_step,
    ),
    "merge_": (
        "(Tensor(a!) x, Tensor g, Tensor(b!)[] state, Tensor[] received, float[] weights, bool mean, str rule, "
        "float[] hyper, Tensor? row_scalars=None, Tensor(c!)? block_sums=None) -> ()",
        _merge,
    ),
    "squared_norms": ("(Tensor x) -> Tensor", _squared_norms),
    "sum_blocks": ("(Tensor block_sums) -> Tensor", _sum_blocks),
    "consensus_distance": ("(Tensor x) -> Tensor", _consensus_distance),
    "rows_are_finite": ("(Tensor x) -> Tensor", _rows_are_finite),
}
for _name, (_schema, _kernel) in _SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)  # type: ignore[no-untyped-call]

for _name in ("gossip_step_", "relay_step_", "local_step_", "merge_"):
    torch.library.register_fake(f"qgm_ext::{_name}", lambda *args: None, lib=_library)
torch.library.register_fake(
    "qgm_ext::squared_norms", lambda x: x.new_empty(x.shape[:1], dtype=torch.float64), lib=_library
)
torch.library.register_fake(
    "qgm_ext::sum_blocks", lambda block_sums: block_sums.new_empty(block_sums.shape[:1]), lib=_library
)
torch.library.register_fake("qgm_ext::consensus_distance", lambda x: x.new_empty((), dtype=torch.float64), lib=_library)
torch.library.register_fake(
    "qgm_ext::rows_are_finite", lambda x: x.new_empty(x.shape[:1], dtype=torch.bool), lib=_library
)
