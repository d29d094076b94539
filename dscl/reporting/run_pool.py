"""The `dscl train` processes of a comparison: several in parallel, each with its share of the machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dscl.distributed.launcher import count_cores, count_gpus, subprocess_environment
from dscl.monitoring.score_board import ScoreBoard
from dscl.reporting.scores import DamagedFileError, read_scores
from dscl.utils.errors import UserError
from dscl.utils.formatting import format_duration


@dataclass(frozen=True)
class PlannedRun:
    """One `dscl train` process of a comparison."""

    row: str
    learning_rate: float
    seed: int
    split: str  # "dev" in the search for a learning rate, else "test"
    folder: Path
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row}: {'dev' if self.split == 'dev' else f'seed {self.seed}'}, rate {self.learning_rate:g}"

    def read_scores(self) -> ScoreBoard | None:
        """The run's scores; None while the run is not complete."""
        try:
            scores = read_scores(self.folder / "scores.json")
        except DamagedFileError:  # the run itself writes it again
            return None
        return scores if scores is not None and scores.is_complete else None


class RunPool:
    """Runs several `dscl train` processes in parallel and prints the progress of the comparison."""

    def __init__(self, shares: Sequence[Mapping[str, str]], nproc: int, total_runs: int) -> None:
        """`shares`: for each parallel process, its environment variables (see `machine_shares`)."""
        self.failures: list[dict[str, Any]] = []  # records of failed runs, as in comparison.json
        self._free_shares, self._nproc, self._total_runs = list(shares), nproc, total_runs
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._num_done, self._stopped, self._num_parallel = 0, False, len(shares)
        self._seconds: list[float] = []  # the duration of each run

    def complete_run(self, run: PlannedRun) -> tuple[PlannedRun, ScoreBoard | None]:
        """Train a run unless it is complete. Return the run with its scores, or with None if it failed."""
        scores = run.read_scores()
        if scores is None and not self._stopped:
            start = time.monotonic()
            self._train_run(run)
            self._seconds.append(time.monotonic() - start)
            scores = run.read_scores()
        with self._lock:
            self._num_done += 1
            remaining_runs = self._total_runs - self._num_done
            remaining = remaining_runs * sum(self._seconds) / max(1, len(self._seconds)) / self._num_parallel
            estimate = f", about {format_duration(remaining)} left" if self._seconds and remaining_runs > 0 else ""
            outcome = f"OP {scores.summary['OP']:.3f}" if scores else "failed"
            print(f"{self._num_done} of {self._total_runs} runs: {run.name}: {outcome}{estimate}", flush=True)
        return run, scores

    def _train_run(self, run: PlannedRun) -> None:
        """Run `dscl train` in a process and wait for its end. A failure is recorded in `failures`."""
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe_path, log = (run.folder.parent / f"{run.folder.name}.{suffix}" for suffix in ("yaml", "log"))
        recipe_path.write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True), "utf-8")
        with self._lock:
            share = self._free_shares.pop()
        command = [sys.executable, "-m", "dscl", "train", str(recipe_path), "--nproc", str(self._nproc)]
        try:
            with open(log, "wb") as file:
                environment = {**subprocess_environment(), **share}
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
                self._processes.add(process)
                status = process.wait()
                self._processes.discard(process)
        finally:
            with self._lock:
                self._free_shares.append(share)
        if status and run.read_scores() is None:  # a run with complete scores counts even if its process failed later
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            message = lines[-1].strip() if lines else f"status {status}"
            failure = {"row": run.row, "run": run.name, "status": status, "message": message, "log": str(log)}
            with self._lock:
                self.failures.append(failure)

    def stop(self) -> None:
        """Terminate all processes when the comparison ends early. Running it again resumes them."""
        self._stopped = True
        for process in list(self._processes):
            with contextlib.suppress(OSError):
                process.terminate()


def machine_shares(max_parallel: int | None, nproc: int) -> list[dict[str, str]]:
    """Divide the machine's cores and GPUs among the parallel runs, as environment variables of each run."""
    num_gpus = count_gpus()
    capacity = max(1, (num_gpus or count_cores()) // nproc)
    num_parallel = capacity if max_parallel is None else max_parallel
    if num_gpus and num_parallel > capacity:
        raise UserError(
            f"--max-parallel: given {num_parallel}; {num_gpus} GPUs serve {capacity} runs of {nproc} ranks, so at most "
            f"{capacity}"
        )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // (num_parallel * nproc)))
    shares = [{"OMP_NUM_THREADS": threads} for _ in range(num_parallel)]
    visible_gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))).split(",")
    for i, share in enumerate(shares):
        if num_gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus[i * nproc : (i + 1) * nproc])
    return shares
