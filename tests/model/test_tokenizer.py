"""Tokenizers: sentencepiece files are read as sentencepiece itself reads them, and trained ones are exact."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from dscl.model.tokenizer import load_tokenizer, pad_id, train_tokenizer
from dscl.utils.errors import UserError
from tests.support.small_models import PIECES, TEXT

PLAIN = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = [
    "", " ", "Hello world", " leading", "trailing  ", "  two  spaces   three", "\n", "a\nb\n\nc\r\n", "\ttab\there",
    "12345 67.8", "na\u00efve caf\u00e9", "e\u0301", "\u65e5\u672c\u8a9e", "\U0001f642\U0001f642", "\u00a0\u200b",
    "\uff21\ufb01", "\x00", "<s>", "a</s>b", "<unk> x", "isn't it?", "code {\n    deep\n        er\n}",
    "x" + " " * 40 + "y",
]  # fmt: skip


def sample_texts(processor: Any) -> list[str]:
    """The texts above, and random sequences of the model's own pieces, spaces and odd characters."""
    rng = random.Random(1)
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(259, processor.get_piece_size())]
    makers: list[Callable[[], str]] = [
        lambda: rng.choice(pieces),
        lambda: rng.choice(pieces),
        lambda: " " * rng.randint(1, 20),
        lambda: rng.choice("a,.\n\t \u65e5\u00e9\U0001f6420<s>/") * rng.randint(1, 9),
    ]
    return TEXTS + ["".join(rng.choice(makers)() for _ in range(rng.randint(1, 12))) for _ in range(2000)]


def assert_reads_as_sentencepiece(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = sample_texts(processor)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == processor.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("a b")["input_ids"] == [processor.bos_id(), *processor.encode("a b")]
    assert len(tokenizer) == processor.get_piece_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id())
    assert 0 <= pad_id(tokenizer) < len(tokenizer)


@pytest.mark.parametrize("name", ["llama_tokenizer", "base"])
def test_real_tokenizers_encode_as_sentencepiece(name: str, shared_data: Path) -> None:
    assert_reads_as_sentencepiece(shared_data / name)


def test_trained_tokenizer_encodes_as_sentencepiece(tokenizer_folder: Path) -> None:
    assert_reads_as_sentencepiece(tokenizer_folder)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_model_type_does_not_change_the_tokenizer(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": kind}))
    assert_reads_as_sentencepiece(tmp_path / "model")


def test_control_symbols_are_special_only_with_a_template(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "chat")
    settings = {**PLAIN, "chat_template": "{{ messages }}</s>"}
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    plain, chat = load_tokenizer(tokenizer_folder), load_tokenizer(tmp_path / "chat")
    assert plain.eos_token_id not in plain("the </s> cat")["input_ids"]
    assert chat.eos_token_id in chat("the </s> cat")["input_ids"]


def test_training_is_exact_and_repeatable(tmp_path: Path) -> None:
    for name, size in (("a", 300), ("b", 301), ("c", 300)):
        train_tokenizer(iter(TEXT), size, tmp_path / name)
        assert len(load_tokenizer(tmp_path / name)) == size
    files = {name: (tmp_path / name / "tokenizer.model").read_bytes() for name in "abc"}
    assert files["a"] == files["c"] != files["b"]


def test_training_uses_long_lines(tmp_path: Path) -> None:
    """sentencepiece would leave out a line of more than 4192 bytes."""
    train_tokenizer([" ".join(TEXT), "\u65e5\u672c " * 5000], 300, tmp_path)
    pieces = load_tokenizer(tmp_path).tokenize("\u65e5\u672c the")
    assert pieces[-1] == "\u2581the"
    assert "\u65e5\u672c" in pieces[0]


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["hello"], 300, "given 300.*yields at most 27"),
        ([], 300, "too little text"),
        (["".join(chr(0x4E00 + i) for i in range(2000))] * 3, 400, "too many different letters"),
        (TEXT, 299, "at least 300"),
    ],
)
def test_untrainable_sizes_are_refused(texts: list[str], size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^model.shape.vocab_size: .*{message}") as raised:
        train_tokenizer(texts, size, tmp_path / "none")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()


def train_other_kind(folder: Path, **settings: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        **{"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **settings},
    )


def test_any_bare_model_of_the_kind_loads(tmp_path: Path) -> None:
    train_other_kind(tmp_path)
    assert_reads_as_sentencepiece(tmp_path)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["cat"]},
    ],
)
def test_models_that_would_be_misread_are_refused(settings: dict[str, Any], described: bool, tmp_path: Path) -> None:
    train_other_kind(tmp_path, **settings)
    if described:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(UserError, match=r"tokenizer.model: not a LLaMA-style .*; add the tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello there" * 100, "cut"])
def test_damaged_model_is_refused(content: bytes | str, tokenizer_folder: Path, tmp_path: Path) -> None:
    whole = (tokenizer_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"tokenizer.model: not a readable sentencepiece model; copy"):
        load_tokenizer(tmp_path)


def test_other_mistakes(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer there; expected"):
        load_tokenizer(tmp_path)
    for content, message in (("{", "cannot be read"), ('{"tokenizer_class": "NoSuch"}', "cannot be read")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=message) as raised:
            load_tokenizer(tmp_path)
        assert "\n" not in str(raised.value)


def test_own_tokenizer_json_is_read_as_transformers_reads_it(tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2, "sat": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))
    assert load_tokenizer(tmp_path)("sat cat")["input_ids"] == [3, 2]


def test_piece_count(tokenizer_folder: Path) -> None:
    assert len(load_tokenizer(tokenizer_folder)) == PIECES
