"""Kills ranks on purpose, at moments drawn by chance, starts the run again, and sees whether anything is lost.

    python tools/kill_campaign.py --kills 50

Every run is one method at one ZeRO stage on two ranks, on small made-up tasks. A rank is killed by SIGKILL at one of
the moments below (in the middle of writing a file too: half of it is there then), the run is started again, killed
again, and at last left alone. Then all that it computed (each step's metrics, the scores, the last checkpoint's bytes)
has to be what a run that nobody killed computed; and after each kill the newest checkpoint of before has to be there
still, whole, or a newer one. The table goes to the standard output, progress to the standard error.
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

ORDER, NOTE = "DSCL_CAMPAIGN_KILL", "DSCL_CAMPAIGN_NOTE"  # `rank:moment:count`, and where the dying rank says of what
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
# The most calls that a kill waits for, by moment: few happen seldom.
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
# Begin what the main rank alone does.
MAIN = ("writing other", "writing scores", "giving", "removing", "writing metrics")
EARLY = ("recipe.yaml", "base.json", "a cache")  # written before a start looks for a checkpoint


def die(doing: str) -> NoReturn:
    Path(os.environ[NOTE]).write_text(doing)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def arm(moment: str, count: int) -> None:
    """Let this process die in the moment's n-th call."""
    calls = [0]

    def due() -> bool:
        calls[0] += 1
        return calls[0] == count

    def around(
        owner: Any, name: str, death: Callable[..., None], counts: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        """Before the function does its work in that call, `death` is called in its place."""
        original = getattr(owner, name)

        def dying(*words: Any, **named: Any) -> Any:
            if counts(*words, **named) and due():
                death(*words, **named)
            return original(*words, **named)

        setattr(owner, name, dying)

    def half(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        die(f"writing {re.sub('[0-9]+', 'N', path.name)}")

    def half_tensors(tensors: Any, path: Path, *metadata: Any) -> None:
        from safetensors.torch import save

        half(Path(path), save(tensors))

    def half_text(path: Path, text: str) -> None:
        half(path.with_name(f"{path.name}.partial"), text.encode())

    def half_a_cache(folder: Path) -> None:
        path = sorted(folder.iterdir())[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die("writing a cache")

    def a_checkpoint(folder: Path, **_: Any) -> bool:
        return Path(folder).name.startswith("step-") and Path(folder).suffix != ".partial" and Path(folder).is_dir()

    def half_removed(folder: Path, **_: Any) -> None:
        for path in sorted(Path(folder).iterdir())[::2]:
            path.unlink()
        die("removing a checkpoint")

    def half_a_line(file: Any, records: Any) -> None:
        with open(file.path, "ab") as lines:
            lines.write(b'{"step": 12, "ta')
        die("writing metrics.jsonl")

    checkpoint, torch = import_module("dscl.training.checkpoint"), import_module("torch")
    if moment.startswith("data preparation"):
        around(import_module("dscl.utils.cache"), "_write_marker", half_a_cache)
    elif moment == "forward":
        around(torch.nn.Embedding, "forward", lambda *_: die("forward"))
    elif moment == "backward":
        around(torch.Tensor, "backward", lambda *_, **__: die("backward"))
    elif moment == "optimizer":
        hook = import_module("torch.optim.optimizer").register_optimizer_step_post_hook
        hook(lambda *_: die("optimizer") if due() else None)
    elif moment in ("beginning a task", "ending a task"):
        name = "begin_task" if moment.startswith("beginning") else "end_task"
        for method in import_module("dscl.methods.registry").METHODS.values():
            if name in vars(method):
                around(method, name, lambda *_: die(moment))
    elif moment == "evaluation":
        around(import_module("dscl.training.trainer").Trainer, "_on_evaluated_batch", lambda *_: die("evaluation"))
    elif moment.startswith("writing tensors"):
        for owner in ("dscl.training.checkpoint_files", "dscl.utils.checksummed"):
            around(import_module(owner), "save_file", half_tensors)
        around(import_module("dscl.model.adapters.peft_files"), "_write_file", half)
    elif moment.startswith("writing other"):
        around(checkpoint, "write_bytes", half)
    elif moment.startswith("writing scores"):
        for name in ("dscl.training.run_dir", "dscl.training.trainer"):
            around(import_module(name), "write_text_atomically", half_text)
    elif moment.startswith("giving"):
        around(os, "replace", lambda _, to: die(f"naming {re.sub('[0-9]+', 'N', Path(to).name)}"))
    elif moment.startswith("removing"):
        around(checkpoint.shutil, "rmtree", half_removed, a_checkpoint)
    else:
        around(import_module("dscl.monitoring.metrics_file").MetricsFile, "write", half_a_line)


def rank(words: list[str]) -> NoReturn:
    """A rank: dscl itself, as a process of its own, which may have an order to die."""
    number, moment, count = os.environ.get(ORDER, "-1::0").split(":")
    if number == os.environ["RANK"]:
        arm(moment, int(count))
    sys.argv[1:] = words
    import_module("dscl.cli.app").run_and_exit()
    raise AssertionError("still here")


def start(recipe: Path, order: str, note: Path) -> tuple[int, str, str]:
    """One start of a run: its exit status, what it said, and where a rank died, if one did."""
    note.unlink(missing_ok=True)
    code = "import sys; from dscl.distributed import launcher; launcher.PROGRAM = tuple(sys.argv[1:3])\n"
    code += "sys.exit(launcher.spawn_ranks(2, ['train', sys.argv[3]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).resolve()), "--rank", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", ORDER: order, NOTE: str(note)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stderr, note.read_text() if note.exists() else ""


def newest(run: Path) -> str:
    """The name of the newest whole checkpoint."""
    checkpoint = import_module("dscl.training.checkpoint")
    found = checkpoint.Checkpoints(run / "checkpoints", checkpoint.CheckpointConfig()).find_newest()
    return found.name if found else ""


def outcome(run: Path) -> list[Any]:
    """All that a run computed."""
    is_measured = import_module("dscl.monitoring.throughput").is_measured_metric
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{name: value for name, value in record.items() if not is_measured(name)} for record in records]
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.iterdir())}
    return [bare, json.loads((run / "scores.json").read_text()), last.name, sums]


