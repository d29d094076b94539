"""The recipes of dscl load their streams from folders in the layout of each benchmark, each with its metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.data import task as settings
from dscl.data.stream import load_stream
from dscl.data.task import Sample, Task
from dscl.recipe.recipe import read_recipe
from dscl.training.evaluation import METRICS

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"

# A prompt, its answer, and an answer that is wrong or half right, as each TRACE task has them.
TRACE = {
    "C-STANCE": ("文本\n今天天气很好。\n对象\n天气\n态度\n", "A", "B"),
    "FOMC": ("Text:\nInflation is well above the goal.\nStance:", "B", "A"),
    "MeetingBank": ("Meeting transcripts:\nThe vote on the park is open.\nSummary:", "A vote on the park.", "A vote."),
    "Py150": ("<s> import os <EOL> x = <NUM_LIT:1> <EOL>", "y = <NUM_LIT:2>", "y = <NUM_LIT:3>"),
    "ScienceQA": ("Question:\nWhich is cold?\nChoices:\nA. ice\nB. fire\n\nAnswer:", "A\nBecause ice is frozen.", "B"),
    "NumGLUE-cm": ("Question: How many legs have two cats?\nAnswer: ", "8", "4"),
    "NumGLUE-ds": ("Question: What is 7 plus 5?\nAnswer: ", "12", "2"),
    "20Minuten": ("Paragraph:\nDer Rat beriet lange über den Bau.\nSimplified:", "Der Rat sprach über den Bau.", "Rat"),
}
TRACE_METRICS = {
    **dict.fromkeys(("C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds"), "exact_match"),
    **{"MeetingBank": "rouge_l", "Py150": "code_similarity", "ScienceQA": "first_letter", "20Minuten": "sari"},
}
CL_BENCHMARK = {
    "NLI/MNLI": ["neutral", "entailment", "contradiction"],
    "NLI/CB": ["entailment", "contradiction", "neutral"],
    "NLI/RTE": ["contradiction", "entailment"],
    "WiC/WiC": ["True", "False"],
    "COPA/COPA": ["A", "B"],
    "QQP/QQP": ["False", "True"],
    "BoolQA/BoolQA": ["True", "False"],
    "MultiRC/MultiRC": ["False", "True"],
    "SC/IMDB": ["Good", "Bad"],
    "SC/SST-2": ["Good", "Bad"],
    "SC/yelp": ["very negative", "negative", "neutral", "positive", "very positive"],
    "SC/amazon": ["very negative", "negative", "neutral", "positive", "very positive"],
    "TC/dbpedia": ["Company", "Educational Institution", "Artist"],
    "TC/agnews": ["World", "Sports", "Business", "Science or Technology"],
    "TC/yahoo": ["Society & Culture", "Science & Mathematics", "Health"],
}
SUPERNI = {
    "task1572_samsum_summary": "Ann will bring the cake.",
    "task363_sst2_polarity_classification": "POS",
    "task1290_xsum_summarization": "A bridge was closed.",
    "task181_outcome_extraction": "survival",
    "task002_quoref_answer_generation": "Ann",
    "task1510_evalution_relation_extraction": "IsA",
    "task639_multi_woz_user_utterance_generation": "I need a train.",
    "task1729_personachat_generate_next": "I like dogs too.",
    "task073_commonsenseqa_answer_generation": "C",
    "task1590_diplomacy_text_generation": "Let us talk.",
    "task748_glucose_reverse_cause_event_detection": "Ann was hungry >Causes> Ann eats",
    "task511_reddit_tifu_long_text_summarization": "I lost my keys.",
    "task591_sciq_answer_generation": "oxygen",
    "task1687_sentiment140_classification": "positive",
    "task875_emotion_classification": "joy",
}
SENTIMENT = ("task363", "task1687", "task875")
SMALL = ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq")
STAGE = ("kind", "mood", "nation", "land", "tense")


def write_json(path: str, content: Any) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_trace() -> None:
    """The layout of LLM-CL-Benchmark_5000 in the archive of TRACE."""
    for name, (prompt, answer, _) in TRACE.items():
        for split, count in (("train", 4), ("eval", 2), ("test", 2)):
            samples = [{"prompt": f"{split} {i} {prompt}", "answer": answer} for i in range(count)]
            write_json(f"data/TRACE/{name}/{split}.json", samples)


def write_labelled(folder: str, labels: list[str], split: str, count: int) -> list[dict[str, str]]:
    samples = [{"label": labels[i % len(labels)], "sentence": f"{split} sentence {i}"} for i in range(count)]
    write_json(f"{folder}/{split}.json", samples)
    return samples


def write_cl_benchmark() -> None:
    """The layout of CL_Benchmark: dev is a copy of test, and some test samples of MNLI have no label."""
    for name, labels in CL_BENCHMARK.items():
        folder = f"data/CL_Benchmark/{name}"
        write_json(f"{folder}/labels.json", labels)
        write_labelled(folder, labels, "train", 6)
        test = write_labelled(folder, labels, "test", 5)
        if name == "NLI/MNLI":
            write_json(
                f"{folder}/test.json", test := [*test, {"label": "-", "sentence": "test sentence nobody labelled"}]
            )
        write_json(f"{folder}/dev.json", test)


def superni_document(task: str, outputs: Any, split: str, count: int) -> dict[str, Any]:
    example = {"input": "An example.", "output": "An answer.", "explanation": "Why."}
    return {
        "Contributors": ["Someone"],
        "Source": ["somewhere"],
        "Categories": ["Some Kind"],
        "Definition": [f"Do what {task} asks."],
        "Input_language": ["English"],
        "Positive Examples": [example],
        "Negative Examples": [example],
        "Instances": [{"id": f"{task}-{i}", "input": f"{split} input {i}", "output": outputs} for i in range(count)],
    }


def write_superni() -> None:
    """SAPT's CL_Benchmark/SuperNI, whose outputs are single texts."""
    for name, answer in SUPERNI.items():
        for split, count in (("train", 4), ("dev", 2), ("test", 2)):
            write_json(f"data/SuperNI/{name}/{split}.json", superni_document(name, answer, split, count))


