"""A small LLaMA model, samples of random tokens and an engine, for tests of single training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch.nn import functional
from transformers import LlamaConfig

from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.zero_layouts import load_parameters
from dscl.model.backbone import Backbone, ModelConfig
from dscl.model.weights import RandomWeights

VOCABULARY = 160


STEPS = 6


ROWS = 8


LENGTH = 12


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass
class Toy:
    """A micro-batch: rows of random tokens of which only the last few are targets, a different number in each row."""

    ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Toy:
        return Toy(self.ids.to(device), self.labels.to(device))


def toy_backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    shape = LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    return Backbone(ModelConfig(shape={}), shape, None, RandomWeights(0, 0.05), dtype)


def toy_model() -> Any:
    """The small LLaMA without an engine, with its initial weights, in eval mode."""
    built = toy_backbone()
    module = built.build()
    load_parameters(module, built.weights.read)
    return module.eval()


def sample_rows(step: int) -> list[Toy]:
    generator = torch.Generator().manual_seed(step)
    samples = []
    for index in range(ROWS - step % 2):  # an odd number in every second step, so that the ranks' numbers differ
        ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, : LENGTH - 1 - (index * 7 + step) % (LENGTH - 2)] = -100
        samples.append(Toy(ids, labels))
    return samples


def join_rows(toys: list[Toy]) -> Toy:
    if not toys:  # a rank without samples takes part with a row without targets
        return Toy(torch.zeros(1, LENGTH, dtype=torch.long), torch.full((1, LENGTH), -100))
    return Toy(torch.cat([t.ids for t in toys]), torch.cat([t.labels for t in toys]))


def summed_loss(model: Any, toy: Toy) -> torch.Tensor:
    logits = model(input_ids=toy.ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.flatten(0, 1), toy.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def count_targets(toys: list[Toy]) -> int:
    return sum(int((t.labels[:, 1:] != -100).sum()) for t in toys)


def learning_rate(step: int) -> float:
    return 2e-3 * (step + 1) / STEPS


def make_engine(stage: int, precision: str = "fp32", clip: float = 1.0, **zero: Any) -> Engine:
    built = toy_backbone({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    return Engine(
        {"zero_optimization": {"stage": stage, **zero}},
        build=built.build,
        read=built.weights.read,
        prepare=lambda model: model,
        precision=precision,
        weight_decay=0.1,
        grad_clip=clip,
    )


def micro_batches(step: int, accumulation: int) -> tuple[list[Toy], int]:
    samples = sample_rows(step)
    local_samples = samples[comm.rank() :: comm.world_size()]
    size = -(-len(samples) // (comm.world_size() * accumulation))
    return [join_rows(local_samples[i * size : (i + 1) * size]) for i in range(accumulation)], count_targets(samples)


def train_steps(
    engine: Engine, accumulation: int = 1, first: int = 0, last: int = STEPS
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(first, last):
        batches, count = micro_batches(step, accumulation)
        total = engine.step(summed_loss, batches, targets=count, lr=learning_rate(step))
        losses.append((comm.all_reduce_sum(total) / count).item())
        norms.append(float(engine.last_grad_norm))
    return losses, norms


def master_shards(engine: Engine) -> dict[str, list[tuple[int, torch.Tensor]]]:
    shards: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for share in engine.shards.disjoint_shards():
        shards.setdefault(share.name, []).append((share.start, share.master.clone()))
    return shards


def assemble(shards_by_rank: list[dict[str, list[tuple[int, torch.Tensor]]]]) -> dict[str, torch.Tensor]:
    """Complete flat tensors from the shards of all ranks, which must cover each element exactly once."""
    whole = {}
    for name in sorted({name for part in shards_by_rank for name in part}):
        shards = sorted((piece for part in shards_by_rank for piece in part.get(name, [])), key=lambda piece: piece[0])
        end = 0
        for start, values in shards:
            assert start == end, f"{name}: a gap or an overlap at element {end}"
            end += len(values)
        whole[name] = torch.cat([values for _, values in shards])
    return whole


def gathered(parameter: Any) -> AbstractContextManager[Any]:
    """A context in which the parameter is complete; ZeRO-3 gathers it for that time."""
    return deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext()
