"""Route real text through an export: test prompts of its tasks, and text of no task, which should be rejected.

dscl train launch/recipes/cl-benchmark-small.yaml folder=data run_dir=out/text
dscl export out/text out/text-export
python tools/reject_on_text.py out/text-export --data data
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import dscl

TEMPLATE = "{}\nAnswer:"  # the template of cl_benchmark folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="a folder written by dscl export")
    parser.add_argument("--data", type=Path, required=True, help="a folder with base/ and cl_benchmark/")
    parser.add_argument("--count", type=int, default=200, help="prompts of each source (default 200)")
    options = parser.parse_args()
    model = dscl.load(options.export)
    sources = {
        folder.name: sentences(folder / "test.json") for folder in sorted((options.data / "cl_benchmark").iterdir())
    }
    with open(options.data / "base" / "heldout.jsonl", encoding="utf-8") as lines:
        sources["held-out text"] = [next(iter(json.loads(line).values())) for line in lines]
    print("| text | its own task | another task | rejected | mostly to |\n|---|---|---|---|---|")
    for is_task in (True, False):
        for name, texts in sources.items():
            if (name in model.tasks) is not is_task:
                continue
            sample = random.Random(0).sample(texts, min(options.count, len(texts)))
            counts = Counter(route.task for route in model.route([TEMPLATE.format(text) for text in sample]))
            own, rejected = counts.pop(name, 0) / len(sample), counts.pop(None, 0) / len(sample)
            destinations = ", ".join(f"{task} {count / len(sample):.3f}" for task, count in counts.most_common(2))
            row_title, own_share = (name, f"{own:.3f}") if is_task else (f"{name} (no task)", "-")
            print(
                f"| {row_title} | {own_share} | {1 - own - rejected:.3f} | {rejected:.3f} | {destinations} |",
                flush=True,
            )


def sentences(path: Path) -> list[str]:
    return [record["sentence"] for record in json.loads(path.read_text("utf-8"))]


if __name__ == "__main__":
    main()
