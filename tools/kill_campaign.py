"""Kill ranks at random moments, resume the run, and check that nothing is lost.

    python tools/kill_campaign.py --kills 50

Every run is one method at one ZeRO stage on two ranks, on small random tasks. SIGKILL ends a rank at one of the moments
below, some of which leave a file half written. The run is started again, killed again, and at last runs to its end.
All results (each step's metrics, the scores, the bytes of the last checkpoint) must then equal those of an undisturbed
run. After each kill, the newest checkpoint of before must still be there, whole, or a newer one. The table goes to
stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml

KILL_VARIABLE, NOTE_VARIABLE = (
    "DSCL_CAMPAIGN_KILL",
    "DSCL_CAMPAIGN_NOTE",
)  # `rank:moment:count`; the file in which the dying rank names its place
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "joint": {},
    "replay": {},
    "agem": {},
    "ewc": {"constraint": {"fisher_samples": 16}},
    "lwf": {},
    "olora": {"tune": {"rank": 4}},
    "lora_per_task": {"tune": {"rank": 4}},
    "asr": {"tune": {"rank": 4}, "router": {"layer": 1, "num_features": 128}},
    "osft": {},
    "moses": {"tune": {"num_experts": 4, "top_k": 2, "rank": 2}, "router": {"num_features": 128}},
}
# The kill strikes at a random call up to this number. Rare moments have small numbers.
MOMENTS = {
    "data preparation, half written": 2,
    "forward": 40,
    "backward": 20,
    "optimizer": 18,
    "beginning a task": 2,
    "ending a task": 2,
    "evaluation": 6,
    "writing tensors, half done": 12,
    "writing other files of a checkpoint, half done": 8,
    "writing scores and settings, half done": 6,
    "giving a file its name": 12,
    "removing an old checkpoint, half done": 3,
    "writing metrics, half a line": 8,
}
# Beginnings of the moments that only the main rank has.
MAIN_RANK_MOMENTS = ("writing other", "writing scores", "giving", "removing", "writing metrics")
FILES_BEFORE_RESUME = ("recipe.yaml", "base.json", "a cache")  # written before a run looks for a checkpoint


def die(place: str) -> NoReturn:
    Path(os.environ[NOTE_VARIABLE]).write_text(place)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def arm_kill(moment: str, count: int) -> None:
    """Let this process die in the n-th call of the moment's function."""
    calls = [0]

    def is_due() -> bool:
        calls[0] += 1
        return calls[0] == count

    def die_in_call(
        owner: Any, name: str, die_here: Callable[..., None], applies: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        """In the due call, `die_here` runs before the function."""
        original = getattr(owner, name)

        def dying(*arguments: Any, **keywords: Any) -> Any:
            if applies(*arguments, **keywords) and is_due():
                die_here(*arguments, **keywords)
            return original(*arguments, **keywords)

        setattr(owner, name, dying)

    def write_half_and_die(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        die(f"writing {re.sub('[0-9]+', 'N', path.name)}")

    def write_half_tensors(tensors: Any, path: Path, *metadata: Any) -> None:
        from safetensors.torch import save

        write_half_and_die(Path(path), save(tensors))

    def write_half_text(path: Path, text: str) -> None:
        write_half_and_die(path.with_name(f"{path.name}.partial"), text.encode())

    def truncate_cache(folder: Path) -> None:
        path = sorted(folder.iterdir())[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die("writing a cache")

    def is_checkpoint(folder: Path, **_: Any) -> bool:
        return Path(folder).name.startswith("step-") and Path(folder).suffix != ".partial" and Path(folder).is_dir()

    def remove_half(folder: Path, **_: Any) -> None:
        for path in sorted(Path(folder).iterdir())[::2]:
            path.unlink()
        die("removing a checkpoint")

    def write_half_line(file: Any, records: Any) -> None:
        with open(file.path, "ab") as lines:
            lines.write(b'{"step": 12, "ta')
        die("writing metrics.jsonl")

    checkpoint, torch = import_module("dscl.training.checkpoint"), import_module("torch")
    if moment.startswith("data preparation"):
        die_in_call(import_module("dscl.utils.cache"), "_write_marker", truncate_cache)
    elif moment == "forward":
        die_in_call(torch.nn.Embedding, "forward", lambda *_: die("forward"))
    elif moment == "backward":
        die_in_call(torch.Tensor, "backward", lambda *_, **__: die("backward"))
    elif moment == "optimizer":
        hook = import_module("torch.optim.optimizer").register_optimizer_step_post_hook
        hook(lambda *_: die("optimizer") if is_due() else None)
    elif moment in ("beginning a task", "ending a task"):
        name = "begin_task" if moment.startswith("beginning") else "end_task"
        for method in import_module("dscl.methods.registry").METHODS.values():
            if name in vars(method):
                die_in_call(method, name, lambda *_: die(moment))
    elif moment == "evaluation":
        die_in_call(import_module("dscl.training.trainer").Trainer, "_on_evaluated_batch", lambda *_: die("evaluation"))
    elif moment.startswith("writing tensors"):
        for owner in ("dscl.training.checkpoint_files", "dscl.utils.checksummed"):
            die_in_call(import_module(owner), "save_file", write_half_tensors)
        die_in_call(import_module("dscl.model.adapters.peft_files"), "_write_file", write_half_and_die)
    elif moment.startswith("writing other"):
        die_in_call(checkpoint, "write_bytes", write_half_and_die)
    elif moment.startswith("writing scores"):
        for name in ("dscl.training.run_dir", "dscl.training.trainer"):
            die_in_call(import_module(name), "write_text_atomically", write_half_text)
    elif moment.startswith("giving"):
        die_in_call(os, "replace", lambda _, to: die(f"naming {re.sub('[0-9]+', 'N', Path(to).name)}"))
    elif moment.startswith("removing"):
        die_in_call(checkpoint.shutil, "rmtree", remove_half, is_checkpoint)
    else:
        die_in_call(import_module("dscl.monitoring.metrics_file").MetricsFile, "write", write_half_line)


def run_rank(arguments: list[str]) -> NoReturn:
    """Run `dscl` as a rank, which dies if the environment says so."""
    number, moment, count = os.environ.get(KILL_VARIABLE, "-1::0").split(":")
    if number == os.environ["RANK"]:
        arm_kill(moment, int(count))
    sys.argv[1:] = arguments
    import_module("dscl.cli.app").run_and_exit()
    raise AssertionError("still here")


def start_run(recipe: Path, kill: str, note: Path) -> tuple[int, str, str]:
    """Start a run. Returns its exit status, its stderr, and the place where a rank died (empty if none did)."""
    note.unlink(missing_ok=True)
    code = "import sys; from dscl.distributed import launcher; launcher.PROGRAM = tuple(sys.argv[1:3])\n"
    code += "sys.exit(launcher.spawn_ranks(2, ['train', sys.argv[3]]))"
    process = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).resolve()), "--rank", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", KILL_VARIABLE: kill, NOTE_VARIABLE: str(note)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return process.returncode, process.stderr, note.read_text() if note.exists() else ""


def newest_checkpoint(run: Path) -> str:
    """The name of the newest whole checkpoint; empty if there is none."""
    checkpoint = import_module("dscl.training.checkpoint")
    checkpoint_path = checkpoint.Checkpoints(run / "checkpoints", checkpoint.CheckpointConfig()).find_newest()
    return checkpoint_path.name if checkpoint_path else ""


def read_results(run: Path) -> list[Any]:
    """Metrics, scores and checksums of the last checkpoint, without measured times."""
    is_measured = import_module("dscl.monitoring.throughput").is_measured_metric
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in record.items() if not is_measured(name)} for record in records]
    checkpoint_folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    checksums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint_folder.iterdir())
    }
    return [metrics, json.loads((run / "scores.json").read_text()), checkpoint_folder.name, checksums]


