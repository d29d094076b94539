"""Text, a tokenizer size and a LLaMA shape for the small model folders of tests."""

from __future__ import annotations

from typing import Any

SENTENCE = "the cat sat on a mat while dogs ran over green hills and birds sang of rain or snow in every town"
WORDS = SENTENCE.split()
TEXT = [" ".join(WORDS[(7 * i + j * (i % 3 + 1)) % len(WORDS)] for j in range(12)) for i in range(300)]
PIECES = 320
SHAPE: dict[str, Any] = {
    "vocab_size": PIECES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
