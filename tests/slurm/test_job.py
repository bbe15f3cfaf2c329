import subprocess
from pathlib import Path

import pytest

from slurm.errors import SlurmError
from slurm.job import Job, evaluate_script, pretrain_script, seconds, watch_script

RUN = Path("/runs/a run")


def script(job: Job, program=("trivit", "pretrain", "--config", "mae_demo", "--data.train", "/data/two words")) -> str:
    return pretrain_script(job, "trivit slurm submit", RUN / "slurm/pretrain.sbatch", RUN, list(program))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("2:30", 150), ("24:00:00", 86400), ("2-0", 172800), ("1-2:30", 95400), ("0-0:0:9", 9)],
)
def test_time_limits(limit, expected):
    assert seconds(limit) == expected


@pytest.mark.parametrize("limit", ["", "one day", "1:2:3:4", "-5", "1-", "1.5", "-1-2"])
def test_what_is_no_time_limit(limit):
    with pytest.raises(SlurmError, match="no time limit of SLURM"):
        seconds(limit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "--nodes 0 must be at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"gpus_per_node": 4, "tasks": 2}, "make it 4"),
        ({"time": "soon"}, "--time soon"),
        ({"time": "4:00"}, "leaves no time to train"),
        ({"partition": "a b"}, "--partition 'a b' must be one word"),
        ({"name": "interactive"}, "--name interactive .* is what SLURM calls a shell"),
        ({"account": ""}, "--account '' must be one word"),
        ({"environment": {"A-B": "1"}}, "write NAME=VALUE"),
        ({"sbatch": ["constraint=h100"]}, "must be one option"),
        ({"sbatch": ["--a\n#SBATCH --b"]}, "must be one option"),
    ],
)
def test_what_slurm_could_not_take(settings, message):
    with pytest.raises(SlurmError, match=message):
        Job(**{"name": "run"} | settings)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_what_the_job_asks_for():
    job = Job(
        "b16", nodes=4, gpus_per_node=8, cpus_per_task=12, mem="900G", partition="gpu", account="vision", qos="high",
        time="24:00:00", grace=300, sbatch=["--constraint=h100"],
    )  # fmt: skip
    assert job.world_size == 32
    assert options(script(job)) == [
        "--job-name=b16", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=900G",
        "--partition=gpu", "--account=vision", "--qos=high", "--time=24:00:00", "--signal=USR1@300", "--requeue",
        "--open-mode=append", f"--chdir={Path.cwd()}", "--output=/runs/a run/slurm/%j.out", "--constraint=h100",
    ]  # fmt: skip


def test_a_small_job_asks_for_little():
    assert options(script(Job("small"))) == [
        "--job-name=small", "--nodes=1", "--ntasks-per-node=1", "--requeue", "--open-mode=append",
        f"--chdir={Path.cwd()}", "--output=/runs/a run/slurm/%j.out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("training", "given", "expected"),
    [
        (None, None, None), ("2:00:00", None, "2:00:00"), ("1-0", None, "4:00:00"), ("1-0", "30", "30"),
        ("2:00:00", "8:00:00", "8:00:00"), (None, "1:30", "1:30"),
    ],
)  # fmt: skip
def test_an_evaluation_has_a_time_limit_and_the_memory_of_a_node(training, given, expected):
    """And no signal before the limit, which would end it; a watching job has the limit of the training."""
    job = Job("b16", nodes=4, gpus_per_node=8, mem="900G", time=training, sbatch=["--mem-per-gpu=90G"])
    asked = options(evaluate_script(job, "x", RUN, RUN, ["a"], ["b"], given))
    assert {"--job-name=b16-evaluate", "--gpus-per-node=1", "--mem=900G", "--mem-per-gpu=90G"} <= set(asked)
    assert [word for word in asked if "time" in word or "signal" in word] == (
        [f"--time={expected}"] if expected else []
    )
    watching = options(watch_script(job, "x", RUN, RUN, ["a"], 60))
    assert "--mem=900G" in watching and [w for w in watching if "time" in w] == (
        [f"--time={training}"] * bool(training)
    )


