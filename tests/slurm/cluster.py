"""A throw-away SLURM of two nodes on this machine, for tests and for trying things out; needs root.

    apt-get install -y slurm-wlm munge iproute2
    python -m tests.slurm.cluster start DIR      # prints: export SLURM_CONF=DIR/slurm.conf
    python -m tests.slurm.cluster stop DIR       # prints what has ended, jobs included

Each node is in a network namespace of its own, with a name and an address of its own (`tests.slurm.network`): ranks of
two nodes talk as they would between two machines. Partition `main` is preempted by partition `urgent`, with some
seconds of grace.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm import daemons, network
from tests.slurm.daemons import Process
from tests.slurm.network import Network

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n1", "n2")
NETWORK, CONF = "network", "slurm.conf"

CONFIG = """
ClusterName=trivit
SlurmctldHost={host}({address})
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
KillWait=20
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """What keeps a cluster from starting here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None] + (["root"] if os.geteuid() else [])
    return lacking or network.missing()


def start(folder: Path) -> Path:
    """Start everything, or nothing; returns slurm.conf, whose path belongs into SLURM_CONF."""
    (folder / "state").mkdir(parents=True)  # FileExistsError where there is one already, which goes on
    try:
        return _start(folder)
    except BaseException:
        stop(folder)
        raise


def _start(folder: Path) -> Path:
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    munge = ["--foreground", "--force", "--key-file", key, "--socket", folder / "munge.socket"]
    munge += [f"--{file}-file={folder}/munged.{file}" for file in ("log", "pid", "seed")]
    daemons.start(folder, "munged", [_found("munged"), *munge])
    net = Network.drawn()
    (folder / NETWORK).write_text(f"{net.tag} {net.subnet}")
    net.start(len(NODES))
    addresses = [net.address(i) for i, _ in enumerate(NODES, start=1)]
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, addresses, NODES)))
    host, ports = socket.gethostname().split(".")[0], _free_ports(len(NODES) + 1)
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for name, address, port in zip(NODES, addresses, ports[1:], strict=True)
    ]
    config = folder / CONF
    config.write_text(
        CONFIG.format(folder=folder, host=host, address=net.host, controller=ports[0], nodes="\n".join(nodes))
    )
    until = time.monotonic() + 60
    while not (folder / "munge.socket").exists() and time.monotonic() < until:
        time.sleep(0.1)
    daemons.start(folder, "slurmctld", [_found("slurmctld"), "-D", "-i", "-f", config])
    for i, name in enumerate(NODES, start=1):
        (folder / name).mkdir()
        _start_node(folder, i)
    while time.monotonic() < until:
        idle = subprocess.run(
            ["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"], env=os.environ | {"SLURM_CONF": str(config)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if idle.stdout.strip() == str(len(NODES)):
            return config
        time.sleep(0.3)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"no SLURM within a minute:\n{logs}")


def _start_node(folder: Path, node: int) -> None:
    name = NODES[node - 1]
    command = [_found("slurmd"), "-D", "-f", folder / CONF, "-N", name]
    daemons.start(folder, f"slurmd-{name}", network_of(folder).inside(node, folder / "hosts", command))


def lose(folder: Path, node: int) -> list[str]:
    """A node, counted from 1, is without power: nobody hears of it any more, and all that it ran is gone.

    Returns:
        The names of what ran there.
    """
    net = network_of(folder)
    net.plug(node, False)  # first, or the others would be told that a connection ends
    lost = []
    while found := list(filter(None, map(Process.of, net.pids(node)))):
        lost += [process.name for process in found]
        for process in found:
            process.send(signal.SIGKILL)
    return lost


def bring_back(folder: Path, node: int) -> None:
    """A node that was lost is switched on again."""
    network_of(folder).plug(node, True)
    _start_node(folder, node)


def stop(folder: Path, patience: float = 15) -> list[str]:
    """End what was started in this folder and whatever else runs on its nodes; returns what that was, in words.

    Processes get `patience` seconds to end by themselves. RuntimeError when one cannot be ended.
    """
    ended = daemons.end(daemons.started(folder), patience)
    if not (folder / NETWORK).exists():
        return ended
    net = network_of(folder)
    nodes = range(1, len(NODES) + 1)
    while found := list(filter(None, map(Process.of, (pid for node in nodes for pid in net.pids(node))))):
        ended += daemons.end(found, patience)  # of jobs, and a slurmd that nobody knows of
    net.stop(len(NODES))
    return ended


def network_of(folder: Path) -> Network:
    """Between the nodes of the cluster in this folder."""
    return Network(*(folder / NETWORK).read_text().split())


def _found(program: str) -> str:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or program


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(__doc__)
    if lacking := missing():
        sys.exit(f"a SLURM cluster needs {', '.join(lacking)} (apt-get install slurm-wlm munge iproute2, as root)")
    if sys.argv[1] == "start":
        if (Path(sys.argv[2]) / "state").exists():
            sys.exit(f"{sys.argv[2]} has a cluster: stop it and take another folder")
        print(f"export SLURM_CONF={start(Path(sys.argv[2]).resolve())}")
    else:
        ended = stop(Path(sys.argv[2]).resolve())
        print("\n".join(f"ended {each}" for each in ended) or f"nothing of {sys.argv[2]} was running")
