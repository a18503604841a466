"""Runs on the machines of a Ray cluster, one a GPU (or one a machine without). All of them must see this directory and have tunesmith.

Ray only carries the word: each run is the same process that the local executor starts, and all it makes goes to the shared
directory. A run whose machine is lost goes on elsewhere from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.study.executors import Ended, Job, launch, slot_environment

LOOK_EVERY = 2.0  # seconds between two looks at which machines there are
LOSSES = 3  # machines that a run may lose
POLL = 0.05


def carry_out(job: Job) -> int:
    """On a machine of the cluster: run a job's process to its end and return its exit code.

    Wishes to stop come through the shared directory, as the length of a file: the first asks the process to stop, a second
    ends it. Ray's own cancellation is an exception in the middle of the code that runs, and was once lost.
    """
    if wishes(job):
        return -signal.SIGTERM
    process, heard = launch(job), 0
    while (code := process.poll()) is None:
        if (asked := wishes(job)) > heard:
            process.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)
            heard = asked
        time.sleep(POLL)
    return code


def wish_file(job: Job) -> Path:
    """Where a job is asked to stop; not there before the first time."""
    return Path(f"{job.log}.stop")


def wishes(job: Job) -> int:
    """How often a job was asked to stop."""
    try:
        return wish_file(job).stat().st_size
    except FileNotFoundError:
        return 0


def _answers(address: str) -> None:
    """Raises: ConnectionError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error.strerror or error})") from None


class OnRay:
    """An executor over a Ray cluster that runs already."""

    def __init__(self, jobs: int | None, address: str | None) -> None:
        """jobs: runs at a time on each machine; default one a GPU, without GPUs one. Raises: UserError if there is no cluster."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray: Ray is not installed; pip install 'tunesmith[ray]'") from None
        self.ray: Any = ray
        try:
            _answers(address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"--executor ray: {reason}. Start a cluster with `ray start --head`, or name one with --ray_address"
            ) from None
        self.jobs = jobs
        self._task = ray.remote(max_retries=0, num_cpus=0)(carry_out)
        self._running: dict[Any, tuple[Job, str]] = {}  # reference -> job, machine
        self._losses: Counter[str] = Counter()
        self._looked = 0.0
        self._look()

    def _look(self) -> None:
        """Which machines there are: id -> (name, slots, GPUs)."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        self.machines: dict[str, tuple[str, int, float]] = {}
        for node in self.ray.nodes():
            if node["Alive"]:
                gpus = float(node["Resources"].get("GPU", 0))
                self.machines[node["NodeID"]] = (node["NodeManagerHostname"], self.jobs or max(1, int(gpus)), gpus)

    @property
    def slots(self) -> int:
        """Runs that fit on all machines together."""
        return max(1, sum(slots for _, slots, _ in self.machines.values()))

    def _room(self) -> dict[str, int]:
        used = Counter(machine for _, machine in self._running.values())
        return {id: slots - used[id] for id, (_, slots, _) in self.machines.items() if slots > used[id]}

    def free(self) -> bool:
        """Whether one more can be started."""
        self._look()
        return bool(self._room())

    def start(self, job: Job) -> str:
        """Start a job on the machine with the most room; returns the machine's name."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        room = self._room()
        id = max(room, key=lambda machine: room[machine])
        name, slots, gpus = self.machines[id]
        environment = {**({} if gpus else slot_environment(slots, (), 0)), **job.environment}
        where = NodeAffinitySchedulingStrategy(id, soft=False)
        task = self._task.options(scheduling_strategy=where, num_gpus=min(1.0, gpus / slots))
        sent = Job(job.name, job.argv, os.path.abspath(job.log), environment, job.directory)
        wish_file(sent).unlink(missing_ok=True)  # of a study that was cut off
        self._running[task.remote(sent)] = (sent, id)
        return f"{name} ({id[:6]})"

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call, among them those whose machine was lost."""
        if not self._running:
            return []
        done, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._settle(ref) for ref in done]

    def _settle(self, ref: Any) -> Ended:
        job, id = self._running.pop(ref)
        name, machine = job.name, self.machines.get(id, ("a machine", 0, 0.0))[0]
        wish_file(job).unlink(missing_ok=True)
        errors = self.ray.exceptions
        try:
            return Ended(name, self.ray.get(ref))
        except errors.RayTaskError as error:
            return Ended(name, 1, " ".join(str(error.cause).split()))
        except errors.RayError as error:
            self._losses[name] += 1
            self._looked = 0.0
            why = f"{machine} was lost ({type(error).__name__})"
            return Ended(name, 1, why, again=self._losses[name] <= LOSSES)

    def stop(self) -> None:
        """Ask all to stop with a checkpoint; a second call ends them."""
        for job, _ in self._running.values():
            with wish_file(job).open("ab") as file:
                file.write(b".")

    def close(self) -> None:
        """End all that still runs and leave the cluster."""
        self.stop()
        self.ray.shutdown()
