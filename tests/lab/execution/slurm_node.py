"""One machine as a Slurm cluster, started by hand: munged, slurmctld, slurmd; no systemd.

On Debian or Ubuntu: `apt-get install slurmctld slurmd slurm-client munge`, then, as root:
`python -m pytest -m slow tests/lab/execution/test_slurm_itself.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
START_SECONDS = 30.0
PATHS = "/usr/sbin:/usr/local/sbin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
MaxArraySize={max_array_size}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm_node(*, max_array_size: int = 1001) -> Iterator[Path]:
    """A Slurm cluster of this machine while the block lasts; its commands find it.

    Yields:
        The folder with its configuration and logs.
    """
    before = {name: os.environ.get(name) for name in ("PATH", "SLURM_CONF")}
    os.environ["PATH"] = f"{before['PATH']}:{PATHS}"
    try:
        with ExitStack() as stack:
            yield _started(stack, max_array_size)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _started(stack: ExitStack, max_array_size: int) -> Path:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: see tests/lab/execution/slurm_node.py")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as their users, so it must be root")
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
    root.chmod(0o755)  # munged wants its socket within reach of all
    for name in ("munge", "state", "spool"):
        (root / name).mkdir(mode=0o755)
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    # A node has no more processors than the machine, and slurmd finds these itself.
    Path(os.environ["SLURM_CONF"]).write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            root=root,
            ports=_free_ports(),
            cpus=os.cpu_count(),
            max_array_size=max_array_size,
        )
    )
    munge = [f"--{name}={root}/munge/{name}" for name in ("socket", "pid-file", "log-file")]
    files = [f"--seed-file={root}/munge/seed", f"--key-file={key}"]
    stack.enter_context(_daemon(root, "munged", "-F", *munge, *files))
    _wait_until((root / "munge" / "socket").exists, root)
    for name in ("slurmctld", "slurmd"):
        stack.enter_context(_daemon(root, name, "-D"))
    _wait_until(lambda: "idle" in _said("sinfo", "-h", "-o", "%t"), root)
    # Jobs that are left would be ended with the daemon otherwise, some time.
    stack.callback(_end_jobs)
    return root


@contextmanager
def _daemon(root: Path, *command: str) -> Iterator[None]:
    with (root / f"{command[0]}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_jobs() -> None:
    user = _said("id", "-un").strip()
    subprocess.run(["scancel", "--signal=KILL", "--full", f"--user={user}"], check=False)
    subprocess.run(["scancel", f"--user={user}"], check=False)
    until = time.monotonic() + START_SECONDS
    while _said("squeue", "-h") and time.monotonic() < until:
        time.sleep(0.2)


def _wait_until(is_true: Callable[[], bool], root: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while not is_true():
        if time.monotonic() > until:
            logs = [f"{file.name}:\n{file.read_text()}" for file in root.glob("*.log")]
            raise TimeoutError("Slurm did not start\n" + "\n".join(logs))
        time.sleep(0.2)


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