def test_a_time_limit_of_the_evaluation_that_is_none_is_told_by_its_name():
    with pytest.raises(SlurmError, match="--evaluate-time soon is no time limit of SLURM"):
        evaluate_script(Job("a"), "x", RUN, RUN, ["a"], ["b"], "soon")


def test_setup_lines_are_run_as_in_a_shell():
    """They read variables that are not set and go on after a failure, of which the log tells."""
    lines = ['[ -z "$NOT_SET_ANYWHERE" ]', "false  # not there"]
    for text in (script(Job("a", setup=lines)), evaluate_script(Job("a", setup=lines), "x", RUN, RUN, ["a"], ["b"])):
        before = text[: text.index("pipefail")].rpartition("\n")[0]
        done = subprocess.run(["bash", "-c", f"{before}\necho reached"], capture_output=True, text=True)
        assert done.stdout.splitlines() == ["trivit: --setup false  # not there ended with code 1", "reached"]


@pytest.mark.parametrize("job", [Job("small"), Job("large", 2, 8, time="9:00:00", container="apptainer exec x.sif")])
def test_scripts_are_bash_and_quote_what_needs_it(job, tmp_path):
    job = Job(**{**vars(job), "environment": {"GREETING": "it's $HOME"}, "setup": ["module load cuda"]})
    texts = [script(job), evaluate_script(job, "x", RUN, RUN, ["trivit", "evaluate", "a b"], ["trivit", "report", "a"])]
    texts.append(watch_script(job, "x", RUN / "slurm/watch.sbatch", RUN, ["trivit", "evaluate", "a b", "--by-step"], 9))
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        first = next(line for line in text.splitlines() if line.startswith("export GREETING"))
        said = subprocess.run(["bash", "-c", f'{first}; echo "$GREETING"'], capture_output=True, text=True, check=True)
        assert said.stdout == "it's $HOME\n"
        assert "\nmodule load cuda\n" in text and "{{" not in text
    assert "--data.train '/data/two words'" in texts[0] and "checkpoint='/runs/a run/checkpoints/last.ckpt'" in texts[0]
    assert "trivit evaluate 'a b'\n" in texts[1] and "trivit evaluate 'a b' --by-step &\n" in texts[2]
    assert ("--signal=B:USR1@180" in texts[2]) == ("--signal=USR1@180" in texts[0]) == (job.time is not None)


FAKES = {
    "scontrol": """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo n1; echo n2 ;;
    "show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 Port=6818" ;;
    "show job") echo "JobId=7 JobState=$JOB_STATE Reason=None" ;;
    "requeue 7")
        [ -z "$REFUSED" ] || { echo "$REFUSED" >&2; exit 1; }
        tail -n 1 "$LOG" | grep -q "queued again$" && echo "said too early" >> "$CALLS"
        echo requeue >> "$CALLS"
        ;;
esac
""",
    "srun": """#!/bin/bash
echo "$MASTER_ADDR:$MASTER_PORT" >> "$CALLS"
[ -n "$CHECKPOINT" ] && mkdir -p "$(dirname "$CHECKPOINT")" && echo "$CALLS" >> "$CHECKPOINT"
[ -n "$MOVES" ] && [ -e "$MOVES.part" ] && mv "$MOVES.part" "$MOVES"
[ -n "$ENDS" ] && echo "$ENDS" >&2
exit "$CODE"
""",
    "sleep": "#!/bin/bash\n",
}


