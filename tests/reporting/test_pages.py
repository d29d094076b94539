"""The HTML and Markdown reports: complete, self-contained, with all names escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dscl.monitoring.heat_map import HeatMap
from dscl.reporting import report
from dscl.reporting.charts import NUM_COLOURS, axis_ticks, draw_heat_map_svg
from dscl.reporting.markdown import escape_markdown
from dscl.reporting.published import TRACE
from dscl.reporting.style import STYLE
from dscl.utils.errors import ExternalFailure, UserError
from tests.reporting.example_runs import write_comparison, write_run

VOID = ("meta", "br")
ODD = '<b>&"|`*_'


class Page(HTMLParser):
    """A parsed page: its tags, which must all be closed, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.places: list[tuple[str, dict[str, str], list[str]]] = []  # tag, its attributes, classes that surround it
        self.classes: list[str] = []  # of the open tags
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        named = {name: value or "" for name, value in attributes}
        self.places.append((tag, named, list(self.classes)))
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append(named.get("class", ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def write_example_folder(folder: Path, tasks: tuple[str, ...] = ("one", "two")) -> None:
    """Write a comparison with all kinds of entries and its runs."""
    count = len(tasks)
    scores = [[0.5 if j <= i else 0.1 for j in range(count)] for i in range(count)]
    shares = [[float(i == j) for j in range(count + 1)] for i in range(count)]
    routing = {
        "routing_accuracy": [[1.0] * count] * count,
        "oracle_task_id": {"matrix": scores, "summary": {"OP": 0.6, "BWT": 0.0}},
        "confusion": {"tasks": list(tasks), "answered_by": [*tasks, None], "shares": shares},
    }
    numbers = {"capacity_bytes": 5000.0, "lora_per_task_bytes": 9000.0}
    asr = {"scores": scores, "tasks": tasks, "zero_shot": [0.1] * count, "numbers": numbers, **routing}
    for seed in (0, 1):
        write_run(folder / f"runs/asr/seed-{seed}", f"seed={seed}", "method.name=asr", **asr)
    write_run(folder / "runs/free/seed-0", scores=scores, tasks=tasks)
    write_run(folder / "runs/free/seed-1", "seed=1", scores=scores[:1], tasks=tasks)
    write_run(folder / "runs/free/dev", "evaluate.split=dev", scores=scores, tasks=tasks)
    failed = [{"row": "free", "run": "free: seed 1", "status": 1, "message": "out of <memory>", "log": "free.log"}]
    trials = {"0.001": {"OP": 0.5, "BWT": -0.1}, "0.01": {"OP": 0.25, "BWT": None}}
    rows = {
        f"free {ODD}": {"trials": trials, "learning_rate": 0.001, "runs": ["runs/free/seed-0"], "failed": failed},
        "asr": {"trials": {}, "learning_rate": 0.001, "runs": ["runs/asr/seed-0", "runs/asr/seed-1"], "failed": []},
    }
    rates = {f"free {ODD}": [0.001, 0.01, 0.1], "asr": [0.001]}
    write_comparison(folder, rows, learning_rates=rates, max_forgetting=0.1, deviations=[f"free: {ODD}"])


def render_report(tmp_path: Path, *runs: Path) -> tuple[str, str]:
    paths = report.write_report(runs or [tmp_path / "all"], tmp_path / "out")
    assert paths == [tmp_path / "out" / "report.html", tmp_path / "out" / "report.md"]
    html, markdown = (path.read_text("utf-8") for path in paths)
    return html, markdown


@pytest.mark.parametrize(
    "tasks", [("one",), ("one", "two"), (ODD, "情感分析"), TRACE, tuple(f"task{i}" for i in range(30))]
)
def test_html_is_well_formed_and_loads_nothing(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    write_example_folder(tmp_path / "all", tasks)
    html, _ = render_report(tmp_path)
    page = Page(html)
    fetching = [(name, value) for name, value in page.attributes if name in ("src", "srcset", "data", "xlink:href")]
    assert fetching == []
    assert not {"script", "link", "img", "iframe", "object", "image", "use", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name == "href"]
    assert all(re.fullmatch(r"#table-\d+|https://arxiv\.org/abs/[\d.]+", link) for link in links)
    assert html.count("http") == sum(link.startswith("http") for link in links) == (2 if tasks == TRACE else 0)
    assert not re.search(r"url\(|@import|@font-face|expression\(", html)
    assert all(not name.startswith("on") and name != "style" for name, _ in page.attributes)
    assert page.tags.count("table") > 4
    for part in ("Score matrices", "Every task over time", "Routing of prompts at the end", "Training loss"):
        assert part in page.texts


def css_rules(selector: str) -> str:
    """The declarations of a selector outside of media queries."""
    return " ".join(re.findall(rf"(?:^|\}} ){re.escape(selector)} {{([^}}]*)}}", STYLE.split("@media (max")[0], re.M))


def test_whatever_is_wider_than_the_page_scrolls_in_its_own_box_with_a_visible_edge(tmp_path: Path) -> None:
    """Tables and heat maps keep their size. A shadow stands at the edge of a box that hides something."""
    write_example_folder(tmp_path / "all", TRACE)
    page = Page(render_report(tmp_path)[0])
    wide = [(tag, around) for tag, named, around in page.places if tag == "table" or named.get("class") == "map"]
    assert len(wide) > 8
    assert all("scroll" in around for _, around in wide)
    scroll = css_rules(".scroll")
    assert "overflow-x: auto" in scroll
    for side in ("left", "right"):  # the cover moves with the content, the shadow stays with the box
        assert re.search(rf"var\(--card\) [^,]*, transparent\) {side} [^,]*no-repeat local", scroll)
        assert re.search(rf"var\(--shade\) [^,]*, transparent\) {side} [^,]*no-repeat scroll", scroll)
    assert STYLE.count("--shade:") == 2  # light and dark


def test_charts_fill_their_place_on_the_page(tmp_path: Path) -> None:
    """Charts scale by their viewBox. A chart of full width has a second form for narrow screens."""
    write_example_folder(tmp_path / "all")
    page = Page(render_report(tmp_path)[0])
    drawings = [named for tag, named, _ in page.places if tag == "svg" and "role" in named]
    assert all(re.fullmatch(r"0 0 \d+ \d+", named["viewbox"]) for named in drawings)
    charts = [named["class"] for named in drawings if named["class"].startswith("chart")]
    assert all("width" not in named for named in drawings if named["class"] in charts)
    assert charts.count("chart wide") == charts.count("chart narrow") > 0
    assert "width: 100%; height: auto" in css_rules(".chart")
    assert "min-width" not in css_rules(".chart") + css_rules(".wide") + css_rules(".narrow")
    assert "display: none" in css_rules(".narrow")
    assert "@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } }" in STYLE


def test_names_are_escaped(tmp_path: Path) -> None:
    write_example_folder(tmp_path / "all", (ODD, "two"))
    html, markdown = render_report(tmp_path)
    page = Page(html)
    assert "b" not in page.tags
    assert f"{ODD} → two" in page.texts
    assert any(f"free {ODD}" in text for text in page.texts)
    assert any("out of <memory>" in text for text in page.texts)
    assert "<b>" not in markdown
    assert markdown.count('&lt;b&gt;&amp;"\\|\\`\\*\\_ → two') == 2


def test_markdown_tables_have_equal_columns(tmp_path: Path) -> None:
    write_example_folder(tmp_path / "all", (ODD, "two"))
    _, markdown = render_report(tmp_path)
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_markdown_of_a_small_report(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "seed=1", scores=((0.6, None), (0.6, 0.7)))
    write_run(tmp_path / "c", "method.name=osft", scores=((0.5, None),))
    _, markdown = render_report(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert markdown.splitlines() == [
        "# dscl report",
        "",
        "3 runs in 1 table; 1 not averaged, for the reasons below",
        "",
        "## 1. one → two",
        "",
        "model: base · training samples: 50 · epochs: 1 · batch: 8 · length: 64 · precision: fp32 · split: test"
        " · samples scored: 20 · metric: accuracy · answers: ranked",
        "",
        "| method | seeds | OP | BWT | FWT | forgetting |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| sequential | 2 (0, 1) | 0.700 ± 0.071 | -0.100 ± 0.141 | - | 0.100 ± 0.141 |",
        "| osft | none finished | - | - | - | - |",
        "",
        "| method | tokens | training |",
        "| --- | ---: | ---: |",
        "| sequential | 40 | 4s |",
        "| osft | - | - |",
        "",
        f"- {escape_markdown(str(tmp_path / 'c'))}, osft, seed 0: unfinished: 1 of 2 tasks scored, 2 steps done, "
        "the last of one;"
        " not averaged",
        "- ± is the sample standard deviation over seeds",
    ]


def test_comparison_lists_all_trials(tmp_path: Path) -> None:
    write_example_folder(tmp_path / "all")
    _, markdown = render_report(tmp_path)
    name = escape_markdown(f"free {ODD}")
    assert (
        "Learning rates tried; chosen: the highest OP on the dev split, among the rates whose BWT there is at least "
        "-0.1 if there are any."
    ) in markdown
    assert (
        f"""
| row | lr | OP on dev | BWT on dev | chosen |
| --- | ---: | ---: | ---: | ---: |
| {name} | 0.001 | 0.500 | -0.100 | yes |
| {name} | 0.01 | 0.250 | - |  |
| {name} | 0.1 | - | - |  |
| asr | 0.001 | - | - | yes |
"""
        in markdown
    )
    assert "| free: seed 1 | 1 | out of &lt;memory&gt; | free.log |" in markdown
    assert markdown.count(f"| {name} | 1 (0) |") == 2  # its run, and its trial, which lies beside it


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"rows": 3}', '{"rows": {"a": []}}', '{"stream": "", "learning_rates": {}, "rows": {"a": {}}}'],
)
def test_damaged_comparison_is_reported(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "all" / "a")
    (tmp_path / "all" / "comparison.json").write_text(content)
    html, markdown = render_report(tmp_path)
    assert "comparison.json is damaged" in html
    assert "comparison.json is damaged" in markdown
    assert "| sequential | 1 (0) |" in markdown


def test_report_without_readable_runs_gives_the_reason(tmp_path: Path) -> None:
    (write_run(tmp_path / "all") / "recipe.yaml").write_text("- 1")
    html, markdown = render_report(tmp_path)
    Page(html)
    assert "recipe.yaml is damaged" in html
    assert "## Not read" in markdown


def test_joint_training_has_one_matrix_row_and_no_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "all", "method.name=joint", scores=((None, None), (0.4, 0.6)))
    html, markdown = render_report(tmp_path)
    assert "| joint | 1 (0) | 0.500 | - | - | - |" in markdown
    assert html.count('class="heat"') == 2
    assert 'class="none"' not in html
    assert "Every task over time" not in html


def test_unwritable_output_folder_is_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="which is a file"):
        report.write_report([folder], tmp_path / "file")
    with pytest.raises(ExternalFailure, match="cannot be written"):
        report.write_report([folder], tmp_path / "file" / "out")


