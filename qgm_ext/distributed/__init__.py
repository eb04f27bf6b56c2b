"""Decentralized training over a process group: one process is one worker, torch.distributed carries the messages.

Users build an optimizer of :mod:`qgm_ext.optim` with a topology of as many workers as there are processes::

    torch.distributed.init_process_group("gloo")
    opt = qgm_ext.optim.QGSGD(model.parameters(), lr=0.1, topology=qgm_ext.topology.ring(world_size))

and everything else is as with torch.optim: ``loss.backward(); opt.step()``. ``optim.Decentralized(params, "d2",
topology=..., lr=...)`` runs any algorithm by its name, but for those that take gradients at other models than the
worker's own: ``optim.CrossGradient(model, "ngc", topology=..., lr=...)``, ``opt.step(closure, batch)``. The parts:

- :mod:`~qgm_ext.distributed.options`: :class:`RuntimeOptions`, the keyword arguments of these optimizers;
- :mod:`~qgm_ext.distributed.agreement`: what all workers must agree on at the start;
- :mod:`~qgm_ext.distributed.exchange`: messages, their headers, time limits, and the errors that name a peer;
  :mod:`~qgm_ext.distributed.peer_loss`, which worker it is that was lost;
- :mod:`~qgm_ext.distributed.communication`: bytes and seconds of steps, ``opt.communication``;
- :mod:`~qgm_ext.distributed.engine`: the passes of an algorithm for one worker, on flat vectors, and
  :mod:`~qgm_ext.distributed.gossip`, those over a mixing matrix, bucket by bucket;
  :mod:`~qgm_ext.distributed.cross_worker`, the steps of algorithms that take gradients at neighbours' models;
- :mod:`~qgm_ext.distributed.healing`, :mod:`~qgm_ext.distributed.roll`: going on without lost workers, and how the
  others agree on who is lost; :mod:`~qgm_ext.distributed.survivors`, how they meet between steps;
- :mod:`~qgm_ext.distributed.stale`: merging old messages of slow neighbours instead of waiting, and
  :mod:`~qgm_ext.distributed.waiter`, threads that wait for messages;
- :mod:`~qgm_ext.distributed.timeline`: :func:`trace`, a picture of what all workers do in their steps;
- :mod:`~qgm_ext.distributed.checkpoint`: saving and resuming workers, and the average of their models;
  :mod:`~qgm_ext.distributed.takeover`: whose state a worker takes up when its own is lost;
- :mod:`qgm_ext.optim.peers`: parameter groups on top of it, and :mod:`qgm_ext.optim.overlap`, steps that begin during
  backward.

A worker's state is in ``opt.state_dict()`` as with any torch optimizer: vectors by parameter, what the algorithm keeps
besides under ``clock`` in the parameter group. It and the model are all that a worker needs to go on; each worker saves
its own. ``opt.worker`` and ``opt.num_workers`` say who it is.

Bits are those of the worker's row in :class:`qgm_ext.StackedOptimizer` and :class:`qgm_ext.Simulator`.
"""

from qgm_ext.distributed.agreement import DisagreementError
from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.exchange import MessageError
from qgm_ext.distributed.options import RuntimeOptions
from qgm_ext.distributed.peer_loss import PeerLostError
from qgm_ext.distributed.timeline import trace

__all__ = ["Communication", "DisagreementError", "MessageError", "PeerLostError", "RuntimeOptions", "trace"]
