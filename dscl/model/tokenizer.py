"""Tokenizers: load one from a model folder, or train a sentencepiece tokenizer on the stream's text."""

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

Tokenizer = Any  # PreTrainedTokenizerBase of transformers, whose annotations do not help callers

TOKENIZER_SETTINGS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}
SENTENCEPIECE_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "hard_vocab_limit": True,
    "character_coverage": 0.9995,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "num_threads": 1,  # for the same pieces on every machine
    "minloglevel": 2,
}
MIN_VOCAB_SIZE = 300  # 256 byte pieces, three special ones, and room for some letters
MAX_LINE_CHARS = 1000  # characters; sentencepiece silently leaves out a line of more than 4192 bytes
SPACE_PIECE = "\u2581"  # stands for a space in pieces
# Text on which wrong tokenizers usually differ: spaces, line ends, accents, ligatures, wide letters, other scripts.
PROBE_TEXT = "  Two spaces, then:\n\t1234.5 \u00e4\u0301 \ufb01 \uff21   \u65e5\u672c \U0001f642 isn't it? "


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the folder's tokenizer. Without a tokenizer.json, `tokenizer.model` is read as LLaMA's model file."""
    model, settings = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if not any(file.is_file() for file in (model, settings, folder / "tokenizer.json")):
        raise UserError(
            f"{folder}: no tokenizer there; expected tokenizer.model, tokenizer.json or tokenizer_config.json"
        )
    try:
        if model.is_file() and not (folder / "tokenizer.json").is_file() and _uses_llama_tokenizer(settings):
            tokenizer = _sentencepiece_tokenizer(folder, {} if settings.is_file() else TOKENIZER_SETTINGS)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token, so no answer could end; name one there")
    return tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The id used for padding. Padding is always masked, so any valid id will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a sentencepiece tokenizer of exactly `vocab_size` pieces, trained on `texts`, into `folder`."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.shape.vocab_size: given {vocab_size}; a tokenizer trained on the stream needs at least "
            f"{MIN_VOCAB_SIZE} pieces, or name an existing one in model.tokenizer"
        )
    model_bytes = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_split_lines(texts),
            model_writer=model_bytes,
            vocab_size=vocab_size,
            **SENTENCEPIECE_OPTIONS,
        )
    except RuntimeError as error:
        max_size = re.search(r"<= (\d+)", str(error))
        reason = (
            f"its text yields at most {max_size[1]}" if max_size else "too little text, or too many different letters"
        )
        raise UserError(
            f"model.shape.vocab_size: given {vocab_size}; no tokenizer of so many pieces can be trained on this "
            f"stream: {reason}; give another vocab_size, or an existing tokenizer in model.tokenizer"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **TOKENIZER_SETTINGS}), "utf-8"
    )


def _split_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_LINE_CHARS):
                yield line[start : start + MAX_LINE_CHARS]


def _uses_llama_tokenizer(settings: Path) -> bool:
    """Whether tokenizer_config.json, if there is one, names LLaMA's tokenizer.

    AutoTokenizer would also consider the model type, and read the same file differently for Mistral or Qwen.
    """
    config_data = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    return config_data.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast")


def _sentencepiece_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.model"
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception:  # sentencepiece has no error type of its own
        raise UserError(f"{path}: not a readable sentencepiece model; copy or download it again") from None
    tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True, **settings)
    _match_sentencepiece(tokenizer, processor)
    if not _encodes_identically(tokenizer, processor):
        raise UserError(
            f"{path}: not a LLaMA-style sentencepiece model (byte-pair encoding, with a space before the text, "
            "without normalisation), so it would be misread; add the tokenizer.json that belongs to it"
        )
    return tokenizer


def _match_sentencepiece(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    """Make the tokenizer encode plain text exactly as sentencepiece does.

    Transformers' own conversion orders merges by id instead of score (so runs of spaces are encoded wrongly), loses a
    text's first space, and encodes "</s>" inside a text as the special token. Chat templates need the last behaviour,
    so a tokenizer with a template keeps it.
    """
    backend = tokenizer.backend_tokenizer
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    backend.model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_compute_merges(processor, pieces),
        unk_token=pieces[processor.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_PIECE), normalizers.Replace(" ", SPACE_PIECE)])
    tokenizer.split_special_tokens = tokenizer.chat_template is None


def _compute_merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs whose concatenation is a piece, best score first; for equal scores, the longest left part first."""
    known_pieces = set(pieces)
    ranked_merges = []
    for i in _normal_piece_ids(processor):
        piece = pieces[i]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known_pieces and right in known_pieces:
                ranked_merges.append((-processor.get_score(i), -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(ranked_merges)]


def _encodes_identically(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether both encode the probe text, and a sample of the model's pieces in a row, to the same ids."""
    piece_ids = _normal_piece_ids(processor)
    piece_text = "".join(processor.id_to_piece(i) for i in piece_ids[:: len(piece_ids) // 1000 + 1]).replace(
        SPACE_PIECE, " "
    )
    encoded = tokenizer([PROBE_TEXT, piece_text], add_special_tokens=False, verbose=False)["input_ids"]
    return bool(encoded == processor.encode([PROBE_TEXT, piece_text]))


def _normal_piece_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    is_special = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    return [i for i in range(processor.get_piece_size()) if not any(check(i) for check in is_special)]
