"""What a run needs of each GPU, how long it takes there, and what would make it fail."""

from collections.abc import Iterator

from datamodules.shard_datamodule import Layout
from pretrain.cost import StepCost
from pretrain.findings import GIB, Finding, duration, size
from pretrain.hardware import GPU
from pretrain.scaling import Cluster, StepTime, largest_batch

SAFE = 0.9
"""Share of a GPU's memory that tensors may take: the rest is the context's, the allocator's and the network's."""
ENOUGH = 0.9
"""Efficiency below which a remedy is told."""


def memory(
    cost: StepCost, other: StepCost, gpu: GPU | None, world_size: int, sharded: bool = False
) -> Iterator[Finding]:  # fmt: skip
    """What a device must hold; `other` is the cost of another number of images, for the largest that fits.

    `sharded`: under fsdp2 (`pretrain.cost` says what is held in full); otherwise under DDP where there are several.
    """
    ranks, gradients, activations = 1, cost.present, cost.activations
    if sharded:
        ranks, gradients, activations = world_size, cost.gradients, cost.apart
    parts = {
        "weights": -(-cost.weights // ranks), "gradients": -(-gradients // ranks),
        "optimiser": -(-cost.optimizer // ranks), "activations": activations,
    }  # fmt: skip
    if sharded:
        parts["blocks gathered in full"] = cost.in_full
    elif world_size > 1:
        parts["DDP's buckets"] = cost.gradients
    total = sum(parts.values())
    told = f"with {cost.images:,} images at once: " + ", ".join(f"{name} {size(part)}" for name, part in parts.items())
    if gpu is None:
        yield Finding("ok", f"{size(total)} of memory {told}")
        return
    room = int(gpu.memory * SAFE * GIB)
    small, large = sorted((cost, other), key=lambda each: each.images)
    most = largest_batch(small, large, room - (total - cost.memory))
    if total > room:
        more = "a larger GPU, or more of them" if sharded else "--trainer.strategy fsdp2 on several GPUs"
        none = f"not even one image fits: {more}, and --model.activation_checkpointing true"
        remedy = f"--data.device_batch_size {most} or less" if most else none
        yield Finding("wrong", f"{size(total)} of {gpu.memory:.1f} GiB {told}. It does not fit: {remedy}")
        return
    yield Finding("ok", f"{size(total)} of {gpu.memory:.1f} GiB {told}")
    yield Finding("ok", f"the largest --data.device_batch_size that fits is about {most:,}")


def work(cost: StepCost) -> Finding:
    """FLOPs, whatever the hardware."""
    return Finding(
        "ok",
        f"{cost.flops / cost.images / 1e9:,.3g} GFLOP an image, {cost.forward / cost.flops:.0%} of it forward; "
        f"{cost.trained / 1e6:,.3g} million trained parameters",
    )


def speed(
    each: StepTime, layout: Layout, cluster: Cluster, steps: int | None, rate: float | None, sharded: bool = False
) -> Iterator[Finding]:  # fmt: skip
    """Time of a step and of the run, what communication costs, and how many cores must read (each reads `rate`)."""
    images = layout.rank_batch * cluster.world_size / each.total
    whole = f", {duration(each.total * steps)} for {steps:,} steps" if steps else ""
    yield Finding(
        "ok",
        f"about {duration(each.total)} a step and {images:,.0f} images/s{whole}, if {cluster.mfu:.0%} of the peak are "
        "reached (--mfu; metrics.csv has what a run did reach)",
    )
    if cluster.world_size > 1:
        hidden = (
            f"{duration(each.exposed)} of it not hidden behind computing" if each.exposed else "hidden by computing"
        )
        what, good = "weights and gradients" if sharded else "gradients", each.efficiency >= ENOUGH
        remedy = "" if good else ": give each GPU more images, or take a faster network"
        yield Finding(
            "ok" if good else "note",
            f"{what} travel {duration(each.communication)} a step, {hidden}; a GPU is {each.efficiency:.0%} as fast "
            f"as one alone{remedy}",
        )
    if rate is not None:
        yield Finding("ok", f"feeding a node takes about {images / cluster.nodes / rate:,.2g} cores like those here")


def precision(told: str, gpu: GPU | None) -> Iterator[Finding]:
    """Whether the numbers fit the GPU; `told`: trainer.precision."""
    if gpu is None:
        return
    if "bf16" in told and not gpu.bfloat16:
        yield Finding("wrong", f"this GPU has no bfloat16: --trainer.precision 16-mixed instead of {told}")
    elif told.startswith("32"):
        yield Finding("note", "in float32 a GPU is several times slower: --trainer.precision bf16-mixed")