def write_tasks(folder: Path) -> None:
    words = ["red", "blue", "green", "cat", "dog", "bird", "runs", "sleeps", "sings", "fast", "slow", "today", "here"]
    for task, labels, size in (("colour", ["warm", "cold"], 37), ("animal", ["yes", "no", "maybe"], 30)):
        chance = random.Random(task)
        (folder / task).mkdir(parents=True)
        (folder / task / "labels.json").write_text(json.dumps(labels))
        for split, count in (("train", size), ("test", 11)):
            texts = [" ".join(chance.choices(words, k=chance.randint(3, 9))) for _ in range(count)]
            records = [{"label": chance.choice(labels), "sentence": text} for text in texts]
            (folder / task / f"{split}.json").write_text(json.dumps(records))


def write_recipe(folder: Path, method: str, stage: int, name: str) -> tuple[Path, Path]:
    """Where the recipe stands, and its run directory. Each run has a cache of its own, to prepare its data itself."""
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
    def __init__(self, folder: Path, kills: int, seed: int, most: int) -> None:
        self.folder, self.wanted, self.most, self.chance = folder, kills, most, random.Random(seed)
        self.died: Counter[tuple[str, str]] = Counter()  # by moment, and what exactly was done then
        self.places: Counter[str] = Counter()  # by method and stage
        self.kills = self.runs = self.resumes = 0
        self.unlike: list[str] = []
        self.lost: list[str] = []
        self.odd: list[str] = []
        self.began = time.monotonic()
        self._bag: list[str] = []

    def perform(self) -> None:
        methods = list(METHODS)
        number = 0
        while self.kills < self.wanted:
            turn, place = divmod(number, len(methods))
            self.run(methods[place], (place + turn) % 4)
            number += 1

    def run(self, method: str, stage: int) -> None:
        """A run that nobody kills, and one that is killed some times."""
        calm, whole = write_recipe(self.folder, method, stage, "calm")
        if not whole.exists():
            status, said, _ = start(calm, "-1::0", self.folder / "note")
            if status:
                raise SystemExit(f"{method} at ZeRO {stage} fails without being killed:\n{said[-2000:]}")
        recipe, run = write_recipe(self.folder, method, stage, "killed")
        self.runs += 1
        before, status = "", 1
        for _ in range(self.most):
            moment = self._moment()
            count, number = self.chance.randint(1, MOMENTS[moment]), self.chance.randrange(2)
            number = 0 if moment.startswith(MAIN) else number
            status, said, doing = start(recipe, f"{number}:{moment}:{count}", self.folder / "note")
            if not any(early in doing for early in EARLY):
                self._went_on(f"{method} at ZeRO {stage}", before, said)
            if not status:
                break
            if not doing:
                self.odd.append(f"{method} at ZeRO {stage} ended with status {status} unkilled: {said[-2000:]}")
                break
            self.kills += 1
            self.died[moment, doing] += 1
            self.places[f"{method}, ZeRO {stage}"] += 1
            now = newest(run)
            if now < before:
                self.lost.append(f"{method} at ZeRO {stage}, {doing}: {before} was there, then {now or 'none'}")
            before = now
            spent = time.monotonic() - self.began
            left = spent / self.kills * max(0, self.wanted - self.kills)
            print(
                f"{self.kills} of {self.wanted}: {method}, ZeRO {stage}: rank {number} killed, {doing}; "
                f"newest checkpoint {now or 'none yet'}; about {left / 60:.0f} min left",
                file=sys.stderr,
            )
        if status:
            status, said, _ = start(recipe, "-1::0", self.folder / "note")
            self._went_on(f"{method} at ZeRO {stage}", before, said)
            if status:
                self.odd.append(f"{method} at ZeRO {stage} does not go on: {said[-2000:]}")
                return
        if outcome(run) != outcome(whole):
            self.unlike.append(f"{method} at ZeRO {stage}")
        shutil.rmtree(run)

    def _went_on(self, what: str, before: str, said: str) -> None:
        """A start after a kill has to go on from the checkpoint that was there, not from the beginning."""
        if before and f"resumed from {before}:" in said:
            self.resumes += 1
        elif before:
            self.odd.append(f"{what}: did not go on from {before}: {said[-2000:]}")

    def _moment(self) -> str:
        """Each as often as the others."""
        if not self._bag:
            self._bag = self.chance.sample(list(MOMENTS), len(MOMENTS))
        return self._bag.pop()

    def report(self) -> str:
        lines = ["| killed while | times | doing |", "|---|---|---|"]
        for moment in MOMENTS:
            found = {doing: times for (m, doing), times in sorted(self.died.items()) if m == moment}
            said = ", ".join(f"{doing} {times}" for doing, times in found.items())
            lines.append(f"| {moment} | {sum(found.values())} | {said} |")
        lines += [
            "",
            f"{self.kills} kills in {self.runs} runs, {self.resumes} resumes from a checkpoint; "
            f"{len(self.unlike)} runs ended otherwise than without kills, {len(self.lost)} checkpoints lost, "
            f"{len(self.odd)} other failures.",
            f"Runs: {', '.join(f'{place} ({times})' for place, times in sorted(self.places.items()))}.",
        ]
        return "\n".join([*lines, *self.unlike, *self.lost, *self.odd])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--each", type=int, default=5, help="at most so many in one run (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other moments (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        campaign = Campaign(Path(folder), options.kills, options.seed, options.each)
        campaign.perform()
    print(campaign.report())
    return int(bool(campaign.unlike or campaign.lost or campaign.odd))


if __name__ == "__main__":
    raise SystemExit(rank(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main())
