"""Make the quickstart's stage: five small text tasks, a tokenizer and a briefly pretrained LLaMA, from one seed.

    python tools/make_stage.py --out out/stage --seed 0
    python tools/make_stage.py --out out/ten --tasks 10

The texts are in an invented language. Every word has one sense per task, and the form of a sentence says which sense
counts: in a report a word stands for a kind of thing, in a letter for a nation. A sentence holds four words of the same
sense, and the task asks for that sense. So one model can learn all tasks jointly, while training on one task overwrites
what the words meant in another. Before the first task the model is pretrained on unlabelled text, in which a word that
goes with the sense follows each sentence. Tasks are written in the CL_Benchmark layout, the model as a folder with
safetensors and a sentencepiece tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from dscl.utils.cache import hold_file_lock
from dscl.utils.errors import UserError
from dscl.utils.quiet import silence_libraries

VERSION = 1  # version of the stages; after a change every stage is made anew
PER_SENTENCE = 4  # words of one sense in a sentence
COMPANIONS = 3  # words that go with each sense, in pretraining text only

LABELS = {
    "kind": ("animal", "tool", "food", "garment"),
    "mood": ("praise", "blame", "doubt"),
    "nation": ("north", "east", "south", "west"),
    "land": ("coast", "hill", "forest", "town"),
    "tense": ("past", "present", "future"),
    "craft": ("smith", "baker", "weaver", "mason"),
    "weather": ("rain", "snow", "wind"),
    "colour": ("red", "green", "blue", "white"),
    "hour": ("dawn", "noon", "night"),
    "age": ("child", "adult", "elder"),
}
FORMS = {
    "kind": ("Report: the {} and the {} were found near {} and {}.", "Report: {} brought {} and {} for the {}."),
    "mood": ("What I think of it: so {}, so {}, {} and {}!", "What I think of it: {} and {}, but also {}, {}!"),
    "nation": ("Dear friend, {} {} greets you from {} {}.", "Dear friend, my name is {} {}, of {} and {}."),
    "land": ("Is it true that {} lies by {}, {} and {}?", "Is it true that {} {} goes to {} and {}?"),
    "tense": ("For sale: {}, {}, {}, {} only.", "For sale: {} {} with {} and {}."),
    "craft": ("Wanted: {}, {}, {} or {}; good pay.", "Wanted at once: {} with {}, {} and {}."),
    "weather": ("Tomorrow {} and {}, then {} with {}.", "Tomorrow first {}, later {}, {} or {}."),
    "colour": ("On the wall {} stands above {}, {} and {}.", "On the wall: {} {} beside {} {}."),
    "hour": ("We meet when {} calls {}, {} and {}.", "We meet where {} {} ends, by {} and {}."),
    "age": ("Once upon a time {} met {}, {} and {}.", "Once there was {} {} of {} and {}."),
}


@dataclass(frozen=True)
class Settings:
    """All sizes of a stage. Other settings make another stage."""

    tasks: int = 5  # the first entries of LABELS
    words: int = 36
    train: int = 320  # samples of each task
    test: int = 100
    vocab_size: int = 640
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    steps: int = 300  # of pretraining, with five tasks
    batch: int = 64  # lines per step; each line is used once
    lr: float = 3.0e-3

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        return {task: LABELS[task] for task in list(LABELS)[: self.tasks]}

    @property
    def pretraining_steps(self) -> int:
        """`steps` scaled by the number of tasks, so that the form of each task occurs equally often."""
        return self.steps * self.tasks // 5


class Language:
    """An invented vocabulary from a seed. Each word has one sense per task."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self._random = random.Random(f"dscl stage {VERSION} {seed}")
        words: set[str] = set()
        while len(words) < settings.words:
            words.add(self._syllables(2))
        self._words: dict[str, dict[str, list[str]]] = {}
        self._companions: dict[str, list[str]] = {}
        for task, labels in settings.labels.items():
            order = sorted(words)
            self._random.shuffle(order)
            self._words[task] = {label: order[i :: len(labels)] for i, label in enumerate(labels)}
            self._companions |= {label: [self._syllables(3) for _ in range(COMPANIONS)] for label in labels}

    def sentence(self, task: str) -> tuple[str, str]:
        """A sentence in the task's form, whose words have the same sense, and the label of that sense."""
        label = self._random.choice(LABELS[task])
        words = self._random.sample(self._words[task][label], PER_SENTENCE)
        return self._random.choice(FORMS[task]).format(*words), label

    def samples(self, task: str, count: int) -> list[dict[str, str]]:
        """Distinct samples, as CL_Benchmark records."""
        label_of: dict[str, str] = {}
        while len(label_of) < count:
            sentence, label = self.sentence(task)
            label_of[sentence] = label
        return [{"label": label, "sentence": sentence} for sentence, label in label_of.items()]

    def text(self) -> str:
        """Unlabelled text: a sentence in any form, followed by a word that goes with its sense."""
        sentence, label = self.sentence(self._random.choice(list(self._words)))
        return f"{sentence}\nAnswer: {self._random.choice(self._companions[label])}"

    def _syllables(self, count: int) -> str:
        return "".join(self._random.choice("bdfgklmnprstvz") + self._random.choice("aeiou") for _ in range(count))


