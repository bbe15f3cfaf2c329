"""What a training step costs, before it is taken: FLOPs by torch's counter and memory, on tensors without data.

The task of a config is built on the meta device and takes two steps with fake tensors, as Lightning would. So nothing
is guessed: every operation is counted that a run does, of any encoder, and every tensor that it keeps.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from datamodules.recipes import Recipe
from datamodules.shard_datamodule import Layout, ShardDataModule
from pretrain.config import PretrainCLI, instantiate
from pretrain.hardware import gpu_here
from tasks.blocks import recompute
from tasks.task import PretrainTask

FEW = 4
"""Images that tell the FLOPs of one: enough for KoLeo and BatchNorm."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}
WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}


@dataclass(frozen=True)
class StepCost:
    """Of a micro-batch on one device, without sharding. Bytes; FLOPs are two for a multiply-accumulate.

    The last three are of `fsdp2`, where gradients are small and the worst moment may be another one: activations then,
    what of the model a rank holds in full besides its shard, and what it gathers in a step.
    """

    images: int
    forward: int  # FLOPs, the teacher's among them
    flops: int  # FLOPs forward and backward, nothing that is computed twice on purpose
    weights: int  # parameters and buffers, a teacher's, too
    trained: int  # number of parameters that get gradients
    gradients: int  # all of them: what travels between ranks
    present: int  # of the gradients, at the moment when most memory is in use; none as long as the forward pass lasts
    optimizer: int
    activations: int  # what all other tensors take at that moment: inputs, kept for the way back, passing
    apart: int = 0
    in_full: int = 0
    gathered: int = 0

    @property
    def memory(self) -> int:
        """Bytes at the worst moment, before an allocator's losses."""
        return self.weights + self.present + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations have made and that are still held, and the most there ever were.

    `present`: how many of the most were those of gradients; `apart`: the most there ever were besides gradients.
    """

    def __init__(self, trained: Iterable[Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.present = self.apart = self._gradients = 0
        self._known: set[int] = set()
        self._of_gradients: set[int] = set()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of this tensor until nobody holds it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            if self.now > self.most:
                self.most, self.present = self.now, self._gradients
            self.apart = max(self.apart, self.now - self._gradients)
            weakref.finalize(storage, self._gone, key, size)

    def _is_gradient(self, parameter: Parameter) -> None:
        if parameter.grad is not None and (key := parameter.grad.untyped_storage()._cdata) not in self._of_gradients:
            self._of_gradients.add(key)
            self._gradients += _bytes(parameter.grad)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
        if key in self._of_gradients:
            self._of_gradients.discard(key)
            self._gradients -= size


def step_cost(cli: PretrainCLI, config: Namespace, images: int) -> StepCost:
    """Of `images` on one device, as the checked and filled-in config says; takes some seconds for a large encoder."""
    precision = str(config.trainer.precision or "32-true")
    with torch.device("meta"):
        parts = instantiate(cli, config)
    task: PretrainTask = parts.model.to(WEIGHTS.get(precision))
    data: ShardDataModule = parts.data
    task.freeze_unused()
    task.trainer = trainer_stand_in(images)  # type: ignore[assignment]
    batch = task.on_before_batch_transfer(blank_batch(task, data.recipe, data.channels, images), 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        task.to_empty(device="cpu").train()
        dtype = next(p.dtype for p in task.parameters())
        batch = tree_map(lambda leaf: fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
        batch = {k: v.to(dtype) if k in data.recipe.views else v for k, v in batch.items()}
        optimizer = task.configure_optimizers()
        trained = [p for p in task.parameters() if p.requires_grad]
        live, counter = LiveBytes(trained), FlopCounterMode(display=False)
        for tensor in (*task.parameters(), *task.buffers(), *(t for t in tree_leaves(batch) if isinstance(t, Tensor))):
            live.add(tensor)
        with live:
            forward = take_step(task, batch, optimizer, AUTOCAST.get(precision), counter)
            if task.activation_checkpointing:
                recompute(task.blocks)
                live.most, live.present, live.apart = live.now, 0, live.now
            take_step(task, batch, optimizer, AUTOCAST.get(precision), None)  # with gradients and moments
        weights = sum(_bytes(t) for t in (*task.parameters(), *task.buffers()))
        gradients, moments = sum(_bytes(p) for p in trained), sum(map(_bytes, _moments(optimizer)))
        apart = live.apart - weights - moments
        return StepCost(
            images, forward, counter.get_total_flops(), weights, sum(p.numel() for p in trained), gradients,
            live.present, moments, live.most - weights - live.present - moments, apart,
            *_shared_out(task, AUTOCAST.get(precision), apart),
        )  # fmt: skip


def peak_rate(cli: PretrainCLI, config: Namespace) -> float | None:
    """Images/s at which the GPU of this machine would do nothing but the arithmetic of training; None: not known."""
    gpu = gpu_here()
    if gpu is None:
        return None
    cost = step_cost(cli, config, FEW)
    return gpu.tflops * 1e12 * cost.images / cost.flops


def take_step(
    task: PretrainTask, batch: dict[str, Any], optimizer: Optimizer, dtype: torch.dtype | None,
    counter: FlopCounterMode | None,
) -> int:  # fmt: skip
    """One optimiser step in the order of a run; FLOPs of its forward pass."""
    with counter or contextlib.nullcontext():
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            loss = task.training_step(dict(batch), 0)["loss"]
        forward = counter.get_total_flops() if counter else 0
        loss.backward()  # type: ignore[no-untyped-call]
    del loss
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return forward


def trainer_stand_in(images: int) -> SimpleNamespace:
    """What a task asks of its Trainer: alone, with whole batches, at the start of 10 epochs of 1,000 steps."""
    layout = Layout(images, images, 1)
    data = SimpleNamespace(global_batch_size=images, steps_per_epoch=1000, seed=0, layout=lambda world_size: layout)
    return SimpleNamespace(
        global_step=0, max_steps=10_000, world_size=1, global_rank=0, accumulate_grad_batches=1,
        datamodule=data, precision_plugin=None,
    )  # fmt: skip


def blank_batch(task: PretrainTask, recipe: Recipe, channels: int, images: int) -> dict[str, Any]:
    """A normalised batch of black images and the longest texts, on the host."""
    one = recipe(iter([torch.zeros(channels, 1, 1, dtype=torch.uint8)]), np.zeros(1, np.int64))
    batch: dict[str, Any] = {"rng": torch.arange(images)}
    for name in recipe.views:
        shape = list(one[name].shape)
        shape[-4] = images
        batch[name] = torch.zeros(1).expand(shape)
    if task.tokenize is not None and recipe.captions is not None:
        batch["text"] = task.tokenize(["a photo of a dog " * 200]).expand(images, -1)
    return batch


def _shared_out(task: PretrainTask, low: torch.dtype | None, activations: int) -> tuple[int, int]:
    """What `tasks.sharding.shard` makes of the model: bytes in full at the worst moment, and gathered in a step.

    While there are activations, it is what belongs to no block or head, and the largest of these with its gradients and
    the one before it, fetched ahead (or its gradients once more, as they are sent, when it is freed). When there are
    none left, what belongs to none has its gradients, and once more as they are sent.
    """
    sizes: list[tuple[int, int, int]] = []  # as gathered, of that trained, gradients as they are sent
    inside: set[int] = set()
    for units, dtype in ((task.blocks, low), (task.heads, None)):
        for unit in units:
            parameters = [p for p in unit.parameters() if id(p) not in inside]
            inside |= {id(p) for p in parameters}
            trained = [p for p in parameters if p.requires_grad]
            size = dtype.itemsize if dtype is not None else None
            sizes.append((
                sum(p.numel() * (size or p.element_size()) for p in parameters),
                sum(p.numel() * (size or p.element_size()) for p in trained), sum(map(_bytes, trained)),
            ))  # fmt: skip
    rest = [p for p in task.model.parameters() if id(p) not in inside]
    outside, learned = sum(map(_bytes, rest)), sum(_bytes(p) for p in rest if p.requires_grad)
    worst = max((gathered + trained + max(gathered, sent) for gathered, trained, sent in sizes), default=0)
    return outside + max(worst, 2 * learned - activations), outside + sum(
        gathered + trained for gathered, trained, _ in sizes
    )


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
