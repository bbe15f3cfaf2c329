"""`trivit pretrain`, `slurm submit` and `doctor`: a run, here or in a queue, and what it will need."""

import argparse
import os

from pretrain.commands import Commands, add_command, add_group


def add_pretrain(commands: Commands) -> None:
    """Whose own options LightningCLI tells."""
    add_command(
        commands, "pretrain", _pretrain, "train an encoder; the same command with the same output resumes", True
    )


def _pretrain(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    # Or torch prints its own stack at each try to reach a rank that is not there; `watchdog` tells it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pretrain.run import pretrain_command

    return pretrain_command(rest, arguments.last)


def add_slurm(commands: Commands) -> None:
    """With the options of the job."""
    from slurm.submit import add_options

    kinds = add_group(commands, "slurm", "run on a SLURM cluster")
    submit = add_command(
        kinds,
        "submit",
        _submit,
        "write the batch script of a run and submit it; what is not listed here goes to trivit pretrain",
    )
    submit.set_defaults(takes_rest=True)
    submit.allow_abbrev = False  # or --acc would not reach trivit pretrain
    add_options(submit)


def _submit(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    from pretrain.run_place import check_before_queue
    from slurm.submit import submit

    return submit(arguments, rest, check_before_queue)


def add_doctor(commands: Commands) -> None:
    """With the options of the hardware."""
    from pretrain.doctor_options import add_options

    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "what is here, what a run will need, what is wrong with it; what is not listed here is of trivit pretrain",
    )
    doctor.set_defaults(takes_rest=True)
    doctor.allow_abbrev = False
    add_options(doctor)


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    from pretrain.doctor import doctor

    return doctor(arguments, rest)
