"""Two ranks that run several commands one after the other, so that torch is imported once and not once a command."""

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
    commands: Sequence[Sequence[object]], folder: Path, before: str = "", seconds: float = 280
) -> None:
    """`trivit pretrain ...` for each of the commands, as torchrun would start it; all must end well.

    `before`: Python to run first.
    """
    listed = folder / "commands.json"
    listed.write_text(json.dumps([[*map(str, command), "--trainer.devices", "2"] for command in commands]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    ranks = [start([listed, before], ("-c", PROGRAM), RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]
    ended = [end(rank, seconds) for rank in ranks]
    assert [code for code, _ in ended] == [0, 0], "\n".join(error[-3000:] for _, error in ended)
