"""Where the ranks of a run meet that torchrun or srun has started, also after a restart.

torchrun's agent keeps one store for all its restarts, and in it lie the addresses of ranks that are gone: a rank that
comes early would find them and call there in vain. So each round of ranks gets a corner of the store for itself.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from pretrain.errors import AgreedFailure, Interrupted, NonFiniteError, RunFailure

PAUSE = 0.05  # seconds


def meet(strategy: Any, timeout: timedelta) -> bool:
    """Collective: the process group of the ranks; False where Lightning starts them and makes it, or one is alone.

    Waits for ever, until `Watchdog` ends it.

    Args:
        strategy: the trainer's.
        timeout: of collectives; longer than the watchdog's.
    """
    place: Any = getattr(strategy, "cluster_environment", None)
    if place is None or isinstance(place, LightningEnvironment) or dist.is_initialized():
        return False
    rank, world = place.global_rank(), place.world_size()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
    device, store = strategy.root_device, None
    on_gpu = device.type == "cuda"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent = dist.TCPStore(  # type: ignore[attr-defined]
            place.main_address, place.main_port, world, is_master=False, timeout=timeout
        )
        store = dist.PrefixStore(agree_on_round(agent, rank, world), agent)  # type: ignore[attr-defined]
    dist.init_process_group(
        getattr(strategy, "process_group_backend", None) or ("nccl" if on_gpu else "gloo"), store=store, rank=rank,
        world_size=world, timeout=timeout, device_id=device if on_gpu else None,
    )  # fmt: skip
    return True


def part(error: BaseException | None) -> None:
    """Collective: the end of the process groups, which NCCL wants before that of the process.

    Not where a rank came to its end alone (`error`): others may be gone, and NCCL would wait for them.
    """
    if isinstance(error, AgreedFailure | Interrupted | NonFiniteError | None) and dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):  # how the run ended is what counts
            dist.destroy_process_group()


@contextlib.contextmanager
def gone_ranks_told(world_size: int) -> Iterator[None]:
    """A collective that another rank has broken off by its end becomes a RunFailure."""
    try:
        yield
    except RuntimeError as error:
        # Gloo and NCCL say so in their own words.
        gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
        if world_size == 1 or not gone:
            raise
        raise RunFailure(
            f"another rank ended, what it said tells why ({str(error).splitlines()[0][:200]}); the same command "
            "goes on from the last checkpoint"
        ) from error


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
