"""Tokenizers: load one from a model folder, or train a sentencepiece one on a stream's own text."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import models, normalizers
from transformers import AutoTokenizer, LlamaTokenizer

from dscl.utils.errors import UserError

Tokenizer = Any  # transformers' PreTrainedTokenizerBase; its own hints do not help callers

SETTINGS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}
TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "hard_vocab_limit": True,
    "character_coverage": 0.9995,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "num_threads": 1,  # the same pieces on every machine
    "minloglevel": 2,
}
SMALLEST_VOCABULARY = 300  # 256 byte pieces, three special ones, and room for some letters
LONGEST_LINE = 1000  # characters; sentencepiece silently leaves out a line of more than 4192 bytes
SPACE = "\u2581"  # how pieces write a space
# What readings of a file usually differ in: spaces, line ends, accents, ligatures, wide letters, other scripts.
PROBE = "  Two spaces, then:\n\t1234.5 \u00e4\u0301 \ufb01 \uff21   \u65e5\u672c \U0001f642 isn't it? "


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; a sentencepiece `tokenizer.model` without a tokenizer.json is read as LLaMA's."""
    model, settings = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if not any(file.is_file() for file in (model, settings, folder / "tokenizer.json")):
        raise UserError(
            f"{folder}: no tokenizer there; expected tokenizer.model, tokenizer.json or tokenizer_config.json"
        )
    try:
        if model.is_file() and not (folder / "tokenizer.json").is_file() and _is_llama(settings):
            tokenizer = _sentencepiece_tokenizer(folder, {} if settings.is_file() else SETTINGS)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
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
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=written, vocab_size=vocab_size, **TRAINING
        )
    except RuntimeError as error:
        most = re.search(r"<= (\d+)", str(error))
        reason = f"its text yields at most {most[1]}" if most else "too little text, or too many different letters"
        raise UserError(
            f"model.shape.vocab_size: given {vocab_size}; no tokenizer of so many pieces can be trained on this "
            f"stream: {reason}; give another vocab_size, or an existing tokenizer in model.tokenizer"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **SETTINGS}), "utf-8"
    )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _is_llama(settings: Path) -> bool:
    """Whether the settings, if any, leave the reading to LLaMA's tokenizer. (AutoTokenizer also looks at the model's
    kind, and reads the same file in another way beside a Mistral or a Qwen.)"""
    described = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    return described.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast")


def _sentencepiece_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.model"
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception:  # it has no error type of its own
        raise UserError(f"{path}: not a readable sentencepiece model; copy or download it again") from None
    tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True, **settings)
    _follow_sentencepiece(tokenizer, processor)
    if not _agrees(tokenizer, processor):
        raise UserError(
            f"{path}: not a LLaMA-style sentencepiece model (byte-pair encoding, with a space before the text, "
            "without normalisation), so it would be misread; add the tokenizer.json that belongs to it"
        )
    return tokenizer


def _follow_sentencepiece(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """Make the tokenizer encode plain text exactly as sentencepiece does.

    As transformers reads the file, merges go by id instead of score (LLaMA's runs of spaces come out wrong), a text's
    first space is lost, and "</s>" inside a text ends the sequence. A chat template needs that last one, so with a
    template it stays.
    """
    backend = tokenizer.backend_tokenizer
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    backend.model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges(processor, pieces),
        unk_token=pieces[processor.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.split_special_tokens = tokenizer.chat_template is None


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs that make up a piece, best score first; where scores are equal, the left part grows first."""
    known = set(pieces)
    ranked = []
    for i in _ordinary(processor):
        piece = pieces[i]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                ranked.append((-processor.get_score(i), -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _agrees(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether both encode alike: the probe, and a selection of the model's own pieces in a row."""
    ordinary = _ordinary(processor)
    own = "".join(processor.id_to_piece(i) for i in ordinary[:: len(ordinary) // 1000 + 1]).replace(SPACE, " ")
    encoded = tokenizer([PROBE, own], add_special_tokens=False, verbose=False)["input_ids"]
    return bool(encoded == processor.encode([PROBE, own]))


def _ordinary(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    kinds = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    return [i for i in range(processor.get_piece_size()) if not any(kind(i) for kind in kinds)]
