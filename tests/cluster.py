"""A Slurm cluster of two nodes on this machine, in a directory of its own.

Its daemons, munged, slurmctld and two slurmd, run as whoever runs the tests, on ports that are
free, beside any other Slurm there may be.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
NODES = ("one", "two")
PLACES = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

CONFIG = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=2
SlurmdTimeout=8
KillWait=2
MinJobAge=300
JobRequeue=1
"""


def missing() -> str:
    """What of Slurm is not on this machine, in words; '' where nothing is."""
    lacking = [name for name in COMMANDS if shutil.which(name, path=PLACES) is None]
    return (f"{', '.join(lacking)} not found (Debian: apt-get install slurm-wlm munge)"
            if lacking else "")


class Cluster:
    """The daemons, to ``start`` and to ``stop``; ``environment`` leads commands to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PLACES}

    def start(self) -> None:
        controller, *ports = _free_ports(1 + len(NODES))
        text = CONFIG.format(host=socket.gethostname(), user=getpass.getuser(), folder=self.folder,
                             controller=controller)
        for node, port in zip(NODES, ports, strict=True):
            text += (f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
                     f"Port={port} CPUs=1 RealMemory=1000\n")
        text += f"PartitionName=toy Nodes={','.join(NODES)} Default=YES MaxTime=60 State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}"
                 for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                     *files)
        self._until((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"])

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"], name=node)

    def _daemon(self, command: str, *options: str, name: str = "") -> None:
        words = [shutil.which(command, path=PLACES) or command, *options]
        with (self.folder / f"{name or command}.out").open("wb") as out:
            self.daemons[name or command] = subprocess.Popen(
                words, env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True)

    def lose_node(self, node: str) -> None:
        """As if its power went: its daemon and every process of its jobs are killed at once."""
        for process in self._processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self, node: str) -> list[psutil.Process]:
        """The node's daemon, its jobs' managers, which leave its tree, and all their children."""
        log = str(self.folder / f"slurmd-{node}.log")  # which both hold open
        roots = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] in ("slurmd", "slurmstepd"):
                with suppress(psutil.Error):
                    logs = [file.path for file in process.open_files()]
                    roots += [process] if log in logs else []
        for root in list(roots):
            with suppress(psutil.NoSuchProcess):
                roots += root.children(recursive=True)
        return roots

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True,
                              text=True, check=False)
        return done.stdout

    def hurry(self) -> bool:
        """Slurm lets jobs of a lost node wait for two minutes; let them begin. Were there any?"""
        held = self.ask("squeue", "--array", "--noheader", "--states=PENDING", "--format=%i %r")
        jobs = [line.split()[0] for line in held.splitlines() if line.endswith("BeginTime")]
        for job in jobs:
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        return bool(jobs)

    def stop(self) -> None:
        """Stop every daemon and what is left of its jobs."""
        self.ask("scancel", f"--user={os.getuid()}")
        for node in NODES:
            self.lose_node(node)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _until(self, true: object, patience: float = 30) -> None:
        assert callable(true)
        end = time.monotonic() + patience
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                                 for path in sorted(self.folder.glob("*.[lo][ou][gt]")))
                raise RuntimeError(f"Slurm did not come up:\n{logs}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
