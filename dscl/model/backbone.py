"""The backbone: which model, its configuration, its tokenizer, and where its weights come from."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from dscl.config import key, nearest
from dscl.errors import UserError
from dscl.model.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dscl.model.weights import DrawnWeights, StoredWeights, Weights

# What is fetched from a hub: configuration, tokenizer and safetensors; nothing that could be unpickled or executed.
FETCHED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class ModelConfig:
    name: str | None = key(None, help="a model folder, or a hub id such as meta-llama/Llama-2-7b-hf")
    shape: dict[str, Any] | None = key(None, help="LLaMA configuration keys of a model to build with fresh weights")
    tokenizer: str | None = key(None, help="a tokenizer's folder or hub id; default: the model's, or one trained for it")
    attention: str = key("sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="attention implementation")
    activation_checkpointing: bool = key(False, help="recompute activations in the backward pass to save memory")


@dataclass(frozen=True)
class Backbone:
    """Everything about the model except the module itself, which the engine asks for when it is ready to shard it."""

    config: ModelConfig
    architecture: Any  # transformers' PreTrainedConfig
    tokenizer: Tokenizer
    weights: Weights
    dtype: torch.dtype

    def build(self) -> nn.Module:
        """The bare module; its values are whatever memory held until the engine fills them from `weights`."""
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                self.architecture,
                dtype=self.dtype,
                attn_implementation=self.config.attention,
                trust_remote_code=False,
            )
        model.tie_weights()  # part of the initialisation that was skipped
        model.config.use_cache = False
        if self.config.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def parameters(self) -> int:
        """The model's size, without building it."""
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(self.architecture, trust_remote_code=False)
        model.tie_weights()
        return sum(p.numel() for p in model.parameters())

    def check(self, names: Iterable[str]) -> None:
        """Refuse weights that lack a tensor the model has; rows of files that the model does not use are harmless."""
        stored = self.weights.names()
        missing = [] if stored is None else sorted(set(names) - stored)
        if missing:
            raise UserError(
                f"{self.config.name}: the weights lack {len(missing)} tensors that its config.json asks for, first "
                f"{missing[0]}{nearest(missing[0], stored or ())}; use a folder saved by save_pretrained"
            )


def open_backbone(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, cache: Path, texts: Callable[[], Iterable[str]]
) -> Backbone:
    """Resolve the recipe's `model:`. `texts` gives the stream's training text, should a tokenizer be needed."""
    if (config.name is None) == (config.shape is None):
        raise UserError("model: give exactly one of model.name (a folder or hub id) and model.shape (a model to build)")
    if config.shape is not None:
        architecture = _llama(config.shape)
        weights: Weights = DrawnWeights(seed, architecture.initializer_range)
        tokenizer = load_tokenizer(_tokenizer_folder(config, architecture.vocab_size, cache, texts))
    else:
        folder = locate(str(config.name), "model.name")
        architecture = _stored_architecture(folder)
        weights = StoredWeights(folder)
        tokenizer = load_tokenizer(folder if config.tokenizer is None else locate(config.tokenizer, "model.tokenizer"))
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"model: the tokenizer has {len(tokenizer)} pieces, the model only {architecture.vocab_size}; "
            "use the tokenizer that belongs to the model, or a larger model.shape.vocab_size"
        )
    return Backbone(config, architecture, tokenizer, weights, dtype)


def locate(name: str, where: str) -> Path:
    """The local folder of a model: `name` itself, or the hub's files in the local cache (fetched once per machine)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{where}: given {name!r}; there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's client has a different error for every kind of refusal
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: given {name!r}; no such folder, and the hub could not give it ({reason})") from None


def _llama(shape: dict[str, Any]) -> LlamaConfig:
    valid = {f.name for f in dataclasses.fields(LlamaConfig)}
    for name in shape:
        if name not in valid:
            raise UserError(f"model.shape.{name}: no such key of a LLaMA configuration{nearest(name, valid)}")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if name not in shape:
            raise UserError(f"model.shape.{name}: missing; a shape needs at least this")
        if not isinstance(shape[name], int) or isinstance(shape[name], bool) or shape[name] < 1:
            raise UserError(f"model.shape.{name}: given {shape[name]!r}; a whole number of at least 1 is needed")
    values = {"intermediate_size": -(-8 * shape["hidden_size"] // (3 * 64)) * 64, "tie_word_embeddings": True, **shape}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    if hidden % (2 * heads) and "head_dim" not in values:
        raise UserError(f"model.shape.num_attention_heads: given {heads}; it must divide hidden_size={hidden} into even parts")
    if heads % groups:
        raise UserError(f"model.shape.num_key_value_heads: given {groups}; it must divide num_attention_heads={heads}")
    try:
        return LlamaConfig(**values)
    except Exception as error:  # transformers validates with its own error types
        raise UserError(f"model.shape: {' '.join(str(error).split())[:200]}") from None


def _stored_architecture(folder: Path) -> Any:
    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        AutoModelForCausalLM._model_mapping[type(architecture)]
    except KeyError:
        raise UserError(f"{folder}: a {architecture.model_type} model has no causal-LM form that transformers knows") from None
    except Exception as error:  # as many kinds of error as kinds of damage
        raise UserError(f"{folder}: config.json cannot be used ({' '.join(str(error).split())[:200]})") from None
    return architecture


def _tokenizer_folder(config: ModelConfig, vocab_size: int, cache: Path, texts: Callable[[], Iterable[str]]) -> Path:
    """The tokenizer of a fresh model: the named one, or one trained once on the stream's text and cached by its hash."""
    if config.tokenizer is not None:
        return locate(config.tokenizer, "model.tokenizer")
    lines = list(texts())
    content = hashlib.sha256(json.dumps([vocab_size, lines]).encode()).hexdigest()[:32]
    folder = cache / f"tokenizer-{content}"
    with _alone(cache / f"tokenizer-{content}.lock"):
        if not folder.is_dir():
            partial = cache / f"tokenizer-{content}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            train_tokenizer(lines, vocab_size, partial)
            os.replace(partial, folder)
    return folder


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine (or shared file system) at a time; the others wait without holding up a collective."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
