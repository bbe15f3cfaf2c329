"""The same config trains the same model on one and on two ranks, with accumulation and without, sharded or not.

And a run goes on as if nothing had happened when it is moved between all of these.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.run_files import read_metrics
from pretrain.cli import main
from tasks import load_encoder
from tasks.encoder_files import read_checkpoint
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import OBJECTIVES, losses
from tests.pretrain.two_ranks import pretrain_on_two_ranks

STEPS, SAVED = 20, 13
PLAIN = {"mae": [], "dino": ["--model.freeze_last_layer_epochs", 0.5, "--model.clip_grad", 0.3], "clip": []}
PRECISIONS = {"64-true": (1e-8, 1e-9), "32-true": (2e-4, 2e-3)}  # of losses (nine digits are written), of parameters
MICRO_BATCHES = {"64-true": (8, 4), "32-true": (4,)}  # of 8 images that a rank has of 16: 4 are accumulated
FSDP2 = ["--trainer.strategy", "fsdp2"]
RECOMPUTED = ["--model.activation_checkpointing", "true"]
IN_THE_BACKGROUND = ["--checkpoint_async", "true"]
SHARDED = {
    "": [],
    "recomputed": [*RECOMPUTED, *IN_THE_BACKGROUND],
    "compiled": ["--model.compile_blocks", "true"],
    "bf16": ["--trainer.precision", "bf16-mixed"],
}
# Few images have hidden patches, so that a rank has none at times; KoLeo compares the images of one rank only.
DINOV2 = [
    "--model.ibot", "{mask_probability: 0.05}", "--model.clip", "module", "--model.layer_decay", 0.8,
    "--model.patch_embed_lr_scale", 0.2, "--model.encoder.registers", 2, "--model.encoder.drop_path", 0.2,
]  # fmt: skip
SINKHORN = [*DINOV2, "--model.targets", "sinkhorn"]
TERMS = {
    "centring": (DINOV2, "64-true"), "Sinkhorn-Knopp": (SINKHORN, "32-true"),  # it always computes in float32
    "KoLeo": ([*DINOV2, "--model.koleo_weight", 0.1], "64-true"),
}  # fmt: skip
# Traced as torch.compile does, without the minutes that generating code takes on a CPU; leaves a byte for each graph.
# And each rank writes down where it has built its models. What FSDP2 warns of could be gradients that are wrong.
BEFORE = """
import os, pathlib, sys, torch, warnings
import pretrain.run
warnings.filterwarnings("error", message="FSDP2-wrapped module")
compiling, build = torch.compile, pretrain.run.instantiate
def noted(cli, config):
    parts = build(cli, config)
    devices = {parameter.device.type for parameter in parts.model.parameters()}
    with pathlib.Path(sys.argv[2]).with_name("built" + os.environ["RANK"]).open("a") as file:
        print(config.trainer.strategy, *devices, file=file)
    return parts
pretrain.run.instantiate = noted
def traced(graph, inputs):
    with pathlib.Path(sys.argv[2]).with_name("graphs").open("a") as file:
        file.write(".")
    return graph.forward
