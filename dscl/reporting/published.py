"""Published results on the benchmarks that a report may cover, copied from papers. None was measured with dscl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
# Task orders 1 to 3 of O-LoRA use four of the standard benchmark's five data sets; orders 4 to 6 use fifteen.
FOUR = ("dbpedia", "amazon", "yahoo", "agnews")
FIVE = (*FOUR, "yelp")
FIFTEEN = (*FIVE, "mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb", "sst-2", "multirc")
TASK_ALIASES = {"boolqa": "boolq"}  # the folder name in CL_Benchmark → the usual name

ASR = "Analytic Subspace Routing, ICCV 2025"
OSFT = "Sculpting Subspaces, 2025"


@dataclass(frozen=True)
class PublishedTable:
    """A paper's table of results, in percent as printed."""

    streams: tuple[tuple[str, ...], ...]  # the task sets of the benchmark, in any order
    source: str
    link: str
    setting: str  # benchmark and model
    decimals: int
    results: tuple[tuple[str, float, float | None], ...]  # method, OP, BWT


TABLES = (
    PublishedTable(
        (TRACE,),
        ASR,
        "https://arxiv.org/abs/2503.13575",
        "TRACE, Llama-2-7B-chat; as quoted in a public note on the paper; Any-SSR gives the same in both task orders",
        2,
        (
            ("SeqFT", 47.63, -11.45),
            ("EWC", 48.20, -9.48),
            ("O-LoRA", 44.64, -4.20),
            ("Replay, 1%", 48.47, -9.69),
            ("SEEKER, 1%", 54.99, -2.61),
            ("Any-SSR", 55.69, 0.00),
            ("joint training", 59.38, None),
        ),
    ),
    PublishedTable(
        (TRACE,),
        OSFT,
        "https://arxiv.org/abs/2504.07097",
        "TRACE, Llama-2-7B-chat",
        1,
        (
            ("SeqFT", 23.0, -8.3),
            ("O-LoRA", 41.3, None),
            ("Sculpting Subspaces", 48.4, None),
            ("joint training", 52.3, None),
            ("one model a task", 57.6, None),
        ),
    ),
    PublishedTable(
        (FOUR, FIVE),
        OSFT,
        "https://arxiv.org/abs/2504.07097",
        "standard benchmark (5 tasks), T5-large, average accuracy; N-LoRA and GORP by later papers",
        1,
        (
            ("SeqFT", 28.5, None),
            ("SeqLoRA", 43.7, None),
            ("Replay", 57.8, None),
            ("EWC", 48.7, None),
            ("LwF", 52.3, None),
            ("O-LoRA", 75.8, None),
            ("Sculpting Subspaces", 75.9, None),
            ("N-LoRA", 78.8, None),
            ("GORP", 79.8, None),
            ("joint training", 80.0, None),
        ),
    ),
    PublishedTable(
        (FIFTEEN,),
        OSFT,
        "https://arxiv.org/abs/2504.07097",
        "15 tasks, T5-large, average accuracy; N-LoRA and GORP by later papers",
        1,
        (
            ("SeqFT", 7.4, None),
            ("SeqLoRA", 1.6, None),
            ("Replay", 54.2, None),
            ("EWC", 45.1, None),
            ("LwF", 46.9, None),
            ("O-LoRA", 69.6, None),
            ("Sculpting Subspaces", 71.3, None),
            ("N-LoRA", 72.4, None),
            ("GORP", 76.0, None),
            ("joint training", 76.5, None),
        ),
    ),
)


def find_published_tables(tasks: Sequence[str]) -> list[PublishedTable]:
    """The published tables of the benchmark with exactly these tasks, in any order and spelling."""
    task_set = set(map(_normalize_name, tasks))
    return [table for table in TABLES if any(task_set == set(map(_normalize_name, stream)) for stream in table.streams)]


def _normalize_name(name: str) -> str:
    """The task name in lower case without punctuation, and with aliases replaced."""
    normalized = "".join(character for character in name.lower() if character.isalnum())
    return TASK_ALIASES.get(normalized, normalized)