def attempt(
    folder: Path, code: int, *, state="RUNNING", checkpoint=False, moves=False, ends="", refused="", attempts=10
):
    """Run the script of job 7 once, with a SLURM that plays its part; exit code, what it said, what it asked SLURM."""
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    run = folder / "run"
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    calls, log = folder / "calls", run / "slurm/7.out"
    calls.write_text("")
    job = Job("run", attempts=attempts)
    text = pretrain_script(job, "x", run / "slurm/pretrain.sbatch", run, ["trivit", "pretrain"])
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "CALLS": str(calls),
        "CODE": str(code), "JOB_STATE": state, "CHECKPOINT": str(run / "checkpoints/last.ckpt") if checkpoint else "",
        "MOVES": str(run / "checkpoints/last.ckpt") if moves else "", "ENDS": ends, "REFUSED": refused, "LOG": str(log),
    }  # fmt: skip
    before = len(log.read_text()) if log.exists() else 0
    with log.open("a") as file:
        done = subprocess.run(["bash"], input=text, text=True, stdout=file, stderr=file, env=environment, check=False)
    first, *asked = calls.read_text().splitlines()
    assert first == "10.0.0.7:20007"
    said = log.read_text()[before:]
    assert all(line.startswith("trivit: ") or line in ends.splitlines() for line in said.splitlines()), said
    return done.returncode, said.splitlines(), asked


@pytest.mark.parametrize(
    ("code", "state", "checkpoint", "requeued", "said"),
    [
        (0, "RUNNING", False, False, "finished"),
        (99, "RUNNING", True, True, "interrupted with a checkpoint: queued again"),
        (99, "COMPLETING", True, False, "SLURM itself is ending the job"),
        (99, "", True, False, "SLURM does not answer"),
        (143, "RUNNING", False, True, "before training began: queued again"),
        (143, "RUNNING", True, True, "interrupted after a new checkpoint: queued again"),
        (138, "RUNNING", False, False, "raise --time"),
        (2, "RUNNING", True, False, "the settings are wrong"),
        (1, "RUNNING", True, True, "failed (exit code 1) after a new checkpoint: queued again"),
        (1, "RUNNING", False, False, "without a new checkpoint: not queued again"),
        (137, "RUNNING", False, False, "without a new checkpoint"),
    ],
)
def test_how_a_run_ends_decides_what_follows(tmp_path, code, state, checkpoint, requeued, said):
    ended, lines, asked = attempt(tmp_path, code, state=state, checkpoint=checkpoint)
    assert ended == code and said in lines[-1] and asked == (["requeue"] if requeued else [])


TOLD = "srun: error: n1: task 0: Terminated"
BAR = "pretrain:   0%|          | 800/1.60M [00:00<?, ?img/s]"


@pytest.mark.parametrize(
    ("code", "ends", "ended", "requeued", "said"),
    [
        (143, f"srun: error: n2: task 1: Exited with exit code 2\n{TOLD}", 2, False, "the settings are wrong"),
        (137, f"srun: error: n2: tasks 4-6,7: Exited with exit code 2\n{TOLD}", 2, False, "the settings are wrong"),
        (143, f"srun: error: n2: task 1: Exited with exit code 1\n{TOLD}", 1, False, "failed (exit code 1) without"),
        (143, f"srun: error: n2: task 1: Out Of Memory\n{TOLD}", 137, False, "failed (exit code 137) without"),
        (137, f"srun: error: n2: task 1: Exited with exit code 99\n{TOLD}", 99, True, "with a checkpoint: queued"),
        (
            137,
            f"{BAR}srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Exited with exit code 1",
            137,
            False,
            "(exit code 137)",
        ),
        (143, f"{TOLD}\nsrun: error: n2: task 1: Exited with exit code 1", 143, True, "queued again"),  # preempted
    ],
)
def test_a_rank_that_fails_is_not_hidden_by_those_that_were_ended_for_it(
    tmp_path, code, ends, ended, requeued, said
):  # fmt: skip
    """What earlier attempts said does not count."""
    attempt(tmp_path, 143, ends="srun: error: n1: task 0: Exited with exit code 3\n" + TOLD)
    found, lines, asked = attempt(tmp_path, code, ends=ends)
    assert found == ended and said in lines[-1] and asked == (["requeue"] if requeued else [])
    if ended != 143:
        assert f"the first rank to end was {ends.splitlines()[0].rpartition('srun: error: ')[2]}" in lines[-2]


OTHER = "another process trains in /runs/a: process 12 on n1 (job 6), since 2026-11-22 01:02:03; wait for it"