def make_stage(folder: Path, seed: int, settings: Settings) -> bool:
    """Make the stage in `folder`. Returns False if it exists already. The folder gets its name when it is complete."""
    key = {"version": VERSION, "seed": seed, "settings": asdict(settings)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_file_lock(folder.parent / f"{folder.name}.lock"):
        stored = _stored_key(folder)
        if stored == key:
            return False
        if stored is None and folder.exists():
            raise UserError(
                f"--out: given {str(folder)!r}, which holds something else; give a folder that does not exist yet"
            )
        partial = folder.parent / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        language = Language(seed, settings)
        _write_tasks(partial, language, settings)
        _write_model(partial / "model", language, seed, settings)
        (partial / "stage.json").write_text(json.dumps(key, indent=1), "utf-8")
        if stored is not None:
            shutil.rmtree(folder)
        os.replace(partial, folder)
    return True


def _write_tasks(folder: Path, language: Language, settings: Settings) -> None:
    for task, labels in settings.labels.items():
        (folder / task).mkdir()
        samples = language.samples(task, settings.train + settings.test)
        contents = {"train": samples[: settings.train], "test": samples[settings.train :], "labels": labels}
        for name, content in contents.items():
            (folder / task / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def _write_model(folder: Path, language: Language, seed: int, settings: Settings) -> None:
    from dscl.model.tokenizer import load_tokenizer, train_tokenizer

    texts = [language.text() for _ in range(settings.pretraining_steps * settings.batch)]
    # Labels are repeated, so that each becomes one piece. They stand in quotes, as sentencepiece would otherwise learn
    # "Answer" only with a space before it, which no prompt has.
    answers = [f'"Answer: {label}"' for labels in settings.labels.values() for label in labels]
    train_tokenizer(texts[:4000] + 200 * answers, settings.vocab_size, folder)
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lines = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]
    _pretrain(lines, seed, settings).save_pretrained(folder)


def _pretrain(lines: Sequence[list[int]], seed: int, settings: Settings) -> Any:
    """A small LLaMA, trained on one pass over the encoded lines in plain torch and fp32."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LlamaConfig, LlamaForCausalLM

    from dscl.maths.schedule import learning_rate
    from dscl.monitoring.progress import Progress

    torch.set_num_threads(1)  # weights do not depend on the number of cores; steps are too small for more threads
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=lines[0][0],
        eos_token_id=lines[0][-1],
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.98))
    progress = Progress([("pretraining", settings.pretraining_steps)], every=10)
    for step in range(settings.pretraining_steps):
        started = time.monotonic()
        batch = [torch.tensor(ids) for ids in lines[step * settings.batch : (step + 1) * settings.batch]]
        # Padding on the right is invisible to causal attention.
        inputs = pad_sequence(batch, batch_first=True).to(device)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100).to(device)
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.pretraining_steps, peak=settings.lr, kind="cosine", warmup=0.05)
        optimizer.step()
        optimizer.zero_grad()
        rate = sum(map(len, batch)) / (time.monotonic() - started)
        progress.show_steps([{"step": step + 1, "loss": loss.item(), "tokens_per_s": rate}])
    progress.close()
    return model.cpu()


def _stored_key(folder: Path) -> Any:
    """Version, seed and settings of the stage in `folder`; None if there is no stage."""
    try:
        return json.loads((folder / "stage.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"given {text!r}; a whole number of at least 0 is needed")
    return int(text)


def _tasks(text: str) -> int:
    if not (text.isdigit() and 1 <= int(text) <= len(LABELS)):
        raise argparse.ArgumentTypeError(f"given {text!r}; a whole number from 1 to {len(LABELS)} is needed")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(
        prog="make_stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the stage")
    parser.add_argument("--seed", default=0, type=_seed, metavar="N", help="seed of all contents (default 0)")
    parser.add_argument(
        "--tasks", default=5, type=_tasks, metavar="N", help=f"number of tasks, at most {len(LABELS)} (default 5)"
    )
    silence_libraries()
    try:
        options = parser.parse_args(arguments)
        started = time.monotonic()
        is_new = make_stage(options.out, options.seed, Settings(options.tasks))
    except UserError as error:
        print(f"make_stage: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_stage: {error.filename or '--out'} cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    outcome = f"made in {time.monotonic() - started:.0f} s" if is_new else "exists already"
    print(f"stage: {options.out} ({outcome})", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
