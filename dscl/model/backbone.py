"""The backbone: which model, its configuration, its tokenizer, and where its weights come from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from dscl.config.parsing import nearest
from dscl.config.schema import ModelConfig
from dscl.model.tokenizer import TRAINING, Tokenizer, load_tokenizer, train_tokenizer
from dscl.model.weights import DrawnWeights, StoredWeights, Weights
from dscl.utils.cache import folder_made_once
from dscl.utils.errors import UserError

# What is fetched from a hub: configuration, tokenizer and safetensors; nothing that could be unpickled or executed, and
# no second copy of the weights in a subfolder or in another layout.
FETCHED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
NOT_FETCHED = ("*/*", "consolidated*")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights, by train.precision
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TOLD_OTHERWISE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "architectures")
COUNTS = (*NEEDED, "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")


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
        # With a mask, as of rows that are padded or packed, cuDNN's attention can give gradients that are not numbers
        # (torch 2.11 to 2.13 on H100 and H200, github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        model = _bare_module(self.architecture, self.config.attention, self.dtype)
        model.config.use_cache = False
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def parameters(self) -> int:
        """The model's size, without building it."""
        return sum(map(math.prod, _shapes(self.architecture, self.config.attention).values()))

    def fingerprint(self) -> str:
        """A hash of the configuration and of some of every tensor's values: two models that share it are the same."""
        told = {k: v for k, v in self.architecture.to_dict().items() if k not in TOLD_OTHERWISE}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        for name, shape in sorted(_shapes(self.architecture, self.config.attention).items()):
            some = self.weights.read(name, shape, 0, min(1024, math.prod(shape)))
            digest.update(name.encode() + some.float().numpy().tobytes())
        return digest.hexdigest()


def open_backbone(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, cache: Path, texts: Callable[[], Iterable[str]]
) -> Backbone:
    """Resolve the recipe's `model:`. `texts` gives the stream's training text, should a tokenizer be needed."""
    if (config.name is None) == (config.shape is None):
        raise UserError("model: give exactly one of model.name (a folder or hub id) and model.shape (a model to build)")
    if config.shape is not None:
        architecture = _llama(config.shape)
        weights: Weights = DrawnWeights(seed, architecture.initializer_range)
    else:
        folder = locate(str(config.name), "model.name")
        architecture = _stored_architecture(folder)
        weights = StoredWeights(folder)
    weights.check(_shapes(architecture, config.attention))
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(locate(config.tokenizer, "model.tokenizer"))
    elif config.shape is not None:
        tokenizer = load_tokenizer(_trained_tokenizer(architecture.vocab_size, cache, texts))
    else:
        tokenizer = load_tokenizer(folder)
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"model: the tokenizer has {len(tokenizer)} pieces, the model only {architecture.vocab_size}; "
            "use the tokenizer that belongs to the model, or a larger model.shape.vocab_size"
        )
    return Backbone(config, architecture, tokenizer, weights, dtype)


def locate(name: str, where: str) -> Path:
    """The local folder of a model: `name` itself, or the hub's files in the local cache (fetched once per machine)."""
    if not name.strip():
        raise UserError(f"{where}: given {name!r}; a folder or a hub id is needed")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{where}: given {name!r}; there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED)))
    except Exception as error:  # the hub's client has a different error for every kind of refusal
        raise UserError(
            f"{where}: given {name!r}; no such folder, and the hub could not give it ({_line(error)})"
        ) from None


