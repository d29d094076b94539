"""The typed keys of every section of a recipe, each with its bounds and a line of help.

The keys of the methods are in `dscl.config.methods`. Neither file imports a heavy package, so a recipe is checked
before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.config.parsing import config_key
from dscl.maths.schedule import SCHEDULES
from dscl.utils.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")
DATA_FORMATS = ("trace", "cl_benchmark", "superni", "jsonl", "datasets")
METRICS = ("accuracy", "exact_match", "first_letter", "rouge_l", "edit_similarity", "code_similarity", "sari")
BEST_CRITERIA = ("OP", "BWT", "heldout")


@dataclass(frozen=True)
class TopConfig:
    """The recipe keys outside of all sections."""

    run_dir: str = config_key(help="the folder into which the run writes everything")
    seed: int = config_key(0, at_least=0, at_most=2**63 - 1, help="random seed of data order, fresh weights and splits")
    deepspeed: str = config_key(
        "ds_configs/zero1.json", help="path of a DeepSpeed JSON: ZeRO stage, offload, communication"
    )


@dataclass(frozen=True)
class ModelConfig:
    name: str | None = config_key(None, help="a model folder, or a hub id such as meta-llama/Llama-2-7b-hf")
    shape: dict[str, Any] | None = config_key(
        None, help="LLaMA configuration keys of a model to build with fresh weights"
    )
    tokenizer: str | None = config_key(
        None, help="a tokenizer's folder or hub id; default: the model's, or one trained for it"
    )
    attention: str = config_key("sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="attention implementation")
    activation_checkpointing: bool = config_key(False, help="recompute activations in the backward pass to save memory")


@dataclass(frozen=True)
class TaskConfig:
    """One entry of `stream`. Any of these keys may also stand under `stream_defaults`, for all entries."""

    name: str = config_key(help="the task's name in the scores")
    path: str = config_key(help="a folder or a file; with format: datasets also a hub id of a data set")
    format: str | None = config_key(
        None, choices=DATA_FORMATS, help="the layout of the data; default: recognised by content"
    )
    metric: str | None = config_key(
        None, choices=METRICS, help="default: accuracy where there is a label set, else rouge_l"
    )
    template: str | None = config_key(None, help="the prompt, with {prompt} or the format's own fields, and {labels}")
    labels: tuple[str, ...] | None = config_key(None, help="the label set, in place of the one in the data")
    columns: Mapping[str, str] | None = config_key(
        None, help="names of the columns with prompt and answer (formats jsonl and datasets)"
    )
    chat: bool = config_key(False, help="wrap prompt and answer in the tokenizer's chat template")
    epochs: int | None = config_key(None, at_least=1, help="in place of train.epochs")
    lr: float | None = config_key(None, above=0, help="in place of train.lr")
    train_limit: int | None = config_key(None, at_least=1, help="train on a random subset of this size")
    dev_limit: int | None = config_key(None, at_least=1, help="the same for the dev split")
    test_limit: int | None = config_key(None, at_least=1, help="the same for the test split")
    dev_share: float = config_key(
        0.1,
        at_least=0.0,
        at_most=0.5,
        help="share of train (at most 500 samples) that becomes the dev split if the data has none",
    )


@dataclass(frozen=True)
class DataConfig:
    """The recipe's `data` section."""

    bad_records: str = config_key("stop", choices=("stop", "skip"), help="at an invalid record: stop, or skip it")
    cache_dir: str | None = config_key(
        None, help="the folder of tokenised splits; default $DSCL_CACHE or ~/.cache/dscl"
    )

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or os.environ.get("DSCL_CACHE") or "~/.cache/dscl").expanduser()


@dataclass(frozen=True)
class TrainConfig:
    lr: float = config_key(3.0e-4, above=0.0, help="peak learning rate")
    schedule: str = config_key("cosine", choices=SCHEDULES, help="decay after the warm-up, per task")
    warmup: float = config_key(
        0.03, at_least=0.0, at_most=1.0, help="share of a task's steps in which the learning rate rises"
    )
    weight_decay: float = config_key(0.0, at_least=0.0, help="AdamW's decoupled weight decay")
    grad_clip: float = config_key(1.0, at_least=0.0, help="maximum norm of a step's gradient; 0: no clipping")
    epochs: int = config_key(1, at_least=1, help="passes over each task's training split")
    global_batch: int = config_key(16, at_least=1, help="samples of an optimizer step, summed over all ranks")
    micro_batch: int = config_key(4, at_least=1, help="rows of a rank's forward pass")
    max_length: int = config_key(256, at_least=8, help="tokens in a row; longer prompts are cut, answers never")
    packing: bool = config_key(False, help="put several samples into one row")
    precision: str = config_key(
        "bf16", choices=PRECISIONS, help="precision of weights and activations; masters are fp32"
    )
    non_finite: str = config_key(
        "stop", choices=("stop", "skip"), help="at a loss that is inf or nan: stop the run, or skip the step"
    )


