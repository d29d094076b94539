"""The typed keys of every section of a recipe, with their bounds and what each is for.

The keys of methods are in `methods` beside this file. Neither file imports a heavy package, so a recipe is checked
before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.config.parsing import key
from dscl.maths.schedule import SCHEDULES
from dscl.utils.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")
FORMATS = ("trace", "cl_benchmark", "superni", "jsonl", "datasets")
METRICS = ("accuracy", "exact_match", "first_letter", "rouge_l", "edit_similarity", "code_similarity", "sari")
BEST = ("OP", "BWT", "heldout")


@dataclass(frozen=True)
class TopConfig:
    """The keys of the recipe that stand in no section."""

    run_dir: str = key(help="where the run writes everything")
    seed: int = key(0, at_least=0, at_most=2**63 - 1, help="decides data order, fresh weights and splits")
    deepspeed: str = key("ds_configs/zero1.json", help="a DeepSpeed JSON: ZeRO stage, offload, communication")


@dataclass(frozen=True)
class ModelConfig:
    name: str | None = key(None, help="a model folder, or a hub id such as meta-llama/Llama-2-7b-hf")
    shape: dict[str, Any] | None = key(None, help="LLaMA configuration keys of a model to build with fresh weights")
    tokenizer: str | None = key(
        None, help="a tokenizer's folder or hub id; default: the model's, or one trained for it"
    )
    attention: str = key("sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="attention implementation")
    activation_checkpointing: bool = key(False, help="recompute activations in the backward pass to save memory")


@dataclass(frozen=True)
class TaskConfig:
    """One entry of `stream`; any key may also stand under `stream_defaults`."""

    name: str = key(help="what the task is called in the scores")
    path: str = key(help="a folder or a file; with format: datasets also a hub id")
    format: str | None = key(None, choices=FORMATS, help="the layout; recognised by content when left out")
    metric: str | None = key(None, choices=METRICS, help="default: accuracy where there is a label set, else rouge_l")
    template: str | None = key(None, help="the prompt, with {prompt} or the format's own fields, and {labels}")
    labels: tuple[str, ...] | None = key(None, help="the label set, in place of the one that the data names")
    columns: Mapping[str, str] | None = key(None, help="which columns hold prompt and answer (jsonl and datasets)")
    chat: bool = key(False, help="wrap prompt and answer in the tokenizer's chat template")
    epochs: int | None = key(None, at_least=1, help="in place of train.epochs")
    lr: float | None = key(None, above=0, help="in place of train.lr")
    train_limit: int | None = key(None, at_least=1, help="train on a random subset of this size")
    dev_limit: int | None = key(None, at_least=1, help="the same for the dev split")
    test_limit: int | None = key(None, at_least=1, help="the same for the test split")
    dev_share: float = key(
        0.1, at_least=0.0, at_most=0.5, help="carved from train (at most 500 samples) where the data has no dev split"
    )


@dataclass(frozen=True)
class DataConfig:
    """The recipe's `data` section."""

    bad_records: str = key("stop", choices=("stop", "skip"), help="at a record that is not valid: stop, or skip it")
    cache_dir: str | None = key(None, help="where tokenised splits are kept; default $DSCL_CACHE or ~/.cache/dscl")

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or os.environ.get("DSCL_CACHE") or "~/.cache/dscl").expanduser()


@dataclass(frozen=True)
class TrainConfig:
    lr: float = key(3.0e-4, above=0.0, help="peak learning rate")
    schedule: str = key("cosine", choices=SCHEDULES, help="decay after the warm-up, per task")
    warmup: float = key(0.03, at_least=0.0, at_most=1.0, help="share of a task's steps in which the rate rises")
    weight_decay: float = key(0.0, at_least=0.0, help="AdamW's decoupled weight decay")
    grad_clip: float = key(1.0, at_least=0.0, help="largest norm of a step's gradient; 0: no limit")
    epochs: int = key(1, at_least=1, help="passes over each task's training split")
    global_batch: int = key(16, at_least=1, help="samples in an optimizer step, over all ranks")
    micro_batch: int = key(4, at_least=1, help="rows that a rank passes through the model at once")
    max_length: int = key(256, at_least=8, help="tokens in a row; longer prompts are cut, answers never")
    packing: bool = key(False, help="put several samples into one row")
    precision: str = key("bf16", choices=PRECISIONS, help="precision of weights and activations; masters are fp32")
    non_finite: str = key("stop", choices=("stop", "skip"), help="at a loss that is not finite: stop, or skip the step")


