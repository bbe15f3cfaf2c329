"""Ranks that run several commands one after the other, so that torch is imported once and not once a command."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.pretrain.processes import end, start

PROGRAM = """
import json, pathlib, sys
from pretrain.cli import main
exec(sys.argv[3])
for command in json.loads(pathlib.Path(sys.argv[2]).read_text()):
    if code := main(["pretrain", *command]):
        sys.exit(code)
"""


def pretrain_on_two_ranks(
    commands: Sequence[Sequence[object]], folder: Path, before: str = "", seconds: float = 280, ranks: int = 2
) -> None:
    """`trivit pretrain ...` for each of the commands, as torchrun would start it; all must end well.

    `before`: Python to run first; `ranks`: or more than two.
    """
    listed = folder / "commands.json"
    listed.write_text(json.dumps([[*map(str, command), "--trainer.devices", str(ranks)] for command in commands]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    started = [
        start([listed, before], ("-c", PROGRAM), RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(ranks)
    ]
    ended = [end(rank, seconds) for rank in started]
    assert [code for code, _ in ended] == [0] * ranks, "\n".join(error[-3000:] for _, error in ended)
