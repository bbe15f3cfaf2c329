"""What would end a job at its start, as far as a login node can tell: without torch, perhaps without its disks."""

from collections.abc import Mapping
from pathlib import Path

from slurm.asked import Asked
from slurm.errors import SlurmError
from slurm.job import Job


def check_asked(asked: Asked, job: Job) -> None:
    """SlurmError for what each process of the job would refuse: no data, two lengths, a batch that they cannot share.

    What fits a device and what the objective needs is left to `trivit doctor`.
    """
    if asked.tells("data.train") and not asked.text("data.train"):
        raise SlurmError("--data.train is missing: name a folder of shards or images, or its URL")
    if asked.number("epochs") and asked.number("trainer.max_steps"):
        raise SlurmError(
            "give the length of the run once: epochs, or trainer.max_steps (`--epochs null` takes it away)"
        )
    batch, ranks = int(asked.number("data.global_batch_size") or 0), job.world_size
    if batch % ranks:
        near = " or ".join(str(near) for near in (batch // ranks * ranks, -(-batch // ranks) * ranks) if near)
        raise SlurmError(
            f"data.global_batch_size {batch} cannot be divided by {ranks} processes ({job.nodes} nodes x "
            f"{job.tasks_per_node}): the nearest that can are {near}"
        )


def not_here(folders: Mapping[str, str | None]) -> list[str]:
    """Which of these folders of data (option -> folder, URL or pattern of tars) only the nodes may see, in words."""
    return [
        f"{option} {place} is not here: the job ends if its nodes do not see it, either"
        for option, place in folders.items()
        if place and not ("://" in place or "{" in place or Path(place).expanduser().exists())
    ]
