"""The quickstart's stage: equal for equal seeds, learnable, made once, and never left incomplete."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dscl.data.stream import load_stream
from dscl.data.task import DataConfig, TaskConfig
from dscl.model.tokenizer import load_tokenizer
from dscl.utils.errors import UserError
from tools import make_stage as stage

TINY = stage.Settings(train=60, test=20, vocab_size=420, hidden_size=32, layers=1, heads=2, steps=40, batch=32, lr=0.01)
TEN = stage.Settings(tasks=10)


@pytest.fixture(scope="module")
def stage_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "stage"
    assert stage.make_stage(folder, 3, TINY)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder: Path, task: str, split: str) -> Any:
    return json.loads((folder / task / f"{split}.json").read_text("utf-8"))


def test_one_seed_makes_the_same_bytes_and_another_seed_other_ones(stage_folder: Path, tmp_path: Path) -> None:
    stage.make_stage(tmp_path / "again", 3, TINY)
    stage.make_stage(tmp_path / "other", 4, TINY)
    assert content(tmp_path / "again") == content(stage_folder)
    same = {name for name, value in content(tmp_path / "other").items() if value == content(stage_folder)[name]}
    assert not {name for name in same if name.endswith(("train.json", "test.json", ".safetensors", "tokenizer.model"))}


def test_the_words_do_not_depend_on_the_process() -> None:
    """Python orders sets of strings differently in every process unless PYTHONHASHSEED is set."""
    program = "from tools.make_stage import Language, Settings; print(Language(0, Settings()).samples('kind', 20))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(stage.__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in ("1", "2")
    }
    assert len(outputs) == 1
    assert "Report" in outputs.pop()


def test_the_trainer_reads_the_tasks_as_they_are(stage_folder: Path) -> None:
    configs = [TaskConfig(name=name, path=str(stage_folder / name), dev_share=0.0) for name in TINY.labels]
    assert len(configs) == 5
    for task in load_stream(configs, DataConfig(), seed=0):
        assert (task.labels, task.metric) == (stage.LABELS[task.name], "accuracy")
        assert (len(task.train), len(task.test)) == (TINY.train, TINY.test)
        assert {sample.answer for sample in (*task.train, *task.test)} == set(stage.LABELS[task.name])
        prompts = [sample.prompt for sample in (*task.train, *task.test)]
        assert len(set(prompts)) == len(prompts), "a prompt occurs twice"


def test_the_words_decide_the_label_and_every_task_means_another_thing_by_them() -> None:
    """A classifier by word counts learns every task, but the counts of one task are useless for the others."""
    language = stage.Language(0, TEN)
    known: dict[str, dict[str, Counter[int]]] = {}
    tests = {}
    for task, labels in stage.LABELS.items():
        samples = language.samples(task, 420)
        known[task] = defaultdict(Counter)
        for sample in samples[:320]:
            for word in re.findall(r"\w+", sample["sentence"]):
                known[task][word][labels.index(sample["label"])] += 1
        tests[task] = samples[320:]

    def score(task: str, by: str) -> float:
        right = 0
        for sample in tests[task]:
            votes: Counter[int] = Counter()
            for word in re.findall(r"\w+", sample["sentence"]):
                seen = known[by].get(word, Counter())
                if seen and max(seen.values()) == seen.total():  # words of the form occur with every label
                    votes += seen
            right += bool(votes) and votes.most_common(1)[0][0] == stage.LABELS[task].index(sample["label"])
        return right / len(tests[task])

    assert min(score(task, by=task) for task in stage.LABELS) >= 0.98
    others = [score(task, by=by) for task in stage.LABELS for by in stage.LABELS if by != task]
    assert sum(others) / len(others) < 0.45  # by chance 0.25 to 0.33


def test_the_form_tells_the_task() -> None:
    starts = {task: {form.split("{")[0].strip()[:6] for form in forms} for task, forms in stage.FORMS.items()}
    everything = [start for each in starts.values() for start in each]
    assert len(set(everything)) == len(everything)


def test_pretraining_text_holds_no_label() -> None:
    language = stage.Language(0, TEN)
    words = set(re.findall(r"\w+", " ".join(language.text() for _ in range(3000))))
    assert not words & {label for labels in stage.LABELS.values() for label in labels}


@pytest.mark.parametrize("tasks", [5, 10])
def test_labels_are_single_pieces(tmp_path: Path, tasks: int) -> None:
    """Ranking sums over the tokens of a label, so labels of many pieces would be harder to learn than the tasks."""
    settings = stage.Settings(tasks, hidden_size=32, layers=1, heads=2, steps=16, batch=250)
    stage.make_stage(tmp_path / "s", 0, settings)
    tokenizer = load_tokenizer(tmp_path / "s" / "model")
    pieces = {label: tokenizer.tokenize(label) for labels in settings.labels.values() for label in labels}
    assert {label: split for label, split in pieces.items() if len(split) > 1} == {}


def test_the_model_has_learnt_from_the_text(stage_folder: Path) -> None:
    tokenizer = load_tokenizer(stage_folder / "model")
    model = LlamaForCausalLM.from_pretrained(stage_folder / "model", use_safetensors=True)
    language = stage.Language(3, TINY)
    losses = []
    for _ in range(20):
        text = tokenizer(language.text(), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.bos_token_id, *text, tokenizer.eos_token_id]])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 0.6 * math.log(TINY.vocab_size)


def test_a_second_start_finds_it_and_another_seed_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    assert stage.make_stage(folder, 0, TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not stage.make_stage(folder, 0, TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (folder / "leftover").touch()
    assert stage.make_stage(folder, 1, TINY)
    assert not (folder / "leftover").exists()


def test_an_end_halfway_leaves_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write_model", full)
        with pytest.raises(OSError, match="No space"):
            stage.make_stage(folder, 0, TINY)
    assert not folder.exists()
    (tmp_path / "s.partial" / "stray").touch()
    stage.make_stage(folder, 0, TINY)
    assert not (folder / "stray").exists()
    assert (folder / "stage.json").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        stage.make_stage(tmp_path, 0, TINY)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--out"),
        (["--out"], "--out"),
        (["--out", "x", "--seed", "many"], "'many'"),
        (["--out", "x", "--seed", "-1"], "-1"),
        (["--out", "x", "--see", "1"], "--see"),
        (["--out", "."], "holds something else"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stage.main(arguments) == 2
    stderr = capsys.readouterr().err
    assert named in stderr
    assert stderr.count("\n") == 1
