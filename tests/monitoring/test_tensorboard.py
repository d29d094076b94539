"""The event files as TensorBoard reads them, and the picture of the scores."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from dscl.monitoring.heat_map import CELL_HEIGHT, CELL_WIDTH, LOW_INK
from dscl.monitoring.score_picture import MARGIN, SCALE, routing_picture, score_picture
from tests.support.score_boards import make_score_board

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CONFUSION = {"tasks": ["a", "b"], "answered_by": ["a", "b", None], "shares": [[0.9, 0.0, 0.1], [0.2, 0.8, 0.0]]}


def read_events(folder: Path):  # type: ignore[no-untyped-def]
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def scalars(events, tag: str) -> list[tuple[int, float]]:  # type: ignore[no-untyped-def]
    return [(e.step, round(e.value, 4)) for e in events.Scalars(tag)]


def record(step: int) -> dict:
    return {
        "step": step,
        "task": "a",
        "loss": step / 8,
        "lr": 0.25,
        "grad_norm": 2.0,
        "tokens": 9,
        "tokens_per_s": 64.0,
        "epoch": 0.5,
    }


def test_curves_scores_picture_and_recipe_read_back(tmp_path: Path) -> None:
    from dscl.monitoring.tensorboard import TensorBoardWriter

    board = TensorBoardWriter(tmp_path, 0)
    board.add_text("recipe", "seed: 7", 0)
    board.add_scores(make_score_board([], [0.125, 0.25]), 0)
    board.add_step(record(1))
    board.add_step({"step": 2, "loss": 0.5, "grad_norm": None})
    board.add_scores(make_score_board([[0.75, 0.5]], [0.125, 0.25]), 2)
    board.add_scores(make_score_board([[0.75, 0.5], [0.25, 1.0]], [0.125, 0.25]), 4)
    board.close()

    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == [(1, 0.125), (2, 0.5)]
    assert scalars(events, "train/grad_norm") == [(1, 2.0)]
    assert scalars(events, "train/lr") == [(1, 0.25)]
    assert scalars(events, "train/epoch") == [(1, 0.5)]
    assert scalars(events, "perf/tokens_per_s") == [(1, 64.0)]
    assert scalars(events, "task/a/score") == [(0, 0.125), (2, 0.75), (4, 0.25)]
    assert scalars(events, "task/b/score") == [(0, 0.25), (2, 0.5), (4, 1.0)]
    assert scalars(events, "task/BWT") == [(4, -0.5)]
    assert b"seed: 7" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    last = events.Images("task/scores")[-1]
    picture = np.asarray(Image.open(BytesIO(last.encoded_image_string)))
    assert last.step == 4
    assert np.array_equal(picture, score_picture(make_score_board([[0.75, 0.5], [0.25, 1.0]], [0.125, 0.25])))


def test_every_number_of_a_record_has_its_curve(tmp_path: Path) -> None:
    from dscl.monitoring.tensorboard import TensorBoardWriter
    from dscl.utils.timers import COLLECTIVES, PARTS

    names_by_group = {
        "train": ["loss", "lr", "grad_norm", "epoch", "tokens_seen"],
        "perf": ["tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "tflops_with_recomputation", "mfu",
                 "padding", "step_spread"],
        "perf/parts": [f"{part}_seconds" for part in PARTS],
        "mem": [f"{what}_bytes" for what in ("allocated", "reserved", "peak", "host")],
        "comm": [f"{kind}_{what}" for kind in COLLECTIVES for what in ("bytes", "seconds")],
    }  # fmt: skip
    expected = {"perf/step_seconds": 64.0}
    numbers = {"seconds": 64.0}
    for place, names in names_by_group.items():
        for name in names:
            numbers[f"memory_{name}" if place == "mem" else name] = expected[f"{place}/{name}"] = float(len(expected))
    board = TensorBoardWriter(tmp_path, 0)
    board.add_step({"step": 3, "task": "a", "tokens": 9, **numbers})
    board.add_seconds("evaluate_seconds", 2.0, 3)
    board.add_seconds("save_seconds", 4.0, 3)
    board.close()
    events = read_events(tmp_path)
    expected |= {"perf/evaluate_seconds": 2.0, "perf/save_seconds": 4.0}
    assert {tag: scalars(events, tag) for tag in events.Tags()["scalars"]} == {
        tag: [(3, value)] for tag, value in expected.items()
    }


def test_routing_and_what_was_held_out_read_back(tmp_path: Path) -> None:
    from dscl.monitoring.tensorboard import TensorBoardWriter

    scores = make_score_board([[0.75, 0.5]], confusion=CONFUSION, heldout=[4.0, 3.5])
    board = TensorBoardWriter(tmp_path, 0)
    board.add_scores(scores, 5)
    board.close()
    events = read_events(tmp_path)
    assert scalars(events, "task/heldout_loss") == [(5, 3.5)]
    (event,) = events.Images("task/routing")
    assert event.step == 5
    assert np.array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), routing_picture(CONFUSION))


def test_routing_shows_whose_prompts_were_answered_by_whom() -> None:
    picture = routing_picture(CONFUSION)
    reference = score_picture(make_score_board([[0.9, 0.0, 0.1], [0.2, 0.8, 0.0]], None, ("a", "b", "c")))
    for row in range(2):
        for column in range(3):
            colour = cell(picture, row, column, 3, 2)
            assert colour == cell(reference, row, column, 3), (row, column)
    moved = {**CONFUSION, "shares": [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]}
    assert not np.array_equal(picture, routing_picture(moved))


def test_runs_can_be_compared_by_settings_and_scores(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    from dscl.monitoring.tensorboard import TensorBoardWriter

    board = TensorBoardWriter(tmp_path, 0)
    complete = make_score_board([[0.75, 0.5], [0.25, 1.0]])
    board.add_scores(complete, 4)
    board.add_hparams({"train.lr": 0.5, "method.name": "asr"}, complete.summary)
    board.close()
    events = read_events(tmp_path)
    (content,) = (data for tag, data in events.PluginTagToContent("hparams").items() if "experiment" in tag)
    experiment = metadata.parse_experiment_plugin_data(content)
    assert [each.name for each in experiment.hparam_infos] == ["train.lr", "method.name"]
    declared = [each.name.tag for each in experiment.metric_infos]
    assert declared == ["task/OP", "task/BWT", "task/forgetting"]
    assert set(declared) <= set(events.Tags()["scalars"]), "TensorBoard looks the metrics up by their tags"


@pytest.mark.parametrize("resumed_from", [0, 4])
def test_what_came_after_the_checkpoint_is_gone_after_resuming(tmp_path: Path, resumed_from: int) -> None:
    from dscl.monitoring.tensorboard import TensorBoardWriter

    killed = TensorBoardWriter(tmp_path, 0)
    killed.add_scores(make_score_board([], [0.5, 0.5]), 0)
    for step in range(1, 7):
        killed.add_step(record(step))
    killed.close()
    again = TensorBoardWriter(tmp_path, resumed_from)
    if not resumed_from:
        again.add_scores(make_score_board([], [0.5, 0.5]), 0)
    for step in range(resumed_from + 1, 9):
        again.add_step(record(step))
    again.close()
    events = read_events(tmp_path)
    assert [step for step, _ in scalars(events, "train/loss")] == list(range(1, 9))
    assert scalars(events, "task/a/score") == [(0, 0.5)]


def cell(picture: np.ndarray, row: int, column: int, tasks: int, rows: int = 0, inset: int = 6) -> tuple[int, ...]:
    """A pixel near the upper left corner of a cell: its filling, or with an inset of 3 its edge."""
    x, y = corner(picture, row, column, tasks, rows)
    return tuple(picture[y + inset, x + inset].tolist())


def corner(picture: np.ndarray, row: int, column: int, tasks: int, rows: int = 0) -> tuple[int, int]:
    """The upper left corner of a cell, counted from the picture's lower right, where names are short."""
    x = picture.shape[1] - (4 + MARGIN + CELL_WIDTH * (tasks - column)) * SCALE
    y = picture.shape[0] - (4 + MARGIN + CELL_HEIGHT * ((rows or tasks) - row)) * SCALE
    return x, y


