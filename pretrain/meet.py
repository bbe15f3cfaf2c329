"""Where the ranks of a run under torchrun meet, also after a restart.

torchrun's agent keeps one store for all its restarts, and in it lie the addresses of ranks that are gone: a rank that
comes early would find them and call there in vain. So each round of ranks gets a corner of the store for itself.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PAUSE = 0.05  # seconds


def meet(device: torch.device, timeout: timedelta, backend: str | None = None) -> None:
    """Collective: the process group of this round of ranks; nothing where no agent of torchrun serves a store.

    Waits for ever, until `Watchdog` ends it.

    Args:
        device: of this rank.
        timeout: of collectives; longer than the watchdog's.
        backend: None: NCCL on a GPU, gloo elsewhere.
    """
    place = os.environ
    if place.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, world = int(place["RANK"]), int(place["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        place["MASTER_ADDR"], int(place["MASTER_PORT"]), world, is_master=False, timeout=timeout
    )
    on_gpu = device.type == "cuda"
    own = dist.PrefixStore(agree_on_round(store, rank, world), store)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend or ("nccl" if on_gpu else "gloo"), store=own, rank=rank, world_size=world,
        timeout=timeout, device_id=device if on_gpu else None,
    )  # fmt: skip


def agree_on_round(store: Any, rank: int, world: int) -> str:
    """Collective: a name that the first rank has chosen for the ranks that are alive, whatever others have left behind.

    Every other rank writes down a name of its own and waits for the answer to it; the first one answers all names that
    it finds, also those of the dead, until each rank has heard it.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"trivit/here/{rank}", own)
        _wait_for(store, f"trivit/answer/{own}")
        name = str(store.get(f"trivit/answer/{own}").decode())
        store.set(f"trivit/heard/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, world)), set[str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"trivit/here/{other}"]):
                name = store.get(f"trivit/here/{other}").decode()
                if name not in answered:
                    store.set(f"trivit/answer/{name}", own)
                    answered.add(name)
            if store.check([f"trivit/heard/{own}/{other}"]):
                missing.discard(other)
        time.sleep(PAUSE if missing else 0)
    return own


def _wait_for(store: Any, key: str) -> None:
    while not store.check([key]):
        time.sleep(PAUSE)