def _llama(shape: dict[str, Any]) -> LlamaConfig:
    valid = {f.name for f in dataclasses.fields(LlamaConfig)}
    for name in shape:
        if name not in valid:
            raise UserError(f"model.shape.{name}: no such key of a LLaMA configuration{nearest(name, valid)}")
    for name in NEEDED:
        if shape.get(name) is None:
            raise UserError(f"model.shape.{name}: missing; a shape needs at least {', '.join(NEEDED)}")
    shape = {name: value for name, value in shape.items() if value is not None or name not in COUNTS}
    for name in COUNTS:
        if name in shape and (not isinstance(shape[name], int) or isinstance(shape[name], bool) or shape[name] < 1):
            raise UserError(f"model.shape.{name}: given {shape[name]!r}; a whole number of at least 1 is needed")
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    groups = shape.get("num_key_value_heads", heads)
    if hidden % heads or shape.get("head_dim", hidden // heads) % 2:
        raise UserError(
            f"model.shape.num_attention_heads: given {heads}; it must divide hidden_size={hidden} into even parts"
        )
    if heads % groups:
        raise UserError(f"model.shape.num_key_value_heads: given {groups}; it must divide num_attention_heads={heads}")
    values = {"intermediate_size": -(-8 * hidden // (3 * 64)) * 64, "tie_word_embeddings": True, **shape}
    try:
        return LlamaConfig(**values)
    except Exception as error:  # transformers validates with its own error types
        raise UserError(f"model.shape: {_line(error)}") from None


def _stored_architecture(folder: Path) -> Any:
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text("utf-8"))
        kind = described["model_type"]
    except OSError:
        raise UserError(f"{folder}: no config.json there, so this is not a model folder") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file}: not the JSON description of a model (with a model_type); copy it again") from None
    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as many kinds of error as kinds of damage
        if "auto_map" in described or kind not in CONFIG_MAPPING:
            raise UserError(
                f"{file}: model_type {kind!r} is not one that transformers itself has; code that comes with a model is "
                "never run, so use a model of a kind that is built in (llama, mistral, qwen2, ...)"
            ) from None
        raise UserError(f"{file}: cannot be used ({_line(error)})") from None
    # Encoders say that they are no decoder; the decoders' configurations have no such key.
    is_decoder = getattr(architecture, "is_decoder", True) and not getattr(architecture, "is_encoder_decoder", False)
    if type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING or not is_decoder:
        raise UserError(f"{file}: a {kind} model is no causal language model; use one (llama, mistral, qwen2, ...)")
    if getattr(architecture, "quantization_config", None) is not None:
        raise UserError(
            f"{file}: the model is quantised (quantization_config), which cannot be trained; use the original"
        )
    return architecture


def checkpoint_activations(model: Any) -> None:
    """Keep what goes into each decoder layer; the backward pass computes what happens within it once more."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # as it was called before
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    # That has the embeddings ask for a gradient, which only reentrant checkpointing needs: the backward pass would go,
    # and compute again, down to layers below everything that trains.
    model.disable_input_require_grads()


def _bare_module(architecture: Any, attention: str, dtype: torch.dtype) -> Any:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(architecture),  # the module keeps and changes it
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
        )
    model.tie_weights()  # part of the initialisation that was skipped
    return model


def _shapes(architecture: Any, attention: str) -> dict[str, torch.Size]:
    """What the model consists of, told by building it without memory; refuses what cannot be built."""
    try:
        with torch.device("meta"):
            model = _bare_module(architecture, attention, torch.float32)
    except ImportError as error:
        raise UserError(f"model.attention: given {attention!r}, which is not available here ({_line(error)})") from None
    except Exception as error:  # whatever a modelling file stumbles over
        raise UserError(
            f"model: none can be built of this configuration ({type(error).__name__}: {_line(error)})"
        ) from None
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _trained_tokenizer(vocab_size: int, cache: Path, texts: Callable[[], Iterable[str]]) -> Path:
    """A tokenizer trained once on the stream's text, and cached by what it depends on."""
    digest = hashlib.sha256(json.dumps([TRAINING, vocab_size]).encode())
    for text in texts():
        digest.update(json.dumps(text).encode())

    def build(folder: Path) -> None:
        train_tokenizer(texts(), vocab_size, folder)

    return folder_made_once(cache, f"tokenizer-{digest.hexdigest()[:32]}", build)


def _line(error: Exception) -> str:
    """An error's message, on one line and not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
