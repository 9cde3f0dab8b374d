"""A real SLURM of two nodes on one machine, started as root in a folder of its own: munged, slurmctld, slurmds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATIENCE = 300.0  # seconds for the nodes to come up; on a free machine they take five

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=10
MessageTimeout=90
TCPTimeout=60
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=128 RealMemory=1048576 Gres=gpu:8 State=UNKNOWN
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first}
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={other}
PartitionName=all Nodes={host},{second} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no cluster can be started here; empty when one can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing; Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a SLURM of one's own is started as root"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs; its commands find it by `environment`."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str | Path, **more: str) -> str:
        """Run a command in the environment of the cluster; returns what it printed."""
        result = subprocess.run(
            [str(part) for part in command], env={**self.environment, **more}, cwd=self.folder,
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}: {result.stderr}\n{self.logs()}"
        return result.stdout

    def states(self) -> dict[str, str]:
        """State of every job and array task that the controller remembers."""
        lines = self.call("squeue", "--all", "--states=all", "--array", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def logs(self) -> str:
        """What daemons and jobs have said."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("slurm-*.out")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(paths))


@contextmanager
def cluster(folder: Path, programs: Path, **more: str) -> Iterator[Cluster]:
    """Start the daemons, and end them with all jobs when the block is left. Jobs find `programs` first in PATH, and
    `more` in their environment."""
    controller, first, other = (free_port() for _ in range(3))
    host = socket.gethostname().partition(".")[0]
    second = f"{host}-b"  # the first one must have a name that can be looked up: ranks meet there
    for name in ("state", f"spool-{host}", f"spool-{second}"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    names = {"host": host, "second": second, "controller": controller, "first": first, "other": other}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, **names))
    for number in range(8):  # devices that exist, as far as a count of them is asked
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{programs}:{_path()}", **more}
    munged = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []
    made = Cluster(folder, environment)
    try:
        nodes = [["slurmd", "-D", "-N", name] for name in (host, second)]
        for number, command in enumerate((munged, ["slurmctld", "-D", "-i"], *nodes)):
            with (folder / f"{command[0]}-{number}.out.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
            if command is munged:
                _wait(lambda: (folder / "munge.sock").exists(), made)
        _wait(lambda: _quiet(made, "sinfo", "-N", "--noheader", "--format=%t").split() == ["idle"] * 2, made)
        yield made
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            made.call("scancel", "--full", "--signal=KILL", "--user=root")
            made.call("scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _quiet(made: Cluster, *command: str) -> str:
    result = subprocess.run(command, env=made.environment, capture_output=True, text=True, check=False, timeout=300)
    return result.stdout


def _wait(ready, made: Cluster) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, made.logs()
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