@pytest.mark.parametrize("code", [2, 143])
def test_a_run_that_another_job_trains_is_told_with_that_job_and_not_as_wrong_settings(tmp_path, code):
    ended = "\nsrun: error: n1: task 0: Exited with exit code 2" if code == 143 else ""
    found, lines, asked = attempt(tmp_path, code, ends=f"trivit: {OTHER}{ended}")
    assert found == 2 and lines[-1].endswith(f"{OTHER}: not queued again") and not asked
    _, lines, _ = attempt(tmp_path, 2)
    assert lines[-1].endswith("the settings are wrong, see above: not queued again")  # of this attempt only


@pytest.mark.parametrize("code", [143, 99])
def test_attempts_without_a_new_checkpoint_come_to_an_end(tmp_path, code):
    for _ in range(2):
        assert attempt(tmp_path, code, attempts=3)[2] == ["requeue"]
    _, lines, asked = attempt(tmp_path, code, attempts=3)
    assert not asked and lines[-1].endswith("that was attempt 3 without a new checkpoint: not queued again")
    for _ in range(4):
        assert attempt(tmp_path, code, attempts=3, checkpoint=True)[2] == ["requeue"]


@pytest.mark.parametrize("names", [["last.ckpt.part"], ["last.ckpt.part", "last.ckpt"]])
def test_what_only_gets_its_place_is_no_new_checkpoint(tmp_path, names):
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    for name in names:
        (checkpoints / name).write_text(name)
    _, lines, asked = attempt(tmp_path, 1, moves=True)
    assert (checkpoints / "last.ckpt").read_text() == "last.ckpt.part"
    assert not asked and "without a new checkpoint: not queued again" in lines[-1]
    assert attempt(tmp_path, 1, moves=True, checkpoint=True)[2] == ["requeue"]


def test_what_slurm_refuses_is_not_called_queued(tmp_path):
    code, lines, asked = attempt(tmp_path, 99, checkpoint=True, refused="Requested operation is presently disabled")
    assert code == 99 and not asked
    assert lines[-1].endswith("SLURM does not queue it again: Requested operation is presently disabled")


WATCHED = {
    "squeue": """#!/bin/bash
echo "$@" >> "$FOLDER/looks"
looks=$(wc -l < "$FOLDER/looks")
case $looks in
    2 | 4 | 6) echo "$looks" > "$CHECKPOINT.part" && mv "$CHECKPOINT.part" "$CHECKPOINT" ;;  # 6: after its end
esac
case $looks in
    1 | 2 | 3 | 4) echo "7 RUNNING" ;;
    5) echo "error: Unable to contact slurm controller" >&2; exit 1 ;;
esac
""",
    "srun": """#!/bin/bash
echo "$(cat "$CHECKPOINT"): $*" >> "$FOLDER/calls"
[ "$(cat "$CHECKPOINT")" != 4 ]
""",
    "sleep": "#!/bin/bash\n",
}


def test_each_checkpoint_is_evaluated_until_the_training_job_is_gone(tmp_path):
    for name, text in WATCHED.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    text = watch_script(Job("run"), "x", tmp_path / "watch.sbatch", tmp_path / "run", ["trivit", "evaluate"], 60)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOLDER": str(tmp_path), "CHECKPOINT": str(checkpoint)}
    command = ["bash", "-s", "7"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, env=environment, check=True, timeout=60)
    assert (tmp_path / "calls").read_text().splitlines() == [f"{n}: trivit evaluate" for n in (2, 4, 6)]
    assert (tmp_path / "looks").read_text().splitlines() == ["--noheader --jobs=7"] * 7
    first, last = done.stdout.splitlines()
    assert "this checkpoint was not evaluated" in first and last.endswith("job 7 has ended") and done.stderr == ""


def test_a_watch_without_pause_is_refused():
    with pytest.raises(SlurmError, match="--watch 0 must be at least 1 second"):
        watch_script(Job("run"), "x", RUN, RUN, [], 0)
