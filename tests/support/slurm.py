"""A private Slurm on this machine: controller, node daemon and munge, with all their files in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.support.hosts import Unavailable, environment_without_ranks

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
# A requeued job waits until its credential has expired (cred_expire; two minutes by default, at least 5 s) and for the
# next cycle of the scheduler (sched_interval; one minute by default). JobRequeue=0: a job is requeued only if its own
# script requests it.
CONFIGURATION = """
ClusterName=dscl
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
KillWait=60
JobRequeue=0
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE State=UP
"""


class Slurm:
    def __init__(self, folder: Path) -> None:
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise Unavailable(f"no {', '.join(missing)}; install Debian's packages slurm-wlm and munge")
        if os.geteuid() != 0:
            raise Unavailable("Slurm's daemons need root here")
        self.folder = folder
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o700, parents=True)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        for parent in (folder, *folder.parents):  # munged requires that all users may traverse the path to its socket
            if parent.stat().st_uid == os.geteuid():
                parent.chmod(parent.stat().st_mode | 0o111)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                folder=folder,
                controller=_free_port(),
                node=_free_port(),
                cores=os.cpu_count(),
            )
        )
        self.environment = {
            **environment_without_ranks(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        munge = {name: f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")}
        self._daemons = [
            self._daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge.values()),
            self._daemon("slurmctld", "-D"),
            self._daemon("slurmd", "-D"),
        ]
        deadline = time.monotonic() + 60
        while "idle" not in self.run_command("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
                self.close()
                raise Unavailable(f"Slurm does not come up here: {logs}")
            time.sleep(0.1)

    def run_command(self, *words: str) -> str:
        """The stdout and stderr of a Slurm command."""
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    def job_state(self, job: str) -> str:
        return self.run_command("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def close(self) -> None:
        self.run_command("scancel", "--user", "root", "--signal", "KILL")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "w") as log:
            return subprocess.Popen([name, *words], env=self.environment, stdout=log, stderr=log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
