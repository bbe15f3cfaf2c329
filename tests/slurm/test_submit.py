import subprocess
import sys

import pytest

from pretrain.cli import main

TRAIN = ["--config", "mae_demo", "--data.train", "/data/train", "--trainer.max_steps=5"]


def submit(*arguments: object) -> int:
    try:
        return main(["slurm", "submit", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def test_dry_run_shows_the_scripts_and_writes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--nodes", 2, "--gpus-per-node", 4, "--time", "8:00:00", "--evaluate-train", "/d/t"]
    more += ["--evaluate-test", "/d/v", "--evaluate-time", "90"]
    assert submit(*TRAIN, "--output", run, *more, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (
        f"# ---- {run}/slurm/pretrain.sbatch\n#!/bin/bash\n" in shown and f"# ---- {run}/slurm/evaluate.sbatch" in shown
    )
    assert "#SBATCH --time=8:00:00\n" in shown and "#SBATCH --time=90\n" in shown
    words = shown.replace("\\\n", " ").split()
    for pair in (
        "--trainer.num_nodes 2", "--trainer.devices 4", "--trainer.strategy ddp", "--trainer.accelerator gpu",
        "--trainer.max_steps 5", f"--output {run}", "--train /d/t", "--test /d/v",
    ):  # fmt: skip
        name, value = pair.split()
        assert any(words[i : i + 2] == [name, value] for i in range(len(words))), pair
    assert not run.exists()


def test_one_process_needs_no_strategy(tmp_path, capsys):
    assert submit(*TRAIN, "--output", tmp_path / "run", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "--trainer.accelerator cpu" in shown and "strategy" not in shown and "evaluate.sbatch" not in shown


def test_strategy_and_accelerator_may_be_chosen(tmp_path, capsys):
    more = ["--nodes", 2, "--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.accelerator", "gpu"]
    assert submit(*TRAIN, "--output", tmp_path / "run", *more, "--dry-run") == 0
    shown = capsys.readouterr().out
    command = [line for line in shown.splitlines() if not line.startswith("#")]
    assert [sum(name in line for line in command) for name in ("--trainer.strategy", "--trainer.accelerator")] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", 2], "--output is missing"),
        (["--output"], "--output is missing"),
        (["--output", "run", "--trainer.devices", 4], "--trainer.devices follows from --nodes"),
        (["--output", "run", "--trainer.num_nodes=2"], "--trainer.num_nodes follows from --nodes"),
        (["--output", "run", "--env", "HOME"], "write NAME=VALUE"),
        (["--output", "run", "--probes", "knn"], "need --evaluate-test"),
        (["--output", "run", "--watch"], "need --evaluate-test"),
        (["--output", "run", "--evaluate-time", "30"], "need --evaluate-test"),
        (["--output", "run", "--evaluate-test", "/d/v", "--evaluate-time", "soon"], "--evaluate-time soon is no time"),
        (["--output", "run", "--tasks-per-node", 0], "--tasks-per-node 0 must be at least 1"),
        (["--output", "run", "--time", "soon"], "no time limit of SLURM"),
        (["--output", "run", "--nodes", "two"], "invalid int value: 'two'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert submit(*TRAIN, *arguments, "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trivit: ") and message in line


@pytest.mark.parametrize(
    ("config", "message"),
    [([], "--config is missing"), (["--config", "mae_dem"], "no shipped config of that name (clip_demo, ")],
)
def test_a_config_that_is_not_there_is_told_before_the_queue(config, message, capsys):
    assert submit(*config, "--data.train", "/data/train", "--output", "run", "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_data_that_only_the_nodes_may_see_are_told(tmp_path, capsys):
    assert submit(*TRAIN, "--output", tmp_path / "run", "--dry-run") == 0
    assert "--data.train /data/train is not here" in capsys.readouterr().err
    assert submit(*TRAIN, "--data.train", tmp_path, "--output", tmp_path / "run", "--dry-run") == 0
    assert not capsys.readouterr().err


def test_without_slurm_the_user_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(*TRAIN, "--output", tmp_path / "run") == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_what_slurm_refuses_is_told(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submit(*TRAIN, "--output", tmp_path / "run", "--partition", "gpu") == 2
    assert "SLURM refuses the job: sbatch: error: invalid partition specified: gpu" in capsys.readouterr().err


def test_submitting_needs_no_torch():
    code = (
        "import sys; from pretrain.cli import main\n"
        "main(['slurm', 'submit', '--config', 'mae_demo', '--output', '/tmp/none', '--dry-run'])\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_what_goes_to_slurm_with_what_it_waits_for(tmp_path, monkeypatch, capsys):
    fake, calls = tmp_path / "sbatch", tmp_path / "calls"
    fake.write_text(f'#!/bin/bash\necho "$@" >> {calls}; echo $((40 + $(wc -l < {calls})))\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = tmp_path / "run"
    more = ["--evaluate-train", "/d/t", "--evaluate-test", "/d/v", "--probes", "knn", "--watch", 90]
    assert submit(*TRAIN, "--output", run, *more) == 0
    assert calls.read_text().splitlines() == [
        f"--parsable {run}/slurm/pretrain.sbatch",
        f"--parsable --dependency=after:41 {run}/slurm/watch.sbatch 41",
        f"--parsable --kill-on-invalid-dep=yes --dependency=afterok:41 {run}/slurm/evaluate.sbatch",
    ]
    watch = (run / "slurm/watch.sbatch").read_text()
    assert f"srun  trivit evaluate {run} --train /d/t --test /d/v --probes knn --by-step &" in watch
    assert "sleep 90 &" in watch
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["job 41", "job 42", "job 43"] and "on the way" in said[1]