torch.compile = lambda forward: compiling(forward, backend=traced, fullgraph=True)
"""
THIRDS = ["--data.global_batch_size", 18, "--data.device_batch_size", 18]
MOVES = {"one rank": None, "ddp": ["--trainer.strategy", "ddp"], "fsdp2": FSDP2}


def command(objective: str, data: Path, run: Path, precision: str, micro_batch: int, *more: object) -> list[object]:
    return [
        *OBJECTIVES[objective], *PLAIN[objective], "--model.encoder.drop_path", 0, "--data.train", data,
        "--data.workers", 0, "--trainer.max_steps", STEPS, "--checkpoint_every", SAVED, "--trainer.precision",
        precision, "--data.device_batch_size", micro_batch, "--output", run, *more,
    ]  # fmt: skip


def parameters(run: Path) -> dict[str, Tensor]:
    return read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]  # type: ignore[no-any-return]


def assert_same(run: Path, want: Path, precision: str = "64-true") -> None:
    of_loss, of_parameter = PRECISIONS[precision]
    assert len(losses(want)) == STEPS
    assert losses(run) == pytest.approx(losses(want), rel=of_loss)
    found, wanted = parameters(run), parameters(want)
    assert found.keys() == wanted.keys() and any(value.is_floating_point() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=of_parameter, msg=f"{run.name}: {name}")


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks, and their later ways."""
    folder = tmp_path_factory.mktemp("two_ranks")
    first, later = [], []
    for objective in OBJECTIVES:
        for precision in PRECISIONS:
            for size in MICRO_BATCHES[precision]:
                run = folder / f"{objective}-ddp-{precision}-{size}"
                first.append([*command(objective, drawn, run, precision, size), *MOVES["ddp"]])  # type: ignore[misc]
        for name, more in SHARDED.items():
            run = folder / f"{objective}-fsdp2-{name}"
            first.append([*command(objective, drawn, run, "64-true", 4 if name else 8, *more), *FSDP2])
        for strategy in ("ddp", "fsdp2"):  # goes on from the single file of DDP, and from the folder of FSDP2
            start = (
                folder
                / f"{objective}-{'fsdp2' if strategy == 'ddp' else 'ddp'}-{'' if strategy == 'ddp' else '64-true-8'}"
            )
            run = folder / f"{objective}-moved-{strategy}"
            later.append((start, run, [*command(objective, drawn, run, "64-true", 8), *MOVES[strategy]]))  # type: ignore[misc]
        run = folder / f"{objective}-resumed"
        later.append((folder / f"{objective}-fsdp2-", run, [*command(objective, drawn, run, "64-true", 4), *FSDP2]))
    dino = [*command("dino", drawn, folder / "dino-eighteen", "64-true", 9), *FSDP2, *THIRDS]
    first += [dino, [*from_another(drawn, folder, folder / "dino-started"), *FSDP2]]
    for terms, (options, precision) in TERMS.items():
        for strategy in ("ddp", "fsdp2"):
            run = folder / f"dinov2-{strategy}-{terms}"
            first.append([*command("dino", drawn, run, precision, 8, *options), *MOVES[strategy]])  # type: ignore[misc]
    pretrain_on_two_ranks(first, folder, BEFORE)
    for start, run, _ in later:
        go_back(start, run)
    pretrain_on_two_ranks([command for _, _, command in later], folder)
    return folder


def from_another(data: Path, folder: Path, run: Path) -> list[object]:
    """A DINO that starts from the encoder of the finished one in `folder`."""
    return [*command("dino", data, run, "64-true", 8), "--model.init_encoder", folder / "dino-ddp-64-true-8"]


def go_back(run: Path, copy: Path) -> Path:
    """A copy of the run as it was at step SAVED."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/last.ckpt", ignore_errors=True)
    (copy / "checkpoints/last.ckpt").unlink(missing_ok=True)
    return copy


@pytest.fixture(scope="module")
def alone(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process, in both precisions; made once."""
    folder = tmp_path_factory.mktemp("alone")

    def run(objective: str, precision: str = "64-true") -> Path:
        path = folder / f"{objective}-{precision}"
        if not path.exists():
            assert pretrain(*command(objective, drawn, path, precision, 16)) == 0
        return path

    return run


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddp(objective: str, precision: str, alone: Any, folder: Path, drawn: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "parts"] if precision == "64-true" else []
    for run in parts:
        assert pretrain(*command(objective, drawn, run, precision, 4, *RECOMPUTED)) == 0
    for run in [*parts, *(folder / f"{objective}-ddp-{precision}-{size}" for size in MICRO_BATCHES[precision])]:
        assert_same(run, alone(objective, precision), precision)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fsdp2(objective: str, alone: Any, folder: Path) -> None:
    """From the first weights on, which only the first rank has drawn; gradient norms and health, too."""
    want = alone(objective)
    assert (folder / "graphs").is_file()
    built = [set((folder / f"built{rank}").read_text().splitlines()) for rank in (0, 1)]
    assert built == [{"ddp cpu", "fsdp2 cpu"}, {"ddp cpu", "fsdp2 meta"}], (
        "one rank alone builds in full what is shared"
    )
    for name in ("", "recomputed", "compiled"):
        run = folder / f"{objective}-fsdp2-{name}"
        assert (run / "checkpoints/last.ckpt/shard_00001.pt").is_file()
        metrics = read_metrics(run / "metrics.csv")
        shares = [column for column_name, column in metrics.items() if column_name.startswith("time/")]
        assert all(0 < share < 1 for share in metrics["time/communication"]) and sum(shares) == pytest.approx(1)
        assert_same(run, want)
    columns = {"mae": ["grad_norm"], "dino": ["grad_norm", "center_norm", "kl"], "clip": ["grad_norm", "logit_scale"]}
    for name in columns[objective]:
        found, wanted = (read_metrics(path / "metrics.csv")[f"train/{name}"] for path in (run, want))
        assert len(found) == STEPS and found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fsdp2_in_bfloat16_learns_about_the_same(objective: str, alone: Any, folder: Path) -> None:
    assert losses(folder / f"{objective}-fsdp2-bf16") == pytest.approx(losses(alone(objective)), rel=0.03)
    state = read_checkpoint(folder / f"{objective}-fsdp2-bf16/checkpoints/last.ckpt")["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_may_be_moved_between_strategies_and_ranks(
    objective: str, alone: Any, folder: Path, drawn: Path, tmp_path: Path
) -> None:
    """All from a checkpoint at step 13 of 20; the first two from the folder of two ranks to one and two processes."""
    one = go_back(folder / f"{objective}-fsdp2-", tmp_path / "one")
    assert pretrain(*command(objective, drawn, one, "64-true", 4)) == 0
    assert (one / "checkpoints/last.ckpt").is_file() and (one / "checkpoints/previous.ckpt").is_dir()
    for run in (
        one,
        folder / f"{objective}-moved-ddp",
        folder / f"{objective}-moved-fsdp2",
        folder / f"{objective}-resumed",
    ):
        assert_same(run, alone(objective))
    assert losses(folder / f"{objective}-resumed") == losses(folder / f"{objective}-fsdp2-")


