"""A SLURM of one node and two CPUs on this machine, from Debian's packages: munged, slurmctld and slurmd.

They run on loopback as the user who starts them, with files of their own in one folder, and end with the test.
`python tests/slurm_fixture.py` starts one to try things by hand, until Ctrl-C; `--gpus 2` gives it two
GPUs that are none.
"""

import argparse
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
PACKAGES = "munge slurmctld slurmd slurm-client"
# Debian puts the daemons where only root's PATH looks.
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/bin:/bin"
# What SLURM takes for GPUs: it asks no more of them than that they are devices.
DEVICES = ("/dev/null", "/dev/zero")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# A container has neither systemd nor its own cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The node has what is said here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=3600
{gres_types}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000 Feature=a100 {gres}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; its programs find it by the environment."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "SLURM_TIME_FORMAT": "%s",
            "PATH": f"{self.folder}:{PATH}",
        }

    def call(self, *command: str) -> str:
        """Run one of SLURM's programs and return what it printed."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """SLURM's record of every job: `scontrol show job`, times in seconds since 1970."""
        lines = self.call("scontrol", "show", "job", "--oneliner").splitlines()
        return [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in lines
            if line.startswith("JobId=")
        ]

    def job(self, number: str) -> dict[str, str]:
        [job] = [job for job in self.jobs() if job["JobId"] == number]
        return job


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    gone = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"{', '.join(gone)} not installed: apt-get install {PACKAGES}" if gone else ""


@contextmanager
def running_slurm(*, gpus: int = 0) -> Iterator[Slurm]:
    """Yield a SLURM that takes jobs, with `gpus` (up to two) GPUs that are none; nothing of it is left afterwards."""
    # Not pytest's folder: munge wants its socket where everybody may go, and a short path.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)
        slurm = Slurm(folder)
        _configure(folder, gpus)
        socket_file = folder / "munge.socket"
        munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed", "log")]
        daemons.enter_context(_daemon("munged", "--foreground", "--force", f"--socket={socket_file}", *munge))
        wait_until(socket_file.exists, "munged")
        for name in ("slurmctld", "slurmd"):
            daemons.enter_context(_daemon(name, "-D", env=slurm.environment, log=folder / f"{name}.out"))
        wait_until(lambda: _idle(slurm), f"SLURM: {folder}")
        try:
            yield slurm
        finally:
            # slurmd leaves its jobs alive when it ends.
            slurm.call("scancel", "--full", "--user", getpass.getuser())
            wait_until(lambda: not slurm.call("squeue", "--noheader"), "scancel")


def _configure(folder: Path, gpus: int) -> None:
    # Snakemake's executor takes SLURM_CONF from its jobs, as a real cluster's configuration is in /etc.
    srun = folder / "srun"
    srun.write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun", path=PATH)} "$@"\n'
    )
    srun.chmod(0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for made in ("state", "spool"):
        (folder / made).mkdir(mode=0o755)
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in DEVICES[:gpus]))
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname().split(".")[0],
            ports=ports,
            user=getpass.getuser(),
            folder=folder,
            gres_types="GresTypes=gpu" if gpus else "",
            gres=f"Gres=gpu:{gpus}" if gpus else "",
        )
    )


@contextmanager
def _daemon(*command: str, env: dict[str, str] | None = None, log: Path | None = None) -> Iterator[None]:
    with open(log or os.devnull, "w") as out:
        process = subprocess.Popen(
            # It ends with this process, however this one ends.
            ["setpriv", "--pdeathsig", "TERM", shutil.which(command[0], path=PATH), *command[1:]],
            env={"PATH": PATH, **(env or {})},
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the test, which then ends it in order
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(slurm: Slurm) -> bool:
    try:
        return slurm.call("sinfo", "--noheader", "--format=%t").strip() == "idle"
    except subprocess.CalledProcessError:  # slurmctld does not answer yet
        return False


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for a condition; raises TimeoutError, which says what was not ready."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not ready after {seconds:g} s")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gpus", type=int, default=0, choices=[0, 1, 2], help="GPUs of the node that are none (default 0)"
    )
    options = parser.parse_args()
    if missing():
        sys.exit(missing())
    with running_slurm(gpus=options.gpus) as slurm:
        print(f"export SLURM_CONF={slurm.folder}/slurm.conf PATH={slurm.folder}:$PATH", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