@dataclass(frozen=True)
class EvaluateConfig:
    mode: str = key(
        "rank", choices=("rank", "generate"), help="rank the labels (tasks without labels generate), or generate"
    )
    batch: int = key(16, at_least=1, help="prompts that a rank evaluates at once")
    max_new_tokens: int = key(32, at_least=1, help="longest generated answer")
    tasks: str = key(
        "all",
        choices=("all", "seen", "new"),
        help="after each task evaluate all, those trained so far, or that one alone and all after the last; forgetting "
        "needs `seen`, FWT `all`",
    )
    every: int = key(1, at_least=1, help="evaluate after so many tasks, and after the last; BWT and the like need all")
    split: str = key("test", choices=("test", "dev"), help="dev: to choose settings without looking at the test split")
    given: bool = key(False, help="where a method finds out a prompt's task, evaluate with the task given as well")
    before: bool = key(True, help="also evaluate before any training; FWT needs it, and tasks: all")
    heldout: str | None = key(
        None, help="texts (.jsonl with `text`, or lines) whose mean loss shows what the model can do in general"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(200, at_least=1, help="optimizer steps between checkpoints; one is always written after a task")
    keep: int = key(2, at_least=1, help="how many of the newest are kept")
    grace: float = key(120.0, above=0.0, help="seconds that a signal leaves for coming to a step's end and saving")
    async_: bool = key(False, help="write beside training; takes host memory for a copy of what is written")
    best: str | None = key(
        None, choices=BEST, help="keep the one after the task, too, where this was best (heldout: the loss, lowest)"
    )


@dataclass(frozen=True)
class ProfileConfig:
    steps: tuple[int, ...] = key((), help="the first and the last step of the run that a trace shows, e.g. [10, 14]")
    ranks: tuple[int, ...] = key((0,), help="which ranks write one")
    shapes: bool = key(False, help="with the shapes of all tensors")
    memory: bool = key(
        False, help="keep who allocated what on the GPU (costs a little), for the snapshot when it runs out"
    )

    def __post_init__(self) -> None:
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(
                f"observe.profile.steps: given {list(self.steps)}; the first and the last step of a trace are needed, "
                "like [10, 14]"
            )
        if not self.ranks or min(self.ranks) < 0:
            raise UserError(
                f"observe.profile.ranks: given {list(self.ranks)}; numbers of ranks are needed, like [0, 1]"
            )


@dataclass(frozen=True)
class ObserveConfig:
    every: int = key(10, at_least=1, help="steps between two updates of TensorBoard and of the progress line")
    tensorboard: bool = key(True, help="write TensorBoard events into run_dir/tensorboard")
    peak_tflops: float | None = key(
        None, above=0.0, help="what one device can do at this precision, for MFU; default: known of common GPUs in bf16"
    )
    profile: ProfileConfig = key(ProfileConfig, help="traces for Perfetto")
    live: str = key(
        "auto",
        choices=("auto", "on", "off"),
        help="progress; auto: one live line on a terminal, plain lines elsewhere; on: always live; off: none",
    )


@dataclass(frozen=True)
class CompareConfig:
    """The section `compare` of a comparison's file."""

    rates: tuple[float, ...] = key((), help="the learning rates that every row tries, where it names none of its own")
    rows: Mapping[str, Mapping[str, Any]] = key(
        dict, help="by name: a method's keys, and `rates` of its own; default: what --methods names, with its defaults"
    )
    seeds: tuple[int, ...] = key((0, 1, 2), help="of the runs on the test split")
    search_limit: int | None = key(
        None, at_least=1, help="training samples a task while rates are tried; default: as in the runs"
    )
    keeps: float | None = key(
        None, at_least=0.0, help="take the best of the rates whose BWT on dev is at least minus this, if there are any"
    )

    def __post_init__(self) -> None:
        for name, values in (("rates", self.rates), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"compare.{name}: given {list(values)}; name each once")
        for row in self.rows:
            if "," in row:
                raise UserError(f"compare.rows: given {row!r}; a name holds no comma, which parts names in --methods")
        if not self.seeds:
            raise UserError("compare.seeds: given []; at least one is needed")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "checkpoint": CheckpointConfig,
    "observe": ObserveConfig,
}
