"""The table holds every score once, in line with its task, at any width."""

from __future__ import annotations

import random

import pytest

from dscl.monitoring.score_board import ScoreBoard
from dscl.monitoring.score_table import score_table
from dscl.utils.formatting import display_width, format_count, format_duration, truncate_end, truncate_middle
from tests.support.score_boards import make_score_board


def make_scores(names: list[str], trained: int, zero_shot: bool = True) -> ScoreBoard:
    generator = random.Random(0)
    first, *rows = [[round(generator.random(), 3) for _ in names] for _ in range(trained + 1)]
    return make_score_board(rows, first if zero_shot else None, names)


def test_by_hand() -> None:
    scores = make_score_board([[0.9, None], [0.5, 1.0]], [0.25, 0.125], ["a", "newsgroup"])
    assert score_table(scores, 80).splitlines() == [
        "                     a  newsgroup",
        "before training  0.250      0.125",
        "after a          0.900          -",
        "after newsgroup  0.500      1.000",
        "",
        "OP           0.750  mean score over the tasks at the end",
        "BWT         -0.400  mean change of the earlier tasks since each was learnt",
        "FWT              -  mean gain of a task before its own training",
        "forgetting   0.400  mean fall of the earlier tasks from their best",
    ]


STREAMS = {
    "five": ["colours", "sst2", "agnews", "dbpedia", "yahoo"],
    "twelve": ["yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia", "agnews", "yahoo"],
    "long": [f"task{i:04d}_an_extremely_long_name_of_a_task_{i}" for i in range(15)],
    "wide": ["情感分析情感分析", "新闻", "问答"],
    "one": ["sst2"],
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("width", [40, 80, 100, 200])
@pytest.mark.parametrize("zero_shot", [True, False])
def test_every_score_stands_in_its_row_within_the_width(stream: str, width: int, zero_shot: bool) -> None:
    names = STREAMS[stream]
    scores = make_scores(names, max(1, len(names) - 1), zero_shot)
    *blocks, _ = score_table(scores, width).split("\n\n")
    rows = [*([scores.zero_shot] if zero_shot else []), *scores.matrix]
    printed_rows: list[list[float]] = [[] for _ in rows]
    for block in blocks:
        header, *lines = block.splitlines()
        assert {display_width(line) for line in (header, *lines)} == {display_width(header)}
        assert display_width(header) <= width
        assert len(lines) == len(rows)
        for row, line in zip(printed_rows, lines, strict=True):
            row += map(float, line.split()[2:])
    assert printed_rows == rows


def test_names_are_whole_where_there_is_room_and_distinct_where_there_is_not() -> None:
    for name, width in (("twelve", 130), ("five", 60)):
        header = score_table(make_scores(STREAMS[name], 1), width).splitlines()[0]
        assert header.split() == STREAMS[name]
    narrow_table = score_table(make_scores(STREAMS["long"], 1), 80)
    headers = [name for block in narrow_table.split("\n\n")[:-1] for name in block.splitlines()[0].split()]
    assert len(set(headers)) == 15
    assert all("…" in name for name in headers)


def test_tasks_are_spread_evenly_over_the_parts() -> None:
    parts = score_table(make_scores(STREAMS["twelve"], 1), 80).split("\n\n")[:-1]
    assert [len(part.splitlines()[0].split()) for part in parts] == [6, 6]


def test_columns_are_those_of_a_terminal() -> None:
    assert [display_width(text) for text in ("news", "新闻", "e\u0301te\u0301", "")] == [4, 4, 3, 0]


@pytest.mark.parametrize("width", range(1, 14))
def test_cutting(width: int) -> None:
    for text in ("abcdefghijkl", "情感分析情感", "é" * 12):
        for cut in (truncate_end(text, width), truncate_middle(text, width)):
            assert width - 1 <= display_width(cut) <= width or cut == text
            assert ("…" in cut) == (display_width(text) > width)
    assert truncate_middle("abcdefghijkl", 7) == "abc…jkl"


def test_short_forms() -> None:
    durations = [format_duration(s) for s in (0, 59.4, 59.6, 130, 3599, 3600, 11100, 187200)]
    assert durations == ["0s", "59s", "1m00s", "2m10s", "59m59s", "1h00m", "3h05m", "2d04h"]
    assert [format_count(v) for v in (0, 870, 1e3, 3412, 1e6, 1.25e6, 2e9)] == [
        "0", "870", "1.0k", "3.4k", "1.0M", "1.2M", "2.0G",
    ]  # fmt: skip
