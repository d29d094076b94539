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

from dscl.config.parsing import did_you_mean
from dscl.config.schema import ModelConfig
from dscl.model.tokenizer import SENTENCEPIECE_OPTIONS, Tokenizer, load_tokenizer, train_tokenizer
from dscl.model.weights import RandomWeights, SafetensorsWeights, WeightSource
from dscl.utils.cache import build_folder_once
from dscl.utils.errors import UserError

# Files to download from the hub: configuration, tokenizer and safetensors. Never pickles or code, and no second copy of
# the weights in a subfolder or in another layout.
HUB_ALLOW_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
HUB_IGNORE_PATTERNS = ("*/*", "consolidated*")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # dtype of the weights, by train.precision
REQUIRED_SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
FINGERPRINT_IGNORED_KEYS = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "architectures",
)
COUNT_KEYS = (*REQUIRED_SHAPE_KEYS, "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Backbone:
    """Everything about the model except the module, which the engine builds when it is ready to shard it."""

    config: ModelConfig
    hf_config: Any  # a PreTrainedConfig of transformers
    tokenizer: Tokenizer
    weights: WeightSource
    dtype: torch.dtype

    def build(self) -> nn.Module:
        """The module with uninitialised values; the engine fills them from `weights`."""
        # With an attention mask (padded or packed rows), cuDNN's attention can return NaN gradients
        # (torch 2.11 to 2.13 on H100 and H200, github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        model = _build_module(self.hf_config, self.config.attention, self.dtype)
        model.config.use_cache = False
        if self.config.activation_checkpointing:
            enable_activation_checkpointing(model)
        return model

    def count_parameters(self) -> int:
        """The number of parameters; allocates no memory for them."""
        return sum(map(math.prod, _parameter_shapes(self.hf_config, self.config.attention).values()))

    def fingerprint(self) -> str:
        """A hash of the configuration and of the first values of every tensor. It identifies the model."""
        config_values = {k: v for k, v in self.hf_config.to_dict().items() if k not in FINGERPRINT_IGNORED_KEYS}
        digest = hashlib.sha256(json.dumps(config_values, sort_keys=True, default=str).encode())
        for name, shape in sorted(_parameter_shapes(self.hf_config, self.config.attention).items()):
            leading_values = self.weights.read(name, shape, 0, min(1024, math.prod(shape)))
            digest.update(name.encode() + leading_values.float().numpy().tobytes())
        return digest.hexdigest()


def resolve_backbone(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, cache: Path, texts: Callable[[], Iterable[str]]
) -> Backbone:
    """Resolve the recipe's `model:`. `texts` returns the stream's training texts, used if a tokenizer is trained."""
    if (config.name is None) == (config.shape is None):
        raise UserError("model: give exactly one of model.name (a folder or hub id) and model.shape (a model to build)")
    if config.shape is not None:
        hf_config = _build_llama_config(config.shape)
        weights: WeightSource = RandomWeights(seed, hf_config.initializer_range)
    else:
        folder = resolve_model_folder(str(config.name), "model.name")
        hf_config = _read_hf_config(folder)
        weights = SafetensorsWeights(folder)
    weights.check_shapes(_parameter_shapes(hf_config, config.attention))
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(resolve_model_folder(config.tokenizer, "model.tokenizer"))
    elif config.shape is not None:
        tokenizer = load_tokenizer(_train_cached_tokenizer(hf_config.vocab_size, cache, texts))
    else:
        tokenizer = load_tokenizer(folder)
    if len(tokenizer) > hf_config.vocab_size:
        raise UserError(
            f"model: the tokenizer has {len(tokenizer)} pieces, the model only {hf_config.vocab_size}; "
            "use the tokenizer that belongs to the model, or a larger model.shape.vocab_size"
        )
    return Backbone(config, hf_config, tokenizer, weights, dtype)


def resolve_model_folder(name: str, setting: str) -> Path:
    """The local folder of a model: `name` itself, or the local cache of the hub's files (downloaded if missing).

    `setting`: the recipe key that errors name.
    """
    if not name.strip():
        raise UserError(f"{setting}: given {name!r}; a folder or a hub id is needed")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{setting}: given {name!r}; there is no such folder")
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(HUB_ALLOW_PATTERNS), ignore_patterns=list(HUB_IGNORE_PATTERNS))
        )
    except Exception as error:  # the hub client raises many kinds of errors
        raise UserError(
            f"{setting}: given {name!r}; no such folder, and the hub could not give it ({_shorten_error(error)})"
        ) from None