def write_small(root: str, names: tuple[str, ...]) -> None:
    for name in names:
        write_json(f"{root}/{name}/labels.json", ["yes", "no"])
        write_labelled(f"{root}/{name}", ["yes", "no"], "train", 6)
        write_labelled(f"{root}/{name}", ["yes", "no"], "test", 5)


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: recipes name their data relative to the directory in which dscl is started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_recipe_stream(recipe: str, *overrides: str) -> list[Task]:
    resolved = read_recipe(str(RECIPES / f"{recipe}.yaml"), overrides)
    return load_stream(resolved.stream, resolved.data, resolved.seed)


def published_orders(recipe: str) -> dict[int, list[str]]:
    """The values of `order` in a recipe by their numbers, also those in comments."""
    text = (RECIPES / f"{recipe}.yaml").read_text("utf-8").replace("\n#  ", "\n")
    orders = re.findall(r"^(?:# )?order: (\[[^]]*\]) *# (\d)$", text, re.MULTILINE)
    return {int(number): yaml.safe_load(names) for names, number in orders}


# The orders of the papers, which the recipes cite.
PUBLISHED_ORDERS = {
    "trace": {
        1: "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
        2: "NumGLUE-cm NumGLUE-ds FOMC 20Minuten C-STANCE Py150 MeetingBank ScienceQA",
    },
    "cl-benchmark": {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
        4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    },
    "superni": {
        1: "task1572 task363 task1290 task181 task002 task1510 task639 task1729 task073 task1590 task748 task511 "
        "task591 task1687 task875",
        2: "task748 task073 task1590 task639 task1572 task1687 task591 task363 task1510 task1729 task181 task511 "
        "task002 task1290 task875",
    },
}


@pytest.mark.parametrize("recipe", PUBLISHED_ORDERS)
def test_the_orders_are_the_published_ones(recipe: str) -> None:
    assert published_orders(recipe) == {number: order.split() for number, order in PUBLISHED_ORDERS[recipe].items()}


def check_tasks(tasks: list[Task], metric: Callable[[str], str]) -> None:
    for task in tasks:
        assert task.metric == metric(task.name), task.name
        assert task.train, task.name
        for sample in task.test:
            assert METRICS[task.metric](sample.answer, sample) == pytest.approx(1.0), task.name


FOLDERS: Mapping[str, Callable[[], None]] = {
    "trace": write_trace,
    "cl-benchmark": write_cl_benchmark,
    "superni": write_superni,
    "cl-benchmark-small": lambda: write_small("data/cl_benchmark", SMALL),
    "quickstart": lambda: write_small("out/stage-0", STAGE),
    "all-three": lambda: write_small("out/stage-0", STAGE),
}


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(FOLDERS)


@pytest.mark.parametrize("recipe", FOLDERS)
def test_a_recipe_loads_its_stream(recipe: str, working_dir: Path) -> None:
    FOLDERS[recipe]()
    assert read_recipe(str(RECIPES / f"{recipe}.yaml")).find_deepspeed_json().is_file()
    for task in load_recipe_stream(recipe):
        assert task.train, task.name
        assert task.test, task.name
        assert task.metric in METRICS


