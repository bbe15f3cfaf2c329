"""How long a run takes and how much of it is spent on communication, on hardware that need not be here.

The formulas are in docs/scaling.md. They are a model: what they leave out is named there.
"""

from dataclasses import dataclass

from pretrain.cost import StepCost
from pretrain.hardware import GPU

BACKWARD = 2 / 3
"""Share of a micro-batch's computing in which gradients become ready, so that their exchange can hide behind it."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `gpus` equal GPUs; `network` is GB/s into a node in one direction, `mfu` a share."""

    gpu: GPU
    nodes: int
    gpus: int
    network: float
    mfu: float

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step. `exposed`: of the communication, what computing cannot hide."""

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Speed per GPU against a GPU alone."""
        return self.compute / self.total


def step_time(cost: StepCost, cluster: Cluster, rank_batch: int, sharded: bool = False) -> StepTime:
    """Of an optimiser step with `rank_batch` images on each GPU, under DDP or `sharded` (fsdp2).

    A ring all-reduce moves 2 (W - 1) / W of the gradients through every link; the slowest decides. It starts as soon
    as the backward pass of the last micro-batch (each of `cost.images`) has its first gradients: those before it only
    add to them. A sharded model moves (W - 1) / W of its weights, forward and backward, and of the gradients once, and
    does so for every micro-batch.
    """
    compute = cost.flops / cost.images * rank_batch / (cluster.gpu.tflops * 1e12 * cluster.mfu)
    world = cluster.world_size
    # The ring enters each node once, so the GPUs of a node share its network, not divide it.
    slowest = min(cluster.gpu.link, cluster.network) if cluster.nodes > 1 else cluster.gpu.link
    micro_batches = max(1, rank_batch // cost.images)
    if sharded:
        moved, hidden = (cost.gathered + cost.gradients) * micro_batches, 1.0
    else:
        moved, hidden = 2 * cost.gradients, BACKWARD / micro_batches
    communication = (world - 1) / world * moved / (slowest * 1e9)
    return StepTime(compute, communication, max(0.0, communication - hidden * compute))


def largest_batch(small: StepCost, large: StepCost, room: int) -> int:
    """The most images of a micro-batch whose step stays within `room` bytes, by the line through two sizes; or 0."""
    each = (large.memory - small.memory) / (large.images - small.images)
    return max(0, int((room - large.memory) / each + large.images))