def test_heat_map_numbers_have_enough_contrast() -> None:
    """Ink against a cell of any score, light and dark: a contrast of 4 at least."""
    for ground, theme in (("--card", 0), ("--card", 1)):
        values = [dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]{6})", block)) for block in STYLE.split("@media screen")][
            theme
        ]
        for i in range(101):
            cell = _blend(values[ground], values["--heat"], i / 100)
            svg = draw_heat_map_svg("", HeatMap([[i / 100]], ["a"], ["b"]))
            ink = values["--high" if 'class="high"' in svg else "--low"]
            assert _contrast(_blend(ink, ink, 0.0), cell) > 4.0


def test_every_colour_has_a_css_class() -> None:
    assert len(re.findall(r"^\.c\d ", STYLE, re.MULTILINE)) == NUM_COLOURS


@pytest.mark.parametrize("maximum", [1e-6, 0.3, 0.999, 1.0, 5.0, 7.3, 1234.0, 2.5e9])
def test_axis_has_few_ticks_that_reach_the_maximum(maximum: float) -> None:
    ticks = axis_ticks(maximum)
    assert ticks[0] == 0.0
    assert 3 <= len(ticks) <= 6
    assert ticks[-2] < maximum <= ticks[-1] * (1 + 1e-9)


def test_non_finite_json_of_python_is_read(tmp_path: Path) -> None:
    """json.dumps writes NaN as a bare word. The report names such a score and does not call the file unreadable."""
    folder = write_run(tmp_path / "all")
    document = json.loads((folder / "scores.json").read_text())
    document["matrix"][1][1] = float("nan")
    (folder / "scores.json").write_text(json.dumps(document))
    assert "the score of two after two is nan" in render_report(tmp_path)[1]


def _blend(ground: str, over: str, share: float) -> list[float]:
    pairs = [(int(ground[i : i + 2], 16), int(over[i : i + 2], 16)) for i in (1, 3, 5)]
    return [a + (b - a) * share for a, b in pairs]


def _contrast(one: list[float], other: list[float]) -> float:
    def light(colour: list[float]) -> float:
        linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