def test_the_metrics_of_the_recipe_are_those_of_the_evaluation() -> None:
    assert tuple(METRICS) == settings.METRICS


def test_trace(working_dir: Path) -> None:
    write_trace()
    orders = published_orders("trace")
    assert sorted(orders) == [1, 2]
    for number, order in orders.items():
        tasks = load_recipe_stream("trace", f"order={json.dumps(order)}")
        assert [task.name for task in tasks] == order, number
        assert set(order) == set(TRACE)
        check_tasks(tasks, TRACE_METRICS.__getitem__)
        for task in tasks:
            wrong = METRICS[task.metric](TRACE[task.name][2], task.test[0])
            assert 0.0 <= wrong < 1.0, task.name
            assert (len(task.dev), len(task.test)) == (2, 2)
    epochs = {task.name: task.settings.epochs for task in tasks}
    assert [epochs[name] for name in orders[1]] == [5, 3, 7, 5, 3, 5, 5, 7]


def test_trace_with_fewer_samples(working_dir: Path) -> None:
    write_trace()
    assert read_recipe(str(RECIPES / "trace.yaml")).stream[0].train_limit == 5000
    assert {len(task.train) for task in load_recipe_stream("trace", "stream_defaults.train_limit=3")} == {3}


def test_sari_is_of_the_prompt() -> None:
    sample = Sample("a b c", "a b d", ("a b d",), "made")
    assert METRICS["sari"]("a b", sample) == pytest.approx(3 / 4)  # worked out in tests/maths/test_text.py


def test_cl_benchmark(working_dir: Path) -> None:
    write_cl_benchmark()
    orders = published_orders("cl-benchmark")
    assert sorted(orders) == [1, 2, 3, 4, 5, 6]
    names = {name.split("/")[1]: labels for name, labels in CL_BENCHMARK.items()}
    for number, order in orders.items():
        assert set(order) == ({"dbpedia", "amazon", "yahoo", "agnews"} if number < 4 else set(names))
        assert len(order) == len(set(order))
    assert len({tuple(order) for order in orders.values()}) == 6
    tasks = load_recipe_stream("cl-benchmark", f"order={json.dumps(orders[6])}")
    check_tasks(tasks, lambda name: "accuracy")
    for task in tasks:
        assert task.labels == tuple(names[task.name])
        assert (len(task.train), task.dev, len(task.test)) == (6, (), 5)
        first = next(sample for sample in task.test if "sentence 0" in sample.prompt)
        assert first.prompt == f"test sentence 0\nOptions: {', '.join(names[task.name])}\nAnswer:"


def superni_metric(name: str) -> str:
    return "exact_match" if name in SENTIMENT else "rouge_l"


def test_superni(working_dir: Path) -> None:
    write_superni()
    orders = published_orders("superni")
    assert sorted(orders) == [1, 2]
    for order in orders.values():
        tasks = load_recipe_stream("superni", f"order={json.dumps(order)}")
        assert sorted(order) == sorted(name.split("_")[0] for name in SUPERNI)
        assert [Path(task.settings.path).name.split("_")[0] for task in tasks] == order
        check_tasks(tasks, superni_metric)
    assert {(len(task.train), len(task.dev), len(task.test)) for task in tasks} == {(4, 2, 2)}


def test_superni_as_it_was_published(working_dir: Path) -> None:
    """The published form: one file a task, with several references. The same recipe reads a folder around each."""
    for name, answer in SUPERNI.items():
        write_json(f"data/SuperNI/{name}/{name}.json", superni_document(name, [f"{answer} Indeed.", answer], "an", 20))
    tasks = load_recipe_stream("superni")
    check_tasks(tasks, superni_metric)
    for task in tasks:
        assert (len(task.train), len(task.dev), len(task.test)) == (16, 2, 2)
        answer = SUPERNI[Path(task.settings.path).name]
        assert METRICS[task.metric](answer, task.test[0]) == pytest.approx(1.0)


def test_the_small_stream(working_dir: Path) -> None:
    write_small("data/cl_benchmark", SMALL)
    tasks = load_recipe_stream("cl-benchmark-small")
    assert tuple(task.name for task in tasks) == SMALL
    check_tasks(tasks, lambda name: "accuracy")


def test_the_small_stream_of_real_text(shared_data: Path, working_dir: Path) -> None:
    (working_dir / "data").symlink_to(shared_data)
    tasks = load_recipe_stream("cl-benchmark-small")
    check_tasks(tasks, lambda name: "accuracy")
    assert {(len(task.train), len(task.test)) for task in tasks} == {(500, 200)}