def has_number(picture: np.ndarray, row: int, column: int, tasks: int) -> bool:
    x, y = corner(picture, row, column, tasks)
    inside = picture[y + 6 : y + CELL_HEIGHT * SCALE - 6, x + 6 : x + CELL_WIDTH * SCALE - 6]
    return bool((inside != inside[0, 0]).any())


def test_a_cell_shows_its_score_and_no_other() -> None:
    matrix = [[0.2, 0.4, None], [0.6, 0.2, 1.0]]
    tasks = ("x", "y", "z")
    whole = score_picture(make_score_board(matrix, [0.0, 0.4, 0.6], tasks))
    colour = {
        score: cell(whole, row, column, 3)
        for score, row, column in ((0.2, 0, 0), (0.4, 0, 1), (0.6, 1, 0), (1.0, 1, 2))
    }
    assert len(set(colour.values())) == 4
    assert cell(whole, 1, 1, 3) == colour[0.2]
    assert cell(whole, -1, 1, 3) == colour[0.4]
    assert cell(whole, -1, 2, 3) == colour[0.6]
    assert has_number(whole, -1, 0, 3)  # 0.0
    assert not has_number(whole, 0, 2, 3)
    assert not has_number(whole, 2, 0, 3)
    colour[0.0] = cell(whole, -1, 0, 3)
    assert len(set(colour.values())) == 5
    brightness = [sum(colour[score]) for score in sorted(colour)]
    assert brightness == sorted(brightness, reverse=True)


def test_the_score_right_after_a_task_is_framed() -> None:
    whole = score_picture(make_score_board([[0.2, 0.4, 0.6]] * 3, [0.2] * 3, ("x", "y", "z")))
    places = [(row, column) for row in range(-1, 3) for column in range(3)]
    framed = {place for place in places if cell(whole, *place, 3, inset=3) == ImageColor.getrgb(LOW_INK)}
    assert framed == {(0, 0), (1, 1), (2, 2)}


@pytest.mark.parametrize("count", [1, 5, 15])
def test_the_picture_keeps_its_size_and_fits_its_names(count: int) -> None:
    names = tuple(f"task{i:03d}_with_a_long_name_{i}" for i in range(count))
    sizes = {score_picture(make_score_board([[0.5] * count] * rows, None, names)).shape for rows in range(count + 1)}
    assert len(sizes) == 1
    picture = score_picture(make_score_board([], None, names))
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    edge = np.concatenate([picture[:4].ravel(), picture[-4:].ravel(), picture[:, :4].ravel(), picture[:, -4:].ravel()])
    assert (edge == 255).all()
