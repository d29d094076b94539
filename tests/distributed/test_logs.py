"""No prompt, answer or text of the data appears in a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.programs import Program
from tests.support.runs import recipe_of

WORD = "qUetZalcOatl"  # in every prompt, answer and text

BAD: dict[str, list[Any]] = {
    "jsonl": [
        {"prompt": f"{WORD} 1", "completion": [WORD]},
        {"prompt": {"text": WORD}, "completion": WORD},
        {"messages": [{"role": WORD, "content": WORD}, {"role": "assistant", "content": WORD}]},
        {"messages": [{"role": "user", "content": [WORD]}, {"role": "assistant", "content": WORD}]},
        {"messages": WORD},
        [WORD],
        WORD,
    ],
    "cl_benchmark": [
        {"sentence": WORD, "label": f"{WORD} of no label set"},
        {"sentence": [WORD], "label": f"{WORD} 0"},
        {"sentence": WORD, "label": {WORD: 1}},
        WORD,
    ],
    "superni": [{"input": WORD, "output": {"a": WORD}}, {"input": [WORD], "output": [WORD]}, {"input": WORD}, WORD],
}


def write_task(folder: Path, layout: str, bad_records: list[Any]) -> None:
    """Write the files of a task: first the bad records, then some valid ones."""
    folder.mkdir()
    if layout == "cl_benchmark":
        (folder / "labels.json").write_text(json.dumps([f"{WORD} 0", f"{WORD} 1"]))
    for split, size in (("train", 16), ("test", 4)):
        texts = [f"{split} {WORD} {number}" for number in range(size)]
        if layout == "jsonl":
            lines = [
                json.dumps(record)
                for record in (*bad_records, *({"prompt": text, "completion": WORD} for text in texts))
            ]
            (folder / f"{split}.jsonl").write_text("\n".join([*lines, f'{{"prompt": "{WORD}']))
        elif layout == "cl_benchmark":
            good = [{"sentence": text, "label": f"{WORD} {number % 2}"} for number, text in enumerate(texts)]
            (folder / f"{split}.json").write_text(json.dumps(bad_records + good))
        else:
            good = [{"input": text, "output": [WORD]} for text in texts]
            (folder / f"{split}.json").write_text(json.dumps({"Definition": [WORD], "Instances": bad_records + good}))


def recipe(folder: Path, **changes: Any) -> str:
    document = recipe_of(folder, "run", **changes)
    document["stream"] = [{"name": layout, "path": str(folder / layout)} for layout in BAD]
    document["data"]["bad_records"] = "skip"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_no_prompt_and_no_answer_lands_in_what_a_run_says(tmp_path: Path) -> None:
    for layout, bad in BAD.items():
        write_task(tmp_path / layout, layout, bad)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": f"{WORD} is a word of many tokens"}))
    document = recipe(
        tmp_path,
        observe={"every": 1, "live": "auto"},
        evaluate={"heldout": str(tmp_path / "texts.jsonl"), "max_new_tokens": 4},
        train__epochs=1,
        train__max_length=96,
    )
    program = Program(["train", document, "--nproc", "2"])
    output = "".join(program.communicate(120))
    assert program.returncode == 0, output
    assert output.count("skipped") == 2 * len(BAD)  # in both splits, so the bad records were read
    assert WORD not in output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert {"metrics.jsonl", "scores.json", "recipe.yaml", "tensorboard"} <= {
        part for path in files for part in path.relative_to(tmp_path / "run").parts
    }
    assert not [path for path in files if WORD.encode() in path.read_bytes()]


@pytest.mark.parametrize(("layout", "number"), [(layout, n) for layout, bad in BAD.items() for n in range(len(bad))])
def test_what_is_said_of_a_bad_record_is_where_it_stands(tmp_path: Path, layout: str, number: int) -> None:
    from dscl.config.parsing import parse_config
    from dscl.data.stream import load_stream
    from dscl.data.task import DataConfig, TaskConfig
    from dscl.utils.errors import UserError

    write_task(tmp_path / layout, layout, BAD[layout][number : number + 1])
    config = parse_config(TaskConfig, {"name": "t", "path": str(tmp_path / layout)})
    with pytest.raises(UserError) as caught:
        load_stream([config], DataConfig("stop", str(tmp_path / "cache")), 0)
    assert str(tmp_path / layout / "train.json") in str(caught.value)
    assert WORD not in str(caught.value)


@pytest.mark.parametrize("line", [f'["{WORD}"]', f'{{"text": ["{WORD}"]}}', WORD])
def test_what_is_said_of_a_bad_text_is_where_it_stands(tmp_path: Path, line: str) -> None:
    from dscl.data.texts import read_texts
    from dscl.utils.errors import UserError

    (tmp_path / "texts.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1: ") as caught:
        read_texts(str(tmp_path / "texts.jsonl"), "evaluate.heldout")
    assert WORD not in str(caught.value)
