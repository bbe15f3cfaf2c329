import os
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
        (["--output", "/dev/null/run", "--output"], "--output /dev/null/run: this folder cannot be made"),
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
    scored = ["--evaluate-train", tmp_path, "--evaluate-test", "/data/val"]
    assert submit(*TRAIN, "--output", tmp_path / "run", *scored, "--dry-run") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("--data.train /data/train is not here") and second.startswith(
        "--evaluate-test /data/val is"
    )
    scored = ["--evaluate-train", "s3://bucket/train", "--evaluate-test", "/data/{0..9}.tar"]
    assert submit(*TRAIN, "--data.train", tmp_path, "--output", tmp_path / "run", *scored, "--dry-run") == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.global_batch_size", 30, "--nodes", 4],
            "30 cannot be divided by 4 processes (4 nodes x 1): the nearest",
        ),
        (
            ["--nodes", 3, "--gpus-per-node", 2],
            "_size 128 cannot be divided by 6 processes (3 nodes x 2)",
        ),  # the config's
        (["--epochs", 3], "give the length of the run once"),
        (["--data.train", ""], "--data.train is missing"),
    ],
)
def test_what_every_process_would_refuse_is_refused_before_the_queue(arguments, message, tmp_path, capsys):
    assert submit(*TRAIN, "--output", tmp_path / "run", *arguments, "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "{global_batch_size: 30, train: /data/train}", "--nodes", 4],  # the job will take it apart
        ["--epochs", "null", "--nodes", 2],
        ["--epochs", 3, "--trainer.max_steps", "-1"],
    ],
)
def test_what_cannot_be_seen_is_left_to_the_job(arguments, tmp_path):
    assert submit(*TRAIN, "--output", tmp_path / "run", *arguments, "--dry-run") == 0


def test_a_config_that_is_no_yaml_is_told(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [")
    assert submit("--config", tmp_path / "x.yaml", "--output", tmp_path / "run", "--dry-run") == 2
    assert "x.yaml: not valid YAML" in capsys.readouterr().err


HOLDS = "import sys, time; from pathlib import Path; from pretrain.run_lock import RunLock\n"
HOLDS += "lock = RunLock(Path(sys.argv[1])); lock.take(); print(flush=True); time.sleep(100)"


def test_who_submits_for_a_run_that_trains_now_is_told(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    environment = os.environ | {"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2"}
    command = [sys.executable, "-c", HOLDS, run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            assert submit(*TRAIN, "--output", run, "--dry-run") == 0
            assert f"another process trains in {run}: process {other.pid} on " in (told := capsys.readouterr().err)
            assert "(job 31), since" in told and "the job ends at its start if that is still so" in told
            assert (run / ".lock").exists()
        finally:
            other.kill()
    assert submit(*TRAIN, "--output", run, "--dry-run") == 0
    assert "another process" not in capsys.readouterr().err  # the file alone holds nothing


@pytest.mark.parametrize(("asked", "told"), [(40, True), (41, False)])
def test_a_finished_run_is_told(asked, told, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {}\ntrainer: {}\n")
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n30,7.5,1.0\n40,10.0,0.9\n")
    more = ["--data.train", tmp_path, "--output", tmp_path, "--dry-run"]
    assert submit(*TRAIN, *more, "--trainer.max_steps", asked) == 0
    assert (f"{tmp_path} has 40 of 40 steps: the job will say that it is fin" in capsys.readouterr().err) == told
    by_epochs = ["--trainer.max_steps", "-1", "--epochs", asked / 4]
    assert submit(*TRAIN, *more, *by_epochs) == 0
    assert ("40 of 40 steps" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("place", "message"),
    [("file", "is a file; name a folder"), (".", "holds files but no trivit run"), ("file/run", "cannot be made in ")],
)
def test_a_folder_in_which_no_run_can_begin_is_refused(place, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert submit(*TRAIN, "--output", tmp_path / place, "--dry-run") == 2
    assert message in capsys.readouterr().err


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
        "words = '--config mae_demo --data.train /tmp --output /tmp/none --dry-run'\n"
        "assert main(['slurm', 'submit', *words.split()]) == 0\n"
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
