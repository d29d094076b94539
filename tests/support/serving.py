"""A small base model, PEFT adapters and three tasks to serve, and the reference answers of PEFT."""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dscl.data.encode import tokenizer_fingerprint
from dscl.methods.rls_router import Router, RouterSpec
from dscl.model.backbone import ModelConfig, resolve_backbone
from dscl.model.tokenizer import load_tokenizer, train_tokenizer
from dscl.serving import server
from dscl.serving.bundle import BundleDescription, TrainingInfo
from dscl.serving.server import ServingModel
from tests.support.small_models import PIECES, SHAPE, TEXT, WORDS

TASKS = ("birds", "hills", "rain")
LAYER, PROMPT_LIMIT, MAX_NEW_TOKENS = 1, 20, 8
UPPER_LAYERS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2, 3]}
ALL_LAYERS: dict[str, Any] = {"target_modules": ["k_proj", "down_proj"]}  # from the first layer on


def make_prompts(task: str, count: int, seed: int = 0) -> list[str]:
    """Prompts of words that the other tasks do not have, of all lengths, also longer than PROMPT_LIMIT."""
    number = TASKS.index(task)
    generator = random.Random(f"{task} {seed}")
    return [" ".join(generator.choices(WORDS[number::4], k=generator.randint(2, 14))) for _ in range(count)]


def write_base(folder: Path, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SHAPE, "num_hidden_layers": 4, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    train_tokenizer(TEXT, PIECES, folder)
    return folder


def write_peft(folder: Path, base: Path, seed: int, rank: int = 4, **options: Any) -> Path:
    """Write a PEFT adapter whose B is large enough to change the answers."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=rank, lora_alpha=2 * rank, **options)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def make_router_spec(base: Path, **changes: Any) -> RouterSpec:
    backbone = resolve_backbone(ModelConfig(str(base)), seed=0, dtype=torch.float32, cache=Path(), texts=lambda: ())
    values: dict[str, Any] = {
        "kind": "exact", "layer": LAYER, "dim": 64, "num_features": 128, "seed": 3, "model": backbone.fingerprint(),
        "tokenizer": tokenizer_fingerprint(backbone.tokenizer), "prompt_limit": PROMPT_LIMIT, "precision": "fp32",
    }  # fmt: skip
    return RouterSpec(**{**values, **changes})


def make_empty_model(base: Path, slots: int = 3) -> ServingModel:
    return server.open_model(make_description(base, make_router_spec(base)), slots=slots)


def make_description(base: Path, spec: RouterSpec, tokenizer: Path | None = None) -> BundleDescription:
    model = ModelConfig(str(base), tokenizer=str(tokenizer or base))
    return BundleDescription(model, 0, {}, TrainingInfo.from_attributes(spec), Router(spec))


MIXED = [prompt for some in zip(*(make_prompts(task, 5, seed=1) for task in TASKS), strict=True) for prompt in some]
MIXED_TASKS = [*TASKS] * 5


@functools.cache
def peft_model(base: Path, adapter: Path | None) -> Any:
    """The model as PEFT loads it; cached, so the files must not change."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@functools.cache
@torch.no_grad()
def reference_answer(base: Path, adapter: Path | None, prompt: str) -> str:
    """Greedy decoding by PEFT and transformers: one prompt, truncated on the left, without a KV cache."""
    model = peft_model(base, adapter)
    tokenizer = load_tokenizer(base)
    bos, *ids = tokenizer(prompt)["input_ids"]
    ids = [bos, *ids[-(PROMPT_LIMIT - 1) :]]
    answer: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        token = int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return str(tokenizer.decode(answer, skip_special_tokens=True).strip())


def generate_all(model: ServingModel) -> list[tuple[Any, ...]]:
    return [
        (answer.text, answer.task, (answer.margin, answer.distance)) for answer in model.generate(MIXED, MAX_NEW_TOKENS)
    ]


def approx_answers(answers: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Answers that compare equal up to rounding: the solver of the router may differ in the last bits between calls."""
    return [(text, task, pytest.approx(numbers, rel=1e-9)) for text, task, numbers in answers]


def edit_description(export: Path, change: Callable[[Any], Any]) -> None:
    path = export / "dscl.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def flip_byte(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)


def logits_of(model: Any, prompts: Sequence[str], **options: Any) -> torch.Tensor:
    """The logits of each prompt's first new token."""
    seen: list[torch.Tensor] = []
    hook = model._module.register_forward_hook(lambda _m, _a, out: seen.append(out.logits[:, -1]))
    for prompt in prompts:
        model.generate([prompt], 1, **options)
    hook.remove()
    return torch.cat(seen)
