"""A real Slurm with accounting on this machine: two nodes of eight GPUs (links to /dev/null), for tests; partition `steady` is n1 only."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

BINARIES = ("munged", "mariadbd", "mariadb-install-db", "mariadb-admin", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing() -> list[str]:
    return [name for name in BINARIES if shutil.which(name, path=SEARCH_PATH) is None]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class SlurmCluster:
    def __enter__(self) -> "SlurmCluster":
        # Short path: a unix socket's path has at most 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="qs", dir="/tmp"))
        try:
            self._boot()
        except BaseException as error:
            logs = self._log_ends()
            self.stop()
            raise RuntimeError(f"Slurm did not boot: {error}\n{logs}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, *argv: str, timeout_s: float = 20) -> str:
        """Standard output of a client; RuntimeError with its stderr if it fails."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=timeout_s, cwd=self.root)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job_states(self, ids: list[str]) -> dict[str, str]:
        out = self.run("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(ids))
        return {line.split("|")[0]: line.split("|")[1].split()[0] for line in out.splitlines()}

    def wait(self, ids: list[str], timeout_s: float = 30) -> dict[str, str]:
        """States once every job has ended."""
        live = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "SUSPENDED", "RESIZING"}

        def ended() -> bool:
            states = self.job_states(ids)
            return len(states) == len(ids) and not live & set(states.values())

        self.until(ended, timeout_s, f"jobs {ids} to end")
        return self.job_states(ids)

    def restart_controller(self) -> None:
        self._stop_daemon("slurmctld")
        self._start("slurmctld", "-f", str(self.root / "slurm.conf"))
        self.until(self._answers, 20, "slurmctld to answer")

    def node_down(self, name: str) -> None:
        """As a dead node: its slurmd and the steps die, and the controller is told."""
        self._stop_daemon(f"slurmd-{name}", now=True)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")
        self._kill_steps(name)  # only now: a dying step would report FAILED

    def node_up(self, name: str) -> None:
        self._start("slurmd", "-N", name, "-f", str(self.root / "slurm.conf"))
        self.resume(name)

    def resume(self, name: str) -> None:
        """Take a node back; Slurm may have done so by itself when its slurmd spoke up (ReturnToService), and refuses it then."""

        def back() -> bool:
            if "DOWN" in self.run("scontrol", "show", "node", name):
                with contextlib.suppress(RuntimeError):
                    self.run("scontrol", "update", f"nodename={name}", "state=resume")
                return False
            return True

        self.until(back, 30, f"node {name} to return")

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    def stop(self) -> None:
        if (self.root / "slurm.conf").exists():
            with contextlib.suppress(Exception):
                self.run("scancel", "--user", getpass.getuser(), timeout_s=5)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop_daemon(name)
        for node in ("n1", "n2"):
            self._kill_steps(node)
        shutil.rmtree(self.root, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            return "UP" in self.run("scontrol", "ping", timeout_s=5)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False

    def until(self, ready, timeout_s: float, what: str) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s} s for {what}")
            time.sleep(0.2)

    def _start(self, *argv: str, **env: str) -> None:
        log = self.root / "log" / f"{argv[0]}-start.log"
        with log.open("a") as sink:
            subprocess.run(argv, env={**self.env, **env}, stdout=sink, stderr=sink, timeout=30, check=True)

    def _stop_daemon(self, name: str, now: bool = False) -> None:
        """TERM, then KILL, only while the pid of our pid file is still that daemon."""
        try:
            pid = int((self.root / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return
        daemon = name.split("-")[0]

        def alive() -> bool:
            try:
                return daemon.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return False

        for sent in (signal.SIGKILL,) if now else (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 8
            if alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
            while alive() and time.monotonic() < end:
                time.sleep(0.05)

    def _kill_steps(self, node: str) -> None:
        """Kill the processes whose environment names this cluster's configuration and this node."""
        ours = {f"SLURM_CONF={self.root}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if ours <= set((entry / "environ").read_bytes().split(b"\0")):
                    os.kill(int(entry.name), signal.SIGKILL)

    def _log_ends(self) -> str:
        logs = sorted((self.root / "log").glob("*.log")) if self.root.exists() else []
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:]) for log in logs)

    def _boot(self) -> None:
        r, user, host = self.root, getpass.getuser(), socket.gethostname().split(".")[0]
        ctld, dbd, d1, d2 = free_ports(4)
        r.chmod(0o755)
        for name in ("state", "log", "spool-n1", "spool-n2", "munge", "msock", "dev"):
            (r / name).mkdir()
        (r / "munge").chmod(0o700)
        (r / "munge/key").write_bytes(os.urandom(1024))
        (r / "munge/key").chmod(0o400)
        munge = f"{r}/msock/s"
        gres = []
        for node in ("n1", "n2"):
            for gpu in range(8):
                (r / f"dev/{node}-gpu{gpu}").symlink_to("/dev/null")
            gres.append(f"NodeName={node} Name=gpu File={r}/dev/{node}-gpu[0-7]\n")
        (r / "gres.conf").write_text("".join(gres))
        (r / "cgroup.conf").write_text("CgroupAutomount=no\n")
        options = f"""ClusterName=ci SlurmctldHost={host}(127.0.0.1) SlurmctldPort={ctld} SlurmUser={user} SlurmdUser={user}
AuthType=auth/munge CredType=cred/munge AuthInfo=socket={munge},cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny StateSaveLocation={r}/state SlurmdSpoolDir={r}/spool-%n
SlurmctldPidFile={r}/slurmctld.pid SlurmdPidFile={r}/slurmd-%n.pid SlurmctldLogFile={r}/log/slurmctld.log
SlurmdLogFile={r}/log/slurmd-%n.log ProctrackType=proctrack/linuxproc TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none SwitchType=switch/none MpiDefault=none SelectType=select/cons_tres
SelectTypeParameters=CR_CPU SchedulerType=sched/backfill SlurmdParameters=config_overrides GresTypes=gpu
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_resolution=1
ReturnToService=2 JobRequeue=1 KillWait=5 OverTimeLimit=0 MinJobAge=3600 InactiveLimit=0 PropagateResourceLimits=NONE
MailProg=/bin/true AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd} AccountingStoragePass={munge} AccountingStorageTRES=gres/gpu"""
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 Gres=gpu:8"
        # The lighter node is taken first: what runs in `batch` begins on n2, so that a drill may take it down while n1 serves others.
        lines = [*options.split(), f"NodeName=n1 Port={d1} Weight=2 {node}", f"NodeName=n2 Port={d2} Weight=1 {node}"]
        lines.append("PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=60 DefaultTime=5 OverSubscribe=FORCE:4")
        lines.append("PartitionName=steady Nodes=n1 MaxTime=60 DefaultTime=5 OverSubscribe=FORCE:4")
        (r / "slurm.conf").write_text("\n".join(lines) + "\n")
        dbd_options = f"""AuthType=auth/munge AuthInfo=socket={munge} DbdHost=localhost DbdAddr=127.0.0.1 DbdPort={dbd}
CommunicationParameters=NoInAddrAny SlurmUser={user} PidFile={r}/slurmdbd.pid LogFile={r}/log/slurmdbd.log
StorageType=accounting_storage/mysql StorageHost=localhost StorageUser=root StorageLoc=slurm"""
        (r / "slurmdbd.conf").write_text("\n".join(dbd_options.split()) + "\n")
        (r / "slurmdbd.conf").chmod(0o600)
        m = f"{r}/munge"
        self._start("munged", f"--key-file={m}/key", f"--socket={munge}", f"--pid-file={r}/munged.pid",
                    f"--seed-file={m}/seed", f"--log-file={m}/log")  # fmt: skip
        self._start("mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={r}/db",
                    "--auth-root-authentication-method=normal", "--skip-test-db")  # fmt: skip
        with (r / "log/db.log").open("w") as sink:
            self._db = subprocess.Popen(
                ["mariadbd", "--no-defaults", f"--user={user}", f"--datadir={r}/db", f"--socket={r}/db.sock",
                 f"--pid-file={r}/mariadbd.pid", "--skip-networking", "--innodb-flush-log-at-trx-commit=0"],
                env=self.env, stdout=sink, stderr=sink, start_new_session=True)  # fmt: skip
        (r / "mariadbd.pid").write_text(str(self._db.pid))
        ping = ["mariadb-admin", "--no-defaults", "-uroot", "-S", f"{r}/db.sock", "ping"]
        self.until(lambda: not subprocess.run(ping, capture_output=True, timeout=5).returncode, 20, "MariaDB")
        self._start("slurmdbd", MYSQL_UNIX_PORT=f"{r}/db.sock", SLURM_CONF=f"{r}/slurmdbd.conf")

        def dbd_listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", dbd)) == 0

        self.until(dbd_listens, 30, "slurmdbd")
        self._start("slurmctld", "-c", "-f", f"{r}/slurm.conf")
        for name in ("n1", "n2"):
            self._start("slurmd", "-N", name, "-f", f"{r}/slurm.conf")
        self.until(self._answers, 20, "slurmctld to answer")
        self.until(lambda: len(set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == 2, 30, "idle nodes")
