"""The task as a YAML builds it: through jsonargparse, in the subclass mode of LightningCLI."""

import pytest
import torch
from jsonargparse import ArgumentParser

from tasks.blocks import is_compiled
from tasks.encoder_config import EncoderConfig
from tasks.mae_task import MAETask
from tasks.task import PretrainTask

YAML = """
model:
  class_path: tasks.mae_task.MAETask
  init_args:
    encoder: {arch: vit_tiny, width: 16, depth: 1, heads: 1, image_size: 16, patch_size: 8, mean: [0.1, 0.2, 0.3]}
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 1
    mask_ratio: 0.5
    base_lr: 1.5e-4
    betas: [0.8, 0.95]
"""


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PretrainTask, "model")
    return parser


def test_yaml_becomes_a_task(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    given = ["--config", str(tmp_path / "run.yaml"), "--model.encoder.registers", "2", "--model.encoder.pool", "cls"]
    config = parser().parse_args(given)
    builder = parser()
    task = getattr(builder, "instantiate", builder.instantiate_classes)(config).model  # renamed in jsonargparse 4.49
    assert isinstance(task, MAETask)
    assert task.betas == (0.8, 0.95)
    assert task.encoder_config == EncoderConfig(
        arch="vit_tiny", width=16, depth=1, heads=1, image_size=16, patch_size=8, mean=(0.1, 0.2, 0.3), registers=2,
        pool="cls",
    )  # fmt: skip
    assert task.model_settings()["mask_ratio"] == 0.5


@pytest.mark.parametrize(
    "given",
    [
        ["--model.encoder.no_such_key", "1"],
        ["--model.encoder.positions", "sideways"],
        ["--model.encoder.depth", "two"],
        ["--model.no_such_key", "1"],
    ],
)
def test_what_the_task_does_not_know_is_refused(given, tmp_path):
    from jsonargparse import ArgumentError

    (tmp_path / "run.yaml").write_text(YAML)
    with pytest.raises(ArgumentError):
        parser().parse_args(["--config", str(tmp_path / "run.yaml"), *given])


def test_every_block_is_compiled_and_trains_alike(monkeypatch):
    """Traced as torch.compile does, without the minutes that generating code takes on a CPU."""
    calls, compiling = [0], torch.compile

    def count(graph, inputs):
        def call(*args):
            calls[0] += 1
            return graph.forward(*args)

        return call

    monkeypatch.setattr(torch, "compile", lambda forward: compiling(forward, backend=count, fullgraph=True))
    torch.compiler.reset()
    encoder = EncoderConfig(arch="vit_tiny", width=16, depth=10, heads=1, image_size=16, patch_size=8, drop_path=0.1)
    options = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 1, "base_lr": 1e-3}
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        task = MAETask(encoder, compile_blocks=compiled, **options)
        task.setup("fit")
        assert is_compiled(task.model.encoder) == compiled
        batch = {"image": torch.randn(3, 3, 16, 16), "rng": torch.arange(3)}
        losses.append(task.training_step(batch, 0)["loss"])
        losses[-1].backward()
        assert calls == [12 * compiled]
    torch.testing.assert_close(*losses)