@dataclass(frozen=True)
class EvaluateConfig:
    mode: str = config_key(
        "rank",
        choices=("rank", "generate"),
        help="rank: take the label with the highest likelihood (tasks without labels generate); or generate",
    )
    batch: int = config_key(16, at_least=1, help="prompts that a rank evaluates at once")
    max_new_tokens: int = config_key(32, at_least=1, help="longest generated answer")
    tasks: str = config_key(
        "all",
        choices=("all", "seen", "new"),
        help="which tasks to evaluate after each task: all; those seen so far; or the new one only, and all after the "
        "last. Forgetting needs at least `seen`, FWT needs `all`",
    )
    every: int = config_key(
        1, at_least=1, help="evaluate after every so many tasks, and after the last; BWT and forgetting need 1"
    )
    split: str = config_key(
        "test", choices=("test", "dev"), help="the split to evaluate; dev: to tune settings without the test split"
    )
    oracle_task_id: bool = config_key(
        False, help="for a method with a task router: also evaluate with the true task of every prompt"
    )
    zero_shot: bool = config_key(
        True, help="also evaluate before any training (zero-shot); FWT needs that, and tasks: all"
    )
    heldout: str | None = config_key(
        None, help="file of texts (.jsonl with `text`, or lines); their mean loss measures the model's general ability"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = config_key(
        200, at_least=1, help="optimizer steps between checkpoints; one is always written after a task"
    )
    keep: int = config_key(2, at_least=1, help="how many of the newest checkpoints are kept")
    grace: float = config_key(
        120.0, above=0.0, help="seconds after a signal for finishing the step and saving a checkpoint"
    )
    async_: bool = config_key(
        False, help="write checkpoints while training goes on; needs host memory for a copy of what is written"
    )
    best: str | None = config_key(
        None,
        choices=BEST_CRITERIA,
        help="also keep the checkpoint after the task with the best value of this (heldout: the lowest loss)",
    )


@dataclass(frozen=True)
class ProfileConfig:
    steps: tuple[int, ...] = config_key(
        (), help="the first and the last step of the trace, e.g. [10, 14]; default: no trace"
    )
    ranks: tuple[int, ...] = config_key((0,), help="the ranks that write a trace")
    shapes: bool = config_key(False, help="record tensor shapes in the trace")
    memory: bool = config_key(
        False, help="record GPU allocations (costs a little time), for a memory snapshot when the GPU is out of memory"
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
    every: int = config_key(10, at_least=1, help="steps between two updates of TensorBoard and of the progress line")
    tensorboard: bool = config_key(True, help="write TensorBoard events into run_dir/tensorboard")
    peak_tflops: float | None = config_key(
        None,
        above=0.0,
        help="peak TFLOPS of one device at this precision, for MFU; default: known for common GPUs in bf16",
    )
    profile: ProfileConfig = config_key(ProfileConfig, help="profiler traces for Perfetto")
    live: str = config_key(
        "auto",
        choices=("auto", "on", "off"),
        help="progress output; auto: one live line on a terminal, plain lines elsewhere; on: always live; off: none",
    )


@dataclass(frozen=True)
class CompareConfig:
    """The section `compare` of the file for `dscl compare`."""

    learning_rates: tuple[float, ...] = config_key(
        (), help="the learning rates that every row without learning rates of its own tries on dev"
    )
    rows: Mapping[str, Mapping[str, Any]] = config_key(
        dict,
        help="by name: a method's keys, and optionally `learning_rates`; default: the methods of --methods with their "
        "defaults",
    )
    seeds: tuple[int, ...] = config_key((0, 1, 2), help="seeds of the runs on the test split")
    search_limit: int | None = config_key(
        None, at_least=1, help="training samples of each task in the learning rate search; default: as in the runs"
    )
    max_forgetting: float | None = config_key(
        None,
        at_least=0.0,
        help="choose the best among the learning rates whose BWT on dev is at least minus this, if any is",
    )

    def __post_init__(self) -> None:
        for name, values in (("learning_rates", self.learning_rates), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"compare.{name}: given {list(values)}; name each once")
        for row in self.rows:
            if "," in row:
                raise UserError(f"compare.rows: given {row!r}; a name holds no comma, which parts names in --methods")
        if not self.seeds:
            raise UserError("compare.seeds: given []; at least one is needed")


SECTION_CONFIGS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "checkpoint": CheckpointConfig,
    "observe": ObserveConfig,
}