def write_tasks(folder: Path) -> None:
    words = ["red", "blue", "green", "cat", "dog", "bird", "runs", "sleeps", "sings", "fast", "slow", "today", "here"]
    for task, labels, size in (("colour", ["warm", "cold"], 37), ("animal", ["yes", "no", "maybe"], 30)):
        rng = random.Random(task)
        (folder / task).mkdir(parents=True)
        (folder / task / "labels.json").write_text(json.dumps(labels))
        for split, count in (("train", size), ("test", 11)):
            texts = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(count)]
            records = [{"label": rng.choice(labels), "sentence": text} for text in texts]
            (folder / task / f"{split}.json").write_text(json.dumps(records))


def write_recipe(folder: Path, method: str, stage: int, name: str) -> tuple[Path, Path]:
    """Write a recipe. Returns its path and its run directory. Each run has its own cache, so that it prepares
    its data itself."""
    run = folder / f"{method}-{stage}-{name}"
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    document = {
        "run_dir": str(run),
        "model": {"shape": {**shape, "vocab_size": 300}},
        "method": {"name": method, **METHODS[method]},
        "stream_defaults": {"dev_share": 0},
        "stream": [{"name": task, "path": str(folder / task)} for task in ("colour", "animal")],
        "data": {"cache_dir": str(folder / f"cache-{run.name}")},
        "train": {"lr": 3e-3, "global_batch": 8, "micro_batch": 2, "max_length": 48, "precision": "fp32", "epochs": 2},
        "evaluate": {"batch": 4},
        "deepspeed": f"ds_configs/zero{stage}.json",
        "checkpoint": {"every": 2, "async": stage in (1, 3)},
        "observe": {"every": 2, "tensorboard": False, "live": "off"},
    }
    recipe = folder / f"{run.name}.yaml"
    recipe.write_text(yaml.safe_dump(document))
    return recipe, run


