"""What workers say to each other in bytes: of any length, to all or to rank 0, and refused where it is garbage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from process_pool import ProcessPool
from qgm_ext.distributed.agreement import gather_bytes, gather_json

CPU = torch.device("cpu")
SAID = [b"a", b"\x00\xff" * 500, b"bc"]


def talk(rank: int) -> dict[str, Any]:
    others = dist.new_group([1, 2])
    found: dict[str, Any] = {
        "all": gather_bytes(None, SAID[rank], CPU, largest=1000),
        "first": gather_bytes(None, SAID[rank], CPU, only_first=True),
        "json": gather_json(None, {"rank": rank, "text": "x" * rank}, CPU),
    }
    if rank > 0:
        found["others"] = gather_bytes(others, SAID[rank], CPU, only_first=True)
    with pytest.raises(ValueError, match="rank 1 announces 1000 bytes about itself"):
        gather_bytes(None, SAID[rank], CPU, largest=999)
    with pytest.raises(ValueError, match="rank 2 announces 0 bytes about itself"):
        gather_bytes(None, b"" if rank == 2 else b"a", CPU, only_first=True)
    if rank == 1:
        gather_bytes(None, b"{", CPU)
    else:
        with pytest.raises(ValueError, match=r"rank 1 sends no JSON about itself \(Expecting property name"):
            gather_json(None, {}, CPU)
    return found


def test_bytes_reach_all_workers_or_the_first_of_a_group() -> None:
    with ProcessPool(3) as pool:
        found = pool.run(talk, 3)
    for rank, one in enumerate(found):
        assert one["all"] == SAID
        assert one["first"] == (SAID if rank == 0 else [])
        assert one["json"] == [{"rank": k, "text": "x" * k} for k in range(3)]
    assert [found[1]["others"], found[2]["others"]] == [SAID[1:], []]
