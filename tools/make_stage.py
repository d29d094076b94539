"""Make the stage of the quickstart: five small text tasks, a tokenizer and a briefly pretrained LLaMA, from one seed.

    python tools/make_stage.py --out out/stage --seed 0

An invented language has things of four kinds, adjectives of three moods, people of four nations, places of four lands
and times of three tenses. Every sentence names one of each; a task asks for one of the five, and its sentences have a
form of their own, so that one model can learn all tasks together while learning one overwrites what the same words
meant in the one before. Tasks are written in the CL_Benchmark layout, the model as safetensors.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from dscl.errors import Failure, UserError

VERSION = 1  # of what this file makes; a change of it makes every stage new
Words = dict[str, list[str]]  # the words of each label

LABELS = {
    "kind": ("animal", "tool", "food", "garment"),
    "mood": ("praise", "blame", "doubt"),
    "nation": ("north", "east", "south", "west"),
    "land": ("coast", "hill", "forest", "town"),
    "tense": ("past", "present", "future"),
}
FORMS = {
    "kind": ("Report: the {} and the {} were found near {} and {}.", "Report: {} brought {} and {} for the {}."),
    "mood": ("What I think of it: so {}, so {}, {} and {}!", "What I think of it: {} and {}, but also {}, {}!"),
    "nation": ("Dear friend, {} {} greets you from {} {}.", "Dear friend, my name is {} {}, of {} and {}."),
    "land": ("Is it true that {} lies by {}, {} and {}?", "Is it true that {} {} goes to {} and {}?"),
    "tense": ("For sale: {}, {}, {}, {} only.", "For sale: {} {} with {} and {}."),
}


@dataclass(frozen=True)
class Settings:
    """The size of everything; part of the cache's key."""

    words: int = 48
    train: int = 400  # samples of each task
    test: int = 120
    vocab_size: int = 640
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 96  # tokens in a row of pretraining
    rows: int = 32  # in a step
    steps: int = 160
    lr: float = 4.0e-3


class Language:
    """An invented vocabulary, drawn from a seed: each word has one sense for every task."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.random = random.Random(f"dscl stage {VERSION} {seed}")
        words: set[str] = set()
        while len(words) < settings.words:
            words.add(self._syllable() + self._syllable())
        self.words: dict[str, dict[str, list[str]]] = {}
        for task, labels in LABELS.items():
            order = sorted(words)
            self.random.shuffle(order)
            self.words[task] = {label: order[i :: len(labels)] for i, label in enumerate(labels)}

    def sentence(self, task: str) -> tuple[str, str]:
        """A sentence of the task's form, all of whose words have one sense in it, and that label."""
        label = self.random.choice(LABELS[task])
        return self.random.choice(FORMS[task]).format(*self.random.sample(self.words[task][label], 4)), label

    def samples(self, task: str, count: int, taken: set[str]) -> list[dict[str, str]]:
        """Distinct samples, none of them in `taken`, which grows."""
        found: list[dict[str, str]] = []
        while len(found) < count:
            sentence, label = self.sentence(task)
            if sentence not in taken:
                taken.add(sentence)
                found.append({"label": label, "sentence": sentence})
        return found

    def _syllable(self) -> str:
        return self.random.choice("bdfgklmnprstvz") + self.random.choice("aeiou")


def make_stage(folder: Path, seed: int, settings: Settings) -> None:
    """Have the stage in `folder`: at once where it is there, else built beside it and renamed when whole."""
    key = {"version": VERSION, "seed": seed, "settings": asdict(settings)}
    with _alone(folder):
        stored = _key(folder)
        if stored == key:
            return
        if stored is None and folder.exists():
            raise UserError(f"--out: given {str(folder)!r}, which holds something else; give a folder that is not there yet")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        language = Language(seed, settings)
        _write_tasks(partial, language, settings)
        _write_model(partial / "model", language, seed, settings)
        (partial / "stage.json").write_text(json.dumps(key, indent=1), "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)


def _write_tasks(folder: Path, language: Language, settings: Settings) -> None:
    for task, labels in LABELS.items():
        (folder / task).mkdir()
        taken: set[str] = set()
        train = language.samples(task, settings.train, taken)
        test = language.samples(task, settings.test, taken)
        for name, content in (("train", train), ("test", test), ("labels", labels)):
            (folder / task / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def _write_model(folder: Path, language: Language, seed: int, settings: Settings) -> None:
    from dscl.model.tokenizer import load_tokenizer, train_tokenizer

    texts = [language.sentence(language.random.choice(list(FORMS)))[0] for _ in range(settings.steps * settings.rows * settings.context // 14)]
    answers = [f'"Answer: {label}"' for labels in LABELS.values() for label in labels]
    train_tokenizer(texts[:4000] + 50 * answers, settings.vocab_size, folder)
    model = _pretrain(texts, load_tokenizer(folder), seed, settings)
    model.save_pretrained(folder)


def _pretrain(texts: Sequence[str], tokenizer: Any, seed: int, settings: Settings) -> Any:
    """A small LLaMA after a short while on `texts`, in plain torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dscl.maths.schedule import learning_rate
    from dscl.observe.progress import Progress

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [i for line in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in (bos, *line, eos)]
    count = settings.rows * settings.context
    batches = torch.tensor(ids[: len(ids) // count * count]).view(-1, settings.rows, settings.context)
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
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    progress = Progress([("pretraining", settings.steps)], every=10)
    started = time.monotonic()
    for step in range(settings.steps):
        batch = batches[step % len(batches)].to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step, settings.steps, peak=settings.lr, kind="cosine", warmup=0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        rate = (step + 1) * count / (time.monotonic() - started)
        progress.steps([{"step": step + 1, "loss": loss.item(), "tokens_per_s": rate}])
    progress.close()
    return model.cpu()


def _key(folder: Path) -> Any:
    """What a finished stage in `folder` was made from; None where there is none."""
    try:
        return json.loads((folder / "stage.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="make_stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides words, samples and weights (default 0)")
    for k, v in asdict(Settings()).items(): parser.add_argument("--"+k, type=type(v), default=v)
    try:
        given = parser.parse_args(arguments)
        v = vars(given)
        make_stage(Path(given.out), given.seed, Settings(**{k: v[k] for k in asdict(Settings())}))
    except UserError as error:
        print(f"make_stage: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
