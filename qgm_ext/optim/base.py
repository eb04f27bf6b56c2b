"""DecentralizedOptimizer: what the optimizers of this package share.

It is a torch.optim.Optimizer: groups, hooks, schedulers, closures, ``state_dict`` and pickling as there. It keeps
parameters in flat buffers (:mod:`qgm_ext.optim.flat_parameters`) and hands the updates of a step to a runtime
(:mod:`qgm_ext.optim.runtime`). The arithmetic is in csrc/rules; which algorithm a group runs is said by subclasses.
"""

from __future__ import annotations

import abc
import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, ClassVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from qgm_ext import ops
from qgm_ext.algorithms import Algorithm, check_number
from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.options import RuntimeArguments, options_from
from qgm_ext.optim.entries import as_number, load_entry, with_numbers
from qgm_ext.optim.flat_parameters import FlatParameters, check_memory, check_parameter, dense_strides
from qgm_ext.optim.overlap import overlap_for
from qgm_ext.optim.peers import Peers
from qgm_ext.optim.runtime import Update, runtime_for
from qgm_ext.optim.together import step_together
from qgm_ext.stacked import NonFiniteGradientError, OnNonfinite
from qgm_ext.topology import Topology

__all__ = ["DecentralizedOptimizer"]

_Format = tuple[torch.Size, tuple[int, ...]] | None  # shape and strides; None: not known yet
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Binding:
    """The flat buffers of one parameter group, and its parameters that are in none (frozen so far)."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = list(params)
        self.flat: list[FlatParameters] = []
        self.rest = list(params)


class DecentralizedOptimizer(torch.optim.Optimizer, abc.ABC):
    """A torch.optim.Optimizer that runs an algorithm of :mod:`qgm_ext.algorithms`; one process is one worker.

    A subclass says by :meth:`make_algorithm` which algorithm a parameter group runs, names its ``family`` and calls
    this constructor with the defaults of a group; that is all.

    Args:
        params: parameters, named parameters or groups, as for any torch.optim.Optimizer.
        defaults: hyper-parameters of groups that don't set them; ``lr`` must be there.
        maximize: step along the gradient instead of against it (weight decay pulls to zero all the same).
        topology: who averages with whom, of as many workers as there are processes; None for one worker.
        group: process group of the workers; None for the default one.
        on_nonfinite: what a gradient with an infinity or NaN does: "ignore" steps all the same, as torch does; "skip"
            leaves parameters and state as they are and counts the step in ``skipped_steps``; "raise" leaves them as
            they are and raises NonFiniteGradientError. The last two read the gradient once more, and wait for the
            device; with several workers all of them skip or raise if one must.
        **runtime: options of several workers, :class:`qgm_ext.distributed.RuntimeOptions`: timeout, bucket_mb, ...

    With several workers (a topology of n, and a process group of n) building the optimizer is a collective: the workers
    compare what they were given, and start from the parameters of worker 0. So is every step. All trainable parameters
    take part in every step, those without a gradient as if it were zero; state is what it is in
    :class:`qgm_ext.StackedOptimizer`, to the bit.

    torch.amp.GradScaler, one for each worker, works as with any torch optimizer; ``.grad`` stays scaled. But a worker
    among others must not leave out a step on its own. If its gradients overflow, then with on_nonfinite="ignore" it
    takes part with a gradient of zero, at no cost; with "skip" all workers leave out the step. Its scale goes down,
    those of the others stay.

    What differs from torch.optim.SGD, where a program could notice:

    - At the first step (and when more parameters become trainable) parameters move into a buffer: ``parameter.data``
      is a view from then on. Code that throws the view away is noticed and costs one copy. Tensors that shared a
      parameter's memory, other than the parameter itself, no longer do; parameters that share memory with each other
      are refused. With several workers they keep the memory format that they had when the optimizer was built, on all
      workers the same; a later one is taken back at the next step. Saving a part of a model with torch.save stores the
      whole buffer: save clones of the tensors.
    - State is float32 for bfloat16 and float16 parameters (float64 for float64), also after load_state_dict.
    - Parameters without a gradient are not changed, as in torch; runs of parameters with one take one call each.
    - Parameters must be plain float64, float32, bfloat16 or float16 tensors with dense gradients.
    """

    family: ClassVar[str]
    by_passes: ClassVar[bool] = False
    _gossips = True  # not inside no_gossip()

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        topology: Topology | None = None,
        group: dist.ProcessGroup | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        **runtime: Unpack[RuntimeArguments],
    ) -> None:
        if on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f"on_nonfinite must be one of {', '.join(get_args(OnNonfinite))}, got {on_nonfinite!r}")
        self.topology = topology
        self.on_nonfinite = on_nonfinite
        self.skipped_steps = 0
        self._process_group = group
        self._options = options_from(dict(runtime))
        self._options.check_nonfinite(on_nonfinite)
        self._runtime = runtime_for(topology, group, self._options, self.by_passes)
        self._overlap = overlap_for(self, self._runtime)
        self._started = False
        self._formats: list[list[_Format]] = []  # of each group's parameters, as the workers have agreed
        self._bindings: list[_Binding] = []
        self._algorithms: list[tuple[list[Any], Algorithm]] = []
        # In every group, so that a state_dict says what it is of.
        super().__init__(params, {**defaults, "maximize": maximize, "algorithm": self.family})
        self._start(self.param_groups)
        self._started = True

    @property
    def num_workers(self) -> int:
        """n, how many workers average."""
        return self._runtime.num_workers

    @property
    def worker(self) -> int:
        """The number of this worker, from 0."""
        return self._runtime.worker if isinstance(self._runtime, Peers) else 0

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler: whether it shall call step() even if gradients overflow, and leave scaling
        to it; it sets ``grad_scale`` and ``found_inf`` before.
        """
        return self.num_workers > 1

    @property
    def communication(self) -> Communication:
        """Bytes that this worker has exchanged with others, and seconds it waited for them, in all steps so far."""
        return self._runtime.communication

    @property
    def last_communication(self) -> Communication:
        """The same of the last step that was taken."""
        return self._runtime.last_communication

    @property
    def lost_workers(self) -> dict[int, int]:
        """The workers that are lost (on_peer_loss="heal"), by rank: how many steps this optimizer took with them."""
        return self._runtime.lost_workers if isinstance(self._runtime, Peers) else {}

    @property
    def message_ages(self) -> dict[int, tuple[int, ...]]:
        """By neighbour how often its message was 0, 1, ..., k steps old when it was merged (staleness=k > 0)."""
        return self._runtime.message_ages if isinstance(self._runtime, Peers) else {}

    def drain(self) -> None:
        """Wait until no message is under way to or from this worker (staleness > 0); else nothing is to do.

        All workers call it after the same step: before the process group is destroyed, and wherever they shall start
        again with fresh messages. load_state_dict does.

        Raises:
            PeerLostError, MessageError: as in a step.
        """
        if isinstance(self._runtime, Peers):
            self._runtime.drain()

    @abc.abstractmethod
    def make_algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        """The algorithm of a parameter group; numbers in ``group`` are Python floats and ints.

        Raises:
            ValueError, TypeError: if a hyper-parameter does not fit.
        """

    @property
    def overlap_obstacle(self) -> str | None:
        """Why nothing is sent during backward; None if it is, or will be from the second step on."""
        if not self._options.overlap:
            return "overlap is False"
        return "a worker alone sends nothing" if self._overlap is None else self._overlap.obstacle

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch.optim.Optimizer does; also between steps.

        Raises:
            TypeError, ValueError: if parameters or hyper-parameters don't fit; the optimizer is as before then.
        """
        self._refuse_halfway("add_param_group()")
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if params is not None and not isinstance(params, (Tensor, set)):
            params = param_group["params"] = list(params)
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            if len({id(p) for p in tensors}) < len(tensors):
                raise ValueError("a parameter group must not hold a parameter twice; it would be stepped twice")
        super().add_param_group(param_group)
        try:
            self._check_group(param_group)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._started:
            self._start(self.param_groups[-1:])

    def _start(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Let all workers start these groups alike; a collective."""
        if not isinstance(self._runtime, Peers):
            return
        fields: dict[str, Any] = {"optimizer": type(self).__name__, "on_nonfinite": self.on_nonfinite}
        made = [self.make_algorithm(with_numbers(group)) for group in groups]
        params = [p for group in groups for p in group["params"] if not is_lazy(p)]
        for p in params:
            check_parameter(p)
        formats = [[None if is_lazy(p) else (p.shape, dense_strides(p)) for p in group["params"]] for group in groups]
        fields["number of parameter groups"] = len(groups)
        for index, (group, algorithm, kept) in enumerate(zip(groups, made, formats, strict=True)):
            of = f"of group {index}" if len(groups) > 1 else "of the optimizer"
            fields |= {f"{name} {of}": value for name, value in algorithm.describe().items()}
            fields |= {f"maximize {of}": group["maximize"], f"number of parameters {of}": len(group["params"])}
            names = group.get("param_names", range(len(group["params"])))
            for name, p, form in zip(names, group["params"], kept, strict=True):
                shape, strides = (None, None) if form is None else map(list, form)
                fields[f"parameter {name} {of}"] = [shape, str(p.dtype), p.requires_grad, strides]
        self._runtime.start(fields, made, params)
        self._formats += formats
        if self._overlap is not None:
            self._overlap.look_ahead(made)

    def _check_group(self, group: Mapping[str, Any]) -> Algorithm:
        """The algorithm of a group; raises TypeError or ValueError if its parameters or values don't fit."""
        for p in group["params"]:
            ops.compute_dtype(p.dtype)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got a tensor of shape {list(lr.shape)}")
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"maximize must be True or False, got {group['maximize']!r}")
        if group["algorithm"] != self.family:
            raise ValueError(
                f"algorithm of a parameter group must be {self.family!r}, which {type(self).__name__} sets itself, "
                f"got {group['algorithm']!r}"
            )
        return self.make_algorithm(with_numbers(group))

    def _algorithm(self, index: int, group: Mapping[str, Any]) -> tuple[Algorithm, float]:
        """The algorithm of a group and its step size now; both may have been changed since the last step."""
        lr = as_number(group["lr"])
        check_number("lr", lr, low=0.0)
        values = [as_number(group[name]) for name in self.defaults if name != "lr"]
        if index < len(self._algorithms) and self._algorithms[index][0] == values:
            return self._algorithms[index][1], lr
        algorithm = self._check_group(group)
        self._algorithms[index : index + 1] = [(values, algorithm)]
        return algorithm, lr

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if not is_lazy(p)]

    def _bind(self, index: int, params: list[Tensor]) -> list[FlatParameters]:
        """The flat buffers of a group, made or made again where its parameters are not in them."""
        binding = self._bindings[index] if index < len(self._bindings) else None
        if (
            binding is None
            or len(params) != len(binding.params)
            or not all(map(is_, params, binding.params))
            or not all(flat.holds_parameters(self._all_params) for flat in binding.flat)
        ):
            binding = _Binding(params)
        # By requires_grad, not by who has a gradient: the layout must not depend on the data.
        fresh = [p for p in binding.rest if (p.requires_grad or p.grad is not None) and not is_lazy(p)]
        if fresh:
            for p in fresh:
                check_parameter(p)
            check_memory(self._all_params())
            places: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
            for p in fresh:
                places[p.dtype, p.device].append(p)
            whole, strides = isinstance(self._runtime, Peers), self._agreed_strides(index, params)
            binding.flat += [
                FlatParameters(some, [strides[id(p)] for p in some], whole=whole) for some in places.values()
            ]
            taken = {id(p) for p in fresh}
            binding.rest = [p for p in binding.rest if id(p) not in taken]
        self._bindings[index : index + 1] = [binding]
        return binding.flat

    def _agreed_strides(self, index: int, params: Sequence[Tensor]) -> dict[int, tuple[int, ...]]:
        """By id the strides that a group's parameters have in the buffers: as agreed at the start, if they were."""
        kept = self._formats[index] if index < len(self._formats) else []
        found = {id(p): dense_strides(p) for p in params if not is_lazy(p)}
        for p, form in zip(params, kept, strict=False):
            if form is not None and not is_lazy(p) and form[0] == p.shape:
                found[id(p)] = form[1]
        return found

    @contextlib.contextmanager
    def no_gossip(self) -> Iterator[None]:
        """A context in which :meth:`step` takes the local step alone, W = I: nothing is sent, nobody waited for.

        All workers must take the same steps in it; who does not is told by the next message (MessageError or
        PeerLostError). Time-varying topologies stand still. It is not needed to accumulate gradients: several backward
        passes before one step() are one step with one average, as with any torch optimizer.

        Raises:
            ValueError: if the algorithm needs the other workers in every step (exact means, relayed sums, choco_sgd).

        Example:
            >>> import torch
            >>> from qgm_ext.optim import QGSGD
            >>> opt = QGSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> with opt.no_gossip():
            ...     opt.step()
        """
        for group in self.param_groups:
            algorithm = self.make_algorithm(with_numbers(group))
            if not algorithm.can_skip_gossip:
                raise ValueError(
                    f"{algorithm.name} needs the other workers in every step, so it can't leave out gossip"
                )
        before, self._gossips = self._gossips, False
        try:
            yield
        finally:
            self._gossips = before

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context for backward passes whose gradients are only accumulated: with overlap=True they send nothing.

        As in DistributedDataParallel, all but the last backward pass before a step belong in it. Without overlap it
        does nothing.

        Example:
            >>> import torch
            >>> from qgm_ext.optim import QGSGD
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> opt = QGSGD([p], lr=0.1)
            >>> with opt.no_sync():
            ...     p.sum().backward()
            >>> p.sum().backward()
            >>> opt.step()
        """
        with contextlib.nullcontext() if self._overlap is None else self._overlap.paused():
            yield

    def _refuse_halfway(self, what: str) -> None:
        if self._overlap is not None and self._overlap.has_begun:
            raise RuntimeError(
                f"{what} came between backward() and step(), but with overlap=True a part of the step has been taken "
                "then; call it after step()"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer; with overlap=True not between backward() and step()."""
        self._refuse_halfway("state_dict()")
        return super().state_dict()

    # A compiled function that calls it breaks its graph here: what it does hangs on addresses.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls backward and returns the loss.

        Returns:
            What closure returns, or None.

        Raises:
            TypeError, ValueError: if a gradient, a parameter or a hyper-parameter does not fit.
            NonFiniteGradientError: with on_nonfinite="raise". In every case parameters and state keep their values.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        del self._bindings[len(self.param_groups) :]
        if isinstance(self._runtime, Peers):
            step_together(self, self._runtime)
            return loss
        updates: list[Update] = []
        stepped: list[tuple[FlatParameters, list[int]]] = []
        for index, group in enumerate(self.param_groups):
            algorithm, lr = self._algorithm(index, group)
            for flat in self._bind(index, group["params"]):
                some, active = flat.prepare(self.state, algorithm, lr, group["maximize"])
                updates += some
                if active:
                    stepped.append((flat, active))
        if self.on_nonfinite != "ignore" and not self._gradients_are_finite(updates):
            self.skipped_steps += 1
            return loss
        self._runtime.step(updates)
        changed = [p for flat, active in stepped for p in flat.advance(active)]
        # The kernels write memory that autograd does not see change; backward through an old graph must fail.
        torch.autograd.graph.increment_version(changed)
        return loss

    def _gradients_are_finite(self, updates: list[Update]) -> bool:
        if all(bool(ops.rows_are_finite(update.grad).all()) for update in updates):
            return True
        if self.on_nonfinite == "raise":
            bad = [
                f"{i} of group {index} {list(p.shape)}"
                for index, group in enumerate(self.param_groups)
                for i, p in enumerate(group["params"])
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise NonFiniteGradientError(
                f"the gradient of parameter {shown} is not finite; parameters and state are as before the step "
                "(on_nonfinite='skip' leaves such steps out)"
            )
        return False

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of the same algorithm; its tensors are copied.

        Unlike torch.optim, float32 state stays float32 for bfloat16 and float16 parameters, so that a resumed run
        takes the steps of an uninterrupted one.

        Raises:
            TypeError, ValueError: if it is of another optimizer, does not fit the parameters or is incomplete; the
                optimizer is as before then.
        """
        self._refuse_halfway("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        missing = {"state", "param_groups"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(sorted(missing))}")
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"loaded state dict has a different number of parameter groups: it has {len(saved_groups)}, "
                f"the optimizer {len(self.param_groups)}"
            )
        owners: dict[Any, tuple[Tensor, tuple[str, ...]]] = {}
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            ids, params = saved.get("params", ()), group["params"]
            if len(ids) != len(params):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                    f"group {index} has {len(ids)} parameters there and {len(params)} here"
                )
            saved["params"] = params
            names = self._check_saved_group(index, saved)
            owners.update((key, (p, names)) for key, p in zip(ids, params, strict=True))
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, entry in state_dict["state"].items():
            if key in owners:
                p, names = owners[key]
                state[p] = load_entry(key, p, entry, names)
            else:
                state[key] = entry
        self.drain()
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _check_saved_group(self, index: int, saved: dict[str, Any]) -> tuple[str, ...]:
        """The state that parameters of a saved group must have; raises ValueError if it is not ours."""
        theirs = saved.get("algorithm")
        if theirs != self.family:
            whose = "another optimizer" if theirs is None else f"algorithm {theirs!r}"
            raise ValueError(
                f"state_dict is of {whose}: {type(self).__name__} needs one of its own, of algorithm {self.family!r}; "
                "to change the optimizer, load the parameters alone"
            )
        lacking = sorted(self.defaults.keys() - saved.keys())
        if lacking:
            raise ValueError(f"param_groups[{index}] of the state_dict lacks {', '.join(lacking)}")
        algorithm = self._check_group(saved)
        return self._runtime.state_names(algorithm) if isinstance(self._runtime, Peers) else algorithm.state_names

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_halfway("a copy")
        # Without the buffers: they are made again around the parameters of the copy. State is cloned, because a
        # pickle of a view holds the whole buffer, once for every view.
        state = {
            key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for key, entry in self.state.items()
        }
        return {
            "defaults": self.defaults,
            "state": defaultdict(dict, state),
            "param_groups": self.param_groups,
            "topology": self.topology,
            "on_nonfinite": self.on_nonfinite,
            "skipped_steps": self.skipped_steps,
            "_process_group": self._process_group,
            "_options": self._options,
            "_started": True,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # added there; it is not offered here
        self._algorithms = []
        if "_bindings" not in self.__dict__:
            self._bindings = []
            self._formats = []
            self._runtime = runtime_for(self.topology, self._process_group, self._options, self.by_passes)
            self._overlap = overlap_for(self, self._runtime)
