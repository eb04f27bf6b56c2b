"""Roll: what survivors of lost workers agree on, through the store at which the workers met.

A worker whose connection breaks is lost, even if only one neighbour sees it; who is first to write it into the store
decides. Survivors may be at different steps then, and the last messages of the lost worker may have reached some of
them only. So every survivor says which of its messages it holds, from which moment on it takes no more of them, and the
first to have heard all writes down the last message that counts: the lost worker takes part in the step of that message
and in none after. If a message that counts has not come to all who may need it, a holder puts it into the store.

A thread on every worker answers, so that nobody waits for a worker that computes. One that has ended is not asked any
more: only if a worker is lost in the last steps, with neighbours that have ended, may its last message count for some
and not for others. The store must outlive the workers that are lost: torchrun's and a FileStore do, one that is kept by
rank 0 ends with it.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CHUNK", "Excluded", "GaveUp", "Loss", "Roll"]

_NONE = -1

_POLL = 0.05  # seconds
#: Bytes that go into the store under one key; TCPStore takes no values of more than 8 MiB.
CHUNK = 1 << 22
_NUMBERS: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)  # of the rolls of a group, as they are built
_logger = logging.getLogger("qgm_ext.distributed")


class Excluded(RuntimeError):
    """The others take this worker for lost."""


class GaveUp(RuntimeError):
    """A worker has given up, and so must all.

    Attributes:
        peer: because of whom.
    """

    def __init__(self, text: str, peer: int) -> None:
        super().__init__(text)
        self.peer = peer


class Loss(NamedTuple):
    """What is agreed of one lost worker.

    Args:
        rank: of the worker.
        last: the turn of its last message that counts; -1 if none does.
        holders: for the last turns, the lowest rank that holds its message.
    """

    rank: int
    last: int
    holders: dict[int, int]


class Roll:
    """Keeps the list of lost workers, the same on all survivors.

    Args:
        store: of the process group.
        name: of the process group; a part of all keys.
        rank, size: of this worker and the group.
        timeout: seconds in which every survivor must have answered.
        notify: called, from another thread, with each :class:`Loss`, with :class:`Excluded` or :class:`GaveUp`, and
            with an error of the store, after which nothing can be agreed on.

    Attributes:
        prefix: of its keys.
    """

    def __init__(
        self, store: Any, name: str, rank: int, size: int, timeout: float, notify: Callable[[Loss | Exception], None]
    ) -> None:
        self._store, self.prefix = store, f"qgm_ext/roll/{name}/{next(_NUMBERS[name])}"
        self._rank, self._size, self._timeout = rank, size, timeout
        self._notify = notify
        self._lock = threading.Lock()
        self._held: dict[int, dict[int, list[Tensor]]] = {}  # rank -> turn -> buckets, of the last turns
        self._known: set[int] = set()  # who may send to this worker
        self._frozen: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qgm_ext roll", daemon=True)
        self._thread.start()

    def expect(self, peers: Iterable[int]) -> None:
        """Take note of whose messages this worker needs."""
        with self._lock:
            self._known.update(peers)

    def hold(self, peer: int, turn: int, message: list[Tensor], kept: int = 2) -> bool:
        """Take note of a whole message; False if the peer is lost, and this worker has said that it does not hold it.

        The tensors must stay as they are until ``kept`` more messages of the peer were held.
        """
        with self._lock:
            if peer in self._frozen:
                return turn in self._held.get(peer, {})
            turns = self._held.setdefault(peer, {})
            turns[turn] = message
            for old in sorted(turns)[:-kept]:
                del turns[old]
            return True

    def declare(self, peer: int) -> None:
        """Let all know that a worker is lost; :class:`Loss` follows."""
        place = 0
        while True:
            found = int(self._store.compare_set(f"{self.prefix}/lost/{place}", "", str(peer)).decode())
            if found in (peer, self._rank):
                return
            place += 1

    def give_up(self, text: str, peer: int) -> None:
        """End the run on all workers; to be called before this one ends, which others would heal."""
        self._store.compare_set(f"{self.prefix}/given_up", "", json.dumps([text, peer]))

    def fetch(self, loss: Loss, turn: int, into: list[Tensor]) -> bool:
        """Get a message that was sent to others, too; False if its holder does not answer in time."""
        key = f"{self.prefix}/message/{loss.rank}/{turn}"
        end = time.monotonic() + self._timeout
        while not self._store.check([f"{key}/size"]):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL)
        size = int(self._store.get(f"{key}/size").decode())
        data = b"".join(bytes(self._store.get(f"{key}/{k}")) for k in range(0, size, CHUNK))
        place = 0
        for tensor in into:
            view = tensor.view(torch.uint8).view(-1)
            view.copy_(torch.frombuffer(bytearray(data[place : place + view.numel()]), dtype=torch.uint8))
            place += view.numel()
        return place == size

    def close(self) -> None:
        """End the thread, after it has settled what it knows of."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._timeout)

    # The thread -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        lost: list[int] = []
        ended = False
        try:
            while not ended:
                ended = self._ended.wait(_POLL)
                if self._has_given_up():
                    return
                while self._store.check([f"{self.prefix}/lost/{len(lost)}"]):
                    lost.append(int(self._store.get(f"{self.prefix}/lost/{len(lost)}").decode()))
                    if lost[-1] == self._rank:
                        self._notify(Excluded())
                        return
                    if self._has_given_up():
                        return
                    self._notify(self._settle(lost))
            self._store.set(f"{self.prefix}/ended/{self._rank}", "1")
        except RuntimeError as error:  # DistStoreError and its kin
            self._notify(error)

    def _has_given_up(self) -> bool:
        key = f"{self.prefix}/given_up"
        if not self._store.check([key]):
            return False
        self._notify(GaveUp(*json.loads(self._store.get(key).decode())))
        return True

    def _settle(self, lost: Sequence[int]) -> Loss:
        """Answer for the last of the lost, and hear the others, or whoever has done so before."""
        rank, place = lost[-1], len(lost) - 1
        with self._lock:
            self._frozen.add(rank)
            mine = {"held": sorted(self._held.get(rank, {})), "needs": rank in self._known}
        key, decided = f"{self.prefix}/held/{place}", f"{self.prefix}/decided/{place}"
        self._store.set(f"{key}/{self._rank}", json.dumps(mine))
        said: dict[int, Any] = {self._rank: mine}
        end = time.monotonic() + self._timeout
        while not self._store.check([decided]):
            missing = set(range(self._size)) - said.keys() - set(lost) - self._lost_later(len(lost))
            for peer in sorted(missing):
                ended = self._store.check([f"{self.prefix}/ended/{peer}"])
                if self._store.check([f"{key}/{peer}"]):
                    said[peer] = json.loads(self._store.get(f"{key}/{peer}").decode())
                if ended or peer in said:
                    missing.discard(peer)
            if not missing:
                self._store.compare_set(decided, "", json.dumps(_decision(said)))
            elif time.monotonic() > end:
                self.declare(min(missing))
                end += self._timeout
            else:
                time.sleep(_POLL)
        last, holders, wanted = json.loads(self._store.get(decided).decode())
        for turn, holder in holders:
            if holder == self._rank and turn in wanted:
                self._publish(rank, turn)
        # One line that is seen, of the lowest rank that is left.
        first = self._rank == min(set(range(self._size)) - set(lost))
        _logger.log(
            logging.WARNING if first else logging.INFO,
            "rank %d of %d is lost, its neighbours take its weight upon themselves; lost so far: %s",
            rank,
            self._size,
            ", ".join(map(str, sorted(lost))),
        )
        return Loss(rank, last, dict(holders))

    def _lost_later(self, place: int) -> set[int]:
        found: set[int] = set()
        while self._store.check([f"{self.prefix}/lost/{place}"]):
            found.add(int(self._store.get(f"{self.prefix}/lost/{place}").decode()))
            place += 1
        return found

    def _publish(self, rank: int, turn: int) -> None:
        key = f"{self.prefix}/message/{rank}/{turn}"
        data = b"".join(tensor.view(torch.uint8).view(-1).numpy().tobytes() for tensor in self._held[rank][turn])
        for k in range(0, len(data), CHUNK):
            self._store.set(f"{key}/{k}", data[k : k + CHUNK])
        self._store.set(f"{key}/size", str(len(data)))


def _decision(said: Mapping[int, Any]) -> list[Any]:
    """From the answers by rank: the last turn, (turn, lowest holder) of the last turns, and who of them is needed."""
    turns = sorted({turn for answer in said.values() for turn in answer["held"]})
    holders = [(turn, min(peer for peer, answer in said.items() if turn in answer["held"])) for turn in turns]
    wanted = [turn for turn in turns if any(a["needs"] and turn not in a["held"] for a in said.values())]
    return [max(turns, default=_NONE), holders, wanted]
