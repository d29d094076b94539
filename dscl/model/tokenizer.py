"""Tokenizers: load one from a model folder, or train a sentencepiece one on a stream's own text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer

from dscl.errors import UserError

Tokenizer = Any  # transformers' PreTrainedTokenizerBase; its own hints do not help callers

SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}
SMALLEST_VOCABULARY = 300  # 256 byte pieces, three special ones, and room for some letters


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; a bare sentencepiece `tokenizer.model` is read as LLaMA's."""
    described = [name for name in ("tokenizer_config.json", "tokenizer.json") if (folder / name).is_file()]
    if not described and not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder}: no tokenizer there; expected tokenizer.model, tokenizer.json or tokenizer_config.json")
    try:
        if described:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = LlamaTokenizer.from_pretrained(folder, **{k: v for k, v in SETTINGS.items() if "class" not in k})
    except Exception as error:  # transformers raises a different kind for every kind of damage
        raise UserError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token, so no answer could end; name one there")
    return tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills rows up; it is always masked, so any valid one serves."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a sentencepiece tokenizer of exactly `vocab_size` pieces, trained on `texts`, into `folder`."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.shape.vocab_size: given {vocab_size}; a tokenizer trained on the stream needs at least "
            f"{SMALLEST_VOCABULARY} pieces, or name an existing one in model.tokenizer"
        )
    written = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            hard_vocab_limit=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,  # the same pieces on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"model.shape.vocab_size: no tokenizer of {vocab_size} pieces can be trained on {len(lines)} lines of the "
            f"stream's text ({str(error).split(') ')[-1].strip()[:120]}); give a smaller vocab_size, or model.tokenizer"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS), "utf-8")
