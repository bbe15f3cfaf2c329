"""`--trainer.strategy fsdp2`: parameters, gradients and optimiser state are shared out to the ranks."""

import errno
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed import all_gather_object, new_group
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pretrain.checkpoint_files import flush_folder, load_pieces, remove
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.saving import reason
from tasks.sharded_files import Pieces, save_about, save_shard, shard_name, split_off
from tasks.sharding import average_scalars, fill, rows

NAME = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, which the task applies in `configure_model`.

    Checkpoints are folders (see `tasks.sharded_files`) whose content has the names of an ordinary checkpoint, so that
    either kind goes on under either strategy, on any number of ranks.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(tensor_parallel_size=1, **settings)
        self.writer = CheckpointWriter()
        self._apart: Any = None

    def setup_environment(self) -> None:
        """All ranks are one axis."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Collective: what is not sharded needs its gradient averaged."""
        assert self.lightning_module is not None
        average_scalars(self.lightning_module)

    # ---- saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of this rank's shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of this rank's shards, by number of the parameter, as without sharding."""
        return getattr(optimizer, "optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Collective: every rank writes its shard, then the first one the rest; now, or in the background.

        Raises:
            OSError: the same on all ranks when one of them could not copy or write its shard; on the first rank alone
                when it could not write the rest.
        """
        folder = Path(self.broadcast(filepath))
        if self.writer.background and self._apart is None:
            # What a thread says must not get between the words of training.
            self._apart = new_group(backend="gloo", timeout=self._timeout)
        rest: Any = None
        mine: dict[str, tuple[int, Tensor]] = {}

        def keep() -> None:
            nonlocal rest, mine
            rest, mine = split_off(checkpoint, copy=self.writer.background)
            rest = self.writer.keep(rest)

        self._together(keep)  # the host may have no memory for it; no rank writes before all have it
        self.writer.do(lambda: self._write(folder, rest, mine))

    def _write(self, folder: Path, rest: Any, mine: Any) -> None:
        """Collective."""
        save = self._together(lambda: _make_anew(folder) if self.is_global_zero else None)[0]
        name = shard_name(self.global_rank)
        sizes = dict(self._together(lambda: (name, save_shard(mine, save, folder / name))))
        if not self.is_global_zero:
            return
        for rank, (name, size) in enumerate(sizes.items()):
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise OSError(
                    errno.ENOENT, f"what rank {rank} has written is not here: the run must lie where all nodes see it"
                )
        save_about(rest, sizes, save, folder)
        flush_folder(folder)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Collective: what the action gives on each rank; the first failure of one is an OSError on all of them."""
        told: Any = None
        failure: tuple[int, str] | None = None
        try:
            told = action()
        except Exception as error:  # torch's writer, say, or a host without memory
            failure = getattr(error, "errno", None) or errno.EIO, reason(error)
        everyone: list[Any] = [None] * self.world_size
        all_gather_object(everyone, (told, failure), group=self._apart)
        for rank, (_, failed) in enumerate(everyone):
            if failed is not None:
                raise OSError(failed[0], f"rank {rank}: {failed[1]}")
        return [each for each, _ in everyone]

    # ---- loading

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser is there already when a checkpoint is read."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of either kind, its tensors still on the disk."""
        return load_pieces(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """This rank's rows of every tensor."""
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        if missing := own.keys() ^ given.keys():
            raise RuntimeError(f"the checkpoint is of another model: {', '.join(sorted(missing)[:5])}")
        for name, tensor in own.items():
            if tuple(tensor.shape) != tuple(given[name].shape):  # rows of a longer table would be taken without a word
                sizes = f"{tuple(given[name].shape)}, here {tuple(tensor.shape)}"
                raise RuntimeError(f"the checkpoint is of another model: {name} is {sizes}")
            fill(tensor, given[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Likewise."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            held = {
                number: {name: _like(parameters[number], value) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": held})


def _make_anew(folder: Path) -> str:
    """The folder, empty, and an id for what will be saved to it."""
    remove(folder)
    folder.mkdir(parents=True)
    return uuid.uuid4().hex


def _like(parameter: Tensor, value: Any) -> Any:
    """State of the parameter's shape, cut as the parameter is."""
    if not isinstance(value, Tensor | Pieces):
        return value
    if tuple(value.shape) != tuple(parameter.shape):
        assert isinstance(value, Tensor)
        return value.clone()  # not a view into the file
    if rows(parameter) is None:
        return value[...].clone()
    state = torch.empty_like(parameter, dtype=value.dtype)
    assert isinstance(state, DTensor)
    fill(state, value)
    return state


StrategyRegistry.register(NAME, FSDP2Strategy, description="FSDP2: the model is sharded over the ranks")