@pytest.mark.slow
@pytest.mark.parametrize("terms", TERMS)
def test_the_terms_of_dinov2(terms: str, folder: Path, drawn: Path, tmp_path: Path) -> None:
    options, precision = TERMS[terms]
    ddp, fsdp2 = folder / f"dinov2-ddp-{terms}", folder / f"dinov2-fsdp2-{terms}"
    assert_same(fsdp2, ddp, precision)
    if terms != "KoLeo":
        assert pretrain(*command("dino", drawn, tmp_path / "run", precision, 16, *options)) == 0
        assert_same(ddp, tmp_path / "run", precision)
    hidden = read_metrics(ddp / "metrics.csv")["train/ibot_loss"]
    assert (hidden == 0).any() and (hidden > 0).any()


@pytest.mark.slow
def test_a_sharded_run_starts_from_the_encoder_of_another(folder: Path, drawn: Path, tmp_path: Path) -> None:
    """Which the second rank, whose model has no numbers at first, never reads."""
    run = tmp_path / "run"
    assert pretrain(*from_another(drawn, folder, run)) == 0
    assert_same(folder / "dino-started", run)
    assert losses(run)[1] != pytest.approx(losses(folder / "dino-ddp-64-true-8")[1]), "it has not begun from nothing"


@pytest.mark.slow
def test_three_ranks_go_on_where_two_were(folder: Path, drawn: Path, tmp_path: Path) -> None:
    """Some rows of weights cannot be cut into three equal parts."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    later = [*command("dino", drawn, run, "64-true", 6), *FSDP2, *THIRDS]
    go_back(folder / "dino-eighteen", run)
    pretrain_on_two_ranks([later], tmp_path, ranks=3)
    assert (run / "checkpoints/last.ckpt/shard_00002.pt").is_file()
    assert pretrain(*command("dino", drawn, whole, "64-true", 18), *THIRDS) == 0
    for other in (folder / "dino-eighteen", run):
        assert_same(other, whole)


@pytest.mark.slow
def test_export_and_evaluation_read_the_folder_of_a_sharded_run(
    alone: Any, folder: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = folder / "dino-fsdp2-", folder / "dino-fsdp2-/checkpoints/last.ckpt"
    want = load_encoder(alone("dino")).state_dict()
    for source in (run, checkpoint):
        found = load_encoder(source).state_dict()
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-7) for name, value in want.items())
    for options in ([], ["--whole"]):
        out = tmp_path / f"out{len(options)}.safetensors"
        assert main(["export", str(checkpoint), str(out), *options]) == 0
        assert load_encoder(out).state_dict().keys() == want.keys()
    assert main(["evaluate", str(run), "--train", str(drawn), "--test", str(drawn), "--probes", "knn"]) == 0
    assert "reloaded: largest difference 0" in capsys.readouterr().out