class Campaign:
    """The runs, their kills, and the problems that they revealed."""

    def __init__(self, folder: Path, kills: int, seed: int, max_kills_per_run: int) -> None:
        self.folder, self.target_kills, self.max_kills_per_run, self.rng = (
            folder,
            kills,
            max_kills_per_run,
            random.Random(seed),
        )
        self.deaths: Counter[tuple[str, str]] = Counter()  # by moment and place
        self.cases: Counter[str] = Counter()  # by method and stage
        self.kills = self.runs = self.resumes = 0
        self.different: list[str] = []
        self.lost_checkpoints: list[str] = []
        self.failures: list[str] = []
        self.began = time.monotonic()
        self._moments: list[str] = []

    def perform(self) -> None:
        methods = list(METHODS)
        number = 0
        while self.kills < self.target_kills:
            turn, index = divmod(number, len(methods))
            self.run(methods[index], (index + turn) % 4)
            number += 1

    def run(self, method: str, stage: int) -> None:
        """Compare an undisturbed run with one that is killed several times."""
        undisturbed_recipe, undisturbed = write_recipe(self.folder, method, stage, "undisturbed")
        if not undisturbed.exists():
            status, stderr, _ = start_run(undisturbed_recipe, "-1::0", self.folder / "note")
            if status:
                raise SystemExit(f"{method} at ZeRO {stage} fails without a kill:\n{stderr[-2000:]}")
        recipe, run = write_recipe(self.folder, method, stage, "killed")
        self.runs += 1
        before, status = "", 1
        for _ in range(self.max_kills_per_run):
            moment = self._draw_moment()
            count, number = self.rng.randint(1, MOMENTS[moment]), self.rng.randrange(2)
            number = 0 if moment.startswith(MAIN_RANK_MOMENTS) else number
            status, stderr, place = start_run(recipe, f"{number}:{moment}:{count}", self.folder / "note")
            if not any(early in place for early in FILES_BEFORE_RESUME):
                self._check_resume(f"{method} at ZeRO {stage}", before, stderr)
            if not status:
                break
            if not place:
                self.failures.append(
                    f"{method} at ZeRO {stage} ended with status {status} without a kill: {stderr[-2000:]}"
                )
                break
            self.kills += 1
            self.deaths[moment, place] += 1
            self.cases[f"{method}, ZeRO {stage}"] += 1
            now = newest_checkpoint(run)
            if now < before:
                self.lost_checkpoints.append(
                    f"{method} at ZeRO {stage}, {place}: the newest checkpoint was {before}, then {now or 'none'}"
                )
            before = now
            spent = time.monotonic() - self.began
            left = spent / self.kills * max(0, self.target_kills - self.kills)
            print(
                f"{self.kills} of {self.target_kills}: {method}, ZeRO {stage}: rank {number} killed, {place}; "
                f"newest checkpoint {now or 'none yet'}; about {left / 60:.0f} min left",
                file=sys.stderr,
            )
        if status:
            status, stderr, _ = start_run(recipe, "-1::0", self.folder / "note")
            self._check_resume(f"{method} at ZeRO {stage}", before, stderr)
            if status:
                self.failures.append(f"{method} at ZeRO {stage} does not resume: {stderr[-2000:]}")
                return
        if read_results(run) != read_results(undisturbed):
            self.different.append(f"{method} at ZeRO {stage}")
        shutil.rmtree(run)

    def _check_resume(self, case: str, before: str, stderr: str) -> None:
        """A start after a kill must resume from the newest checkpoint, not begin anew."""
        if before and f"resumed from {before}:" in stderr:
            self.resumes += 1
        elif before:
            self.failures.append(f"{case}: did not resume from {before}: {stderr[-2000:]}")

    def _draw_moment(self) -> str:
        """A random moment. All moments occur equally often."""
        if not self._moments:
            self._moments = self.rng.sample(list(MOMENTS), len(MOMENTS))
        return self._moments.pop()

    def report(self) -> str:
        lines = ["| killed while | times | places |", "|---|---|---|"]
        for moment in MOMENTS:
            deaths = {place: times for (m, place), times in sorted(self.deaths.items()) if m == moment}
            places = ", ".join(f"{place} {times}" for place, times in deaths.items())
            lines.append(f"| {moment} | {sum(deaths.values())} | {places} |")
        lines += [
            "",
            f"{self.kills} kills in {self.runs} runs, {self.resumes} resumes from a checkpoint; "
            f"{len(self.different)} runs differ from undisturbed runs, {len(self.lost_checkpoints)} checkpoints lost, "
            f"{len(self.failures)} other failures.",
            f"Runs: {', '.join(f'{case} ({times})' for case, times in sorted(self.cases.items()))}.",
        ]
        return "\n".join([*lines, *self.different, *self.lost_checkpoints, *self.failures])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills in total (default 50)")
    parser.add_argument("--each", type=int, default=5, help="most kills in one run (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        campaign = Campaign(Path(folder), options.kills, options.seed, options.each)
        campaign.perform()
    print(campaign.report())
    return int(bool(campaign.different or campaign.lost_checkpoints or campaign.failures))


if __name__ == "__main__":
    raise SystemExit(run_rank(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main())
