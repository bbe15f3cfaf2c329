"""A network of its own for each node of the throw-away cluster: a namespace with one address, joined by a bridge.

Between two such nodes nothing reaches `localhost`, so what talks to the other one has found its address. Needs root
with CAP_NET_ADMIN and the commands `ip`, `nsenter` and `unshare`.
"""

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare")


@dataclass(frozen=True)
class Network:
    """Nodes n1, n2, ... at `subnet`.11, .12, ...; this machine itself is at .1. `tag` is in the names of its parts."""

    tag: str
    subnet: str

    @classmethod
    def drawn(cls) -> "Network":
        """One that most likely nobody else has."""
        return cls(secrets.token_hex(3), f"10.77.{secrets.randbelow(250)}")

    @property
    def host(self) -> str:
        """The address of this machine."""
        return f"{self.subnet}.1"

    def address(self, node: int) -> str:
        """Of a node, counted from 1."""
        return f"{self.subnet}.{10 + node}"

    def start(self, nodes: int) -> None:
        """Makes all of it, or nothing; subprocess.CalledProcessError when something cannot be made."""
        bridge = f"br{self.tag}"
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{self.host}/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for node in range(1, nodes + 1):
                space, cable = self._space(node), f"v{self.tag}{node}"
                _ip("netns", "add", space)
                _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", cable, "master", bridge, "up")
                _ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "route", "add", "default", "via", self.host)
        except BaseException:
            self.stop(nodes)
            raise

    def stop(self, nodes: int) -> None:
        """Takes away what is there."""
        for node in range(1, nodes + 1):
            for command in (("link", "del", f"v{self.tag}{node}"), ("netns", "del", self._space(node))):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip(*command)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", f"br{self.tag}")

    def inside(self, node: int, hosts: Path, command: Sequence[object]) -> list[str]:
        """The command as it is run on a node: its network, its name, and names of all nodes from the file `hosts`."""
        private = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        space = ["nsenter", f"--net=/run/netns/{self._space(node)}", "unshare", "--mount", "--uts", "sh", "-c", private]
        return [*space, "sh", str(hosts), f"n{node}", *map(str, command)]

    def pids(self, node: int) -> list[int]:
        """Processes that run on a node, whoever has started them."""
        found = subprocess.run(["ip", "netns", "pids", self._space(node)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def plug(self, node: int, connected: bool) -> None:
        """Nothing comes to a node or leaves it while it is not connected."""
        _ip("link", "set", f"v{self.tag}{node}", "up" if connected else "down")

    def received(self, node: int) -> int:
        """Bytes that have come to a node from others."""
        return int(Path(f"/sys/class/net/v{self.tag}{node}/statistics/tx_bytes").read_text())

    def _space(self, node: int) -> str:
        return f"trivit{self.tag}n{node}"


def missing() -> list[str]:
    """What keeps such a network from being made here."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return lacking
    trial = Network.drawn()
    try:
        trial.start(1)
    except subprocess.CalledProcessError:
        return ["CAP_NET_ADMIN"]
    trial.stop(1)
    return []


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
