"""Activation statistics: second moments of the inputs of linear layers, and the importance of each decoder layer.

A `ProbePass` is a forward (and backward) pass that collects them, over sampled texts or over a task's samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dscl.data.batches import IGNORE_INDEX, Batch
from dscl.maths.subspace import sum_cosine_similarity
from dscl.model.generation import TextBlock
from dscl.model.lm_head import answer_loss

ROWS_PER_PASS = 4  # of sampled texts


class ActivationStats:
    """Second moments Σ w·xxᵀ over the inputs x [width] of linear layers, one for each token with weight w.

    With `gradient_weighted`, w is the squared norm of the loss's gradient with respect to the layer's output at this
    token. Otherwise w is 1 for the tokens in `token_mask` and 0 for others; then layers with the same input tensor
    (q, k and v; gate and up) share a sum. A forward pass is summed in fp32, and the sums of passes are added in fp64,
    so that the order of passes makes no visible difference.
    """

    def __init__(self, gradient_weighted: bool) -> None:
        self.gradient_weighted = gradient_weighted
        self.sums: dict[str, torch.Tensor] = {}  # layer → [in, in], fp64
        self.source_layer: dict[str, str] = {}  # layer → the layer under whose name the shared sum is kept
        self.token_mask = torch.empty(0)  # [rows, length]: the tokens of the current pass that count
        self._last_input: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def collect_stats(self, model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
        """In this context, every forward pass (with `gradient_weighted`, every backward pass) adds to the sums."""
        modules = dict(model.named_modules())
        hook = self._make_gradient_hook if self.gradient_weighted else self._make_forward_hook
        hooks = [modules[name].register_forward_hook(hook(name)) for name in layers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self._last_input = None

    def second_moment(self, layer: str) -> torch.Tensor | None:
        """The sum of this layer, [in, in]; None if the layer was not observed."""
        return self.sums[self.source_layer[layer]] if layer in self.source_layer else None

    def _make_forward_hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self._last_input is None or inputs[0] is not self._last_input[0]:
                self._last_input = inputs[0], name
                self._add_moment(name, inputs[0], self.token_mask)
            self.source_layer[name] = self._last_input[1]

        return hook

    def _make_gradient_hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            layer_input = inputs[0].detach()
            output.register_hook(
                lambda gradient: self._add_moment(name, layer_input, gradient.double().square().sum(-1))
            )

        self.source_layer[name] = name
        return hook

    def _add_moment(self, name: str, layer_input: torch.Tensor, weights: torch.Tensor) -> None:
        weighted_input = layer_input.detach().flatten(0, 1).float() * weights.flatten().sqrt().float()[:, None]
        moment = (weighted_input.T @ weighted_input).double()
        self.sums[name] = self.sums[name].add_(moment) if name in self.sums else moment


class LayerImportance:
    """The importance of decoder layers in the OSFT paper: the mean cosine between a layer's input and its output."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_layers + 1, dtype=torch.float64, device=device)  # the last entry counts tokens
        self.token_mask = torch.empty(0)  # [rows, length]: the tokens of the current pass that count

    @contextmanager
    def collect_stats(self, layers: nn.ModuleList) -> Iterator[None]:
        """In this context, every forward pass adds the cosines of its tokens."""
        hooks = [layer.register_forward_hook(self._make_hook(index)) for index, layer in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _make_hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            token_mask = self.token_mask.flatten() > 0
            output_hidden = output[0] if isinstance(output, tuple) else output
            input_hidden, output_hidden = (x.detach().flatten(0, 1)[token_mask] for x in (inputs[0], output_hidden))
            self.sums[index] += sum_cosine_similarity(input_hidden, output_hidden)
            if index == 0:
                self.sums[-1] += token_mask.sum()

        return hook

    def mean_similarity(self) -> torch.Tensor:
        """[layers]: the mean cosine of each decoder layer."""
        return self.sums[:-1] / self.sums[-1].clamp_min(1)


class ProbePass(NamedTuple):
    """One forward (and backward) pass that collects activation statistics."""

    token_weights: torch.Tensor  # weight of each token in the statistics, [rows, length]
    loss_fn: Callable[[Any], torch.Tensor]


def text_passes(texts: Iterable[TextBlock]) -> Iterator[ProbePass]:
    """Passes over sampled texts, a few rows at a time."""
    for ids, num_counted in texts:
        for at in range(0, len(ids), ROWS_PER_PASS):
            rows = ids[at : at + ROWS_PER_PASS]
            counts = (torch.arange(at, at + len(rows), device=ids.device) < num_counted)[:, None].expand(rows.shape)
            yield ProbePass(
                counts.double(), functools.partial(_text_loss, rows, rows.masked_fill(~counts, IGNORE_INDEX)[:, 1:])
            )


def _text_loss(ids: torch.Tensor, targets: torch.Tensor, model: Any) -> torch.Tensor:
    """The sum of next-token losses of texts; `targets` is -100 where a token does not count."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def task_passes(batches: Iterable[Batch]) -> Iterator[ProbePass]:
    """Passes over the task's own samples. In each batch, all prompt tokens together and all answer tokens together have
    the same weight."""
    for batch in batches:
        prompts, answers = (torch.zeros(batch.input_ids.shape, dtype=torch.float64) for _ in range(2))
        for row, start, stop in batch.prompt_spans:
            prompts[row, start:stop] = 1
        answers.view(-1)[batch.loss_positions.cpu()] = (batch.labels.cpu() != IGNORE_INDEX).double()
        token_weights = (prompts / prompts.sum().clamp_min(1) + answers / answers.sum().clamp_min(1)) * len(
            batch.sample_ids
        )
        yield ProbePass(token_weights.to(batch.input_ids.device), functools.partial(answer_loss, batch=batch))