def _build_llama_config(shape: dict[str, Any]) -> LlamaConfig:
    valid_keys = {f.name for f in dataclasses.fields(LlamaConfig)}
    for name in shape:
        if name not in valid_keys:
            raise UserError(f"model.shape.{name}: no such key of a LLaMA configuration{did_you_mean(name, valid_keys)}")
    for name in REQUIRED_SHAPE_KEYS:
        if shape.get(name) is None:
            raise UserError(f"model.shape.{name}: missing; a shape needs at least {', '.join(REQUIRED_SHAPE_KEYS)}")
    shape = {name: value for name, value in shape.items() if value is not None or name not in COUNT_KEYS}
    for name in COUNT_KEYS:
        if name in shape and (not isinstance(shape[name], int) or isinstance(shape[name], bool) or shape[name] < 1):
            raise UserError(f"model.shape.{name}: given {shape[name]!r}; a whole number of at least 1 is needed")
    hidden_size, num_heads = shape["hidden_size"], shape["num_attention_heads"]
    num_kv_heads = shape.get("num_key_value_heads", num_heads)
    if hidden_size % num_heads or shape.get("head_dim", hidden_size // num_heads) % 2:
        raise UserError(
            f"model.shape.num_attention_heads: given {num_heads}; it must divide hidden_size={hidden_size} into even "
            "parts"
        )
    if num_heads % num_kv_heads:
        raise UserError(
            f"model.shape.num_key_value_heads: given {num_kv_heads}; it must divide num_attention_heads={num_heads}"
        )
    values = {"intermediate_size": -(-8 * hidden_size // (3 * 64)) * 64, "tie_word_embeddings": True, **shape}
    try:
        return LlamaConfig(**values)
    except Exception as error:  # transformers raises its own error types
        raise UserError(f"model.shape: {_shorten_error(error)}") from None


def _read_hf_config(folder: Path) -> Any:
    file = folder / "config.json"
    try:
        config_data = json.loads(file.read_text("utf-8"))
        model_type = config_data["model_type"]
    except OSError:
        raise UserError(f"{folder}: no config.json there, so this is not a model folder") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file}: not the JSON description of a model (with a model_type); copy it again") from None
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise many kinds of errors
        if "auto_map" in config_data or model_type not in CONFIG_MAPPING:
            raise UserError(
                f"{file}: model_type {model_type!r} is not one that transformers itself has; code that comes with a "
                "model is never run, so use a model of a kind that is built in (llama, mistral, qwen2, ...)"
            ) from None
        raise UserError(f"{file}: cannot be used ({_shorten_error(error)})") from None
    # Configurations of encoders have is_decoder=False; those of decoders lack the key.
    is_decoder = getattr(hf_config, "is_decoder", True) and not getattr(hf_config, "is_encoder_decoder", False)
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not is_decoder:
        raise UserError(
            f"{file}: a {model_type} model is no causal language model; use one (llama, mistral, qwen2, ...)"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UserError(
            f"{file}: the model is quantised (quantization_config), which cannot be trained; use the original"
        )
    return hf_config


def enable_activation_checkpointing(model: Any) -> None:
    """Keep only each decoder layer's input; the backward pass computes the layer's other activations again."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # older transformers
    getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    # The call above makes the embeddings' output require a gradient, which only reentrant checkpointing needs. With it,
    # the backward pass would also recompute layers below all trainable parameters.
    model.disable_input_require_grads()


def _build_module(hf_config: Any, attention: str, dtype: torch.dtype) -> Any:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config),  # the module keeps and changes its configuration
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
        )
    model.tie_weights()  # part of the initialisation that was skipped
    return model


def _parameter_shapes(hf_config: Any, attention: str) -> dict[str, torch.Size]:
    """The shape of every parameter, by building the module on the meta device; refuses what cannot be built."""
    try:
        with torch.device("meta"):
            model = _build_module(hf_config, attention, torch.float32)
    except ImportError as error:
        raise UserError(
            f"model.attention: given {attention!r}, which is not available here ({_shorten_error(error)})"
        ) from None
    except Exception as error:  # modelling code raises many kinds of errors
        raise UserError(
            f"model: none can be built of this configuration ({type(error).__name__}: {_shorten_error(error)})"
        ) from None
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _train_cached_tokenizer(vocab_size: int, cache: Path, texts: Callable[[], Iterable[str]]) -> Path:
    """The folder of a tokenizer trained on these texts; cached by a hash of the texts and options."""
    digest = hashlib.sha256(json.dumps([SENTENCEPIECE_OPTIONS, vocab_size]).encode())
    for text in texts():
        digest.update(json.dumps(text).encode())

    def build(folder: Path) -> None:
        train_tokenizer(texts(), vocab_size, folder)

    return build_folder_once(cache, f"tokenizer-{digest.hexdigest()[:32]}", build)


def _shorten_error(error: Exception) -> str:
    """An error's message on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
