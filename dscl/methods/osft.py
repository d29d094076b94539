"""Full fine-tuning in the free subspace (after arXiv 2504.07097): what earlier tasks use of each weight cannot change.

What trains: the dense weights. What may not change: for each target matrix a protected subspace, which starts with what
the base model needs and grows with every task, for good. It is held on the fp32 masters after the optimizer's step, by
the one rank that owns the matrix. Who decides at inference: nobody; it is one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import OsftConfig
from dscl.data.batches import Batch
from dscl.maths.subspace import (
    Directions,
    Subspace,
    count_by_energy,
    count_by_share,
    hold_flops,
    left_of,
    moment_directions,
    right_directions,
    room_of,
    shares_by_importance,
)
from dscl.methods.base import Ended, Facts, Look, Method, Ranks
from dscl.model.activation_stats import Changes, Moments
from dscl.model.adapters.routing import layer_of, targets_above
from dscl.model.generation import Drawn, sample_texts
from dscl.model.lm_head import answer_loss
from dscl.utils.errors import UserError

TEXTS, LENGTH = 128, 128  # made up by the base model, to see what it needs in general
SAMPLES = 512  # of an ended task, to see what it needs
PART = 1.5  # of the free room that a task may take, against 1 for each later one, which has fewer tasks after it
MEMORY = 1 << 31  # bytes of second moments gathered in one go; the rest is left to further passes
ROWS = 4  # of texts, passed forward and back at once


class Pass(NamedTuple):
    """One look of the model at something."""

    counted: torch.Tensor  # how much each token counts, [rows, length]
    loss: Callable[[Any], torch.Tensor]


# For a matrix, what was found beside the directions taken, and the energy of all: how many more to protect.
Count = Callable[[str, Directions, torch.Tensor, float], int]


class Osft(Method):
    """Its own constraint: the engine asks it to hold the matrices that this rank owns."""

    Config = OsftConfig
    config: OsftConfig

    def __init__(self, config: OsftConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self.every = config.project_every
        self.gradients = bool(config.gradients)
        self.above, self.setting = -1, "method.targets"  # decoder layers below this one are left as they are
        self._shapes: dict[str, tuple[int, int]] = {}  # of the constrained weights
        self._layers: dict[str, str] = {}  # the linear layers among them
        self._mine: list[str] = []
        self._spaces: dict[str, Subspace] = {}
        self._start: dict[str, torch.Tensor] = {}  # my matrices as the task found them
        self._base: dict[str, torch.Tensor] = {}  # of right and left: the base's directions now, and what it left free

    def prepare(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(self.config.rest == "free")
        modules = dict(model.named_modules())
        for layer in targets_above(model, self.above, self.config.targets, self.setting):
            linear = modules[layer]
            assert isinstance(linear, nn.Linear)
            self._shapes[f"{layer}.weight"] = linear.out_features, linear.in_features
            self._layers[f"{layer}.weight"] = layer
            linear.weight.requires_grad_(True)
        if self.config.rest == "protected":
            for name, parameter in model.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) == 2 and name not in self._shapes:
                    self._shapes[name] = int(shape[0]), int(shape[1])
                    parameter.requires_grad_(True)
        return model

    # ---- the constraint, asked of this rank for the matrices that it owns

    def constraint(self) -> Osft:
        return self

    def costs(self) -> dict[str, float]:
        return {name: float(self._flops(rows, columns)) for name, (rows, columns) in self._shapes.items()}

    def _flops(self, rows: int, columns: int) -> int:
        half = count_by_share(0.5, rows, columns)  # how much will be protected is not known yet
        return hold_flops(str(self.config.reading), rows, columns, half, half)

    def own(self, names: Sequence[str], device: torch.device) -> None:
        self._mine, self._device = list(names), device

    def hold(self, name: str, weight: torch.Tensor) -> None:
        self._spaces[name].hold_(weight)

    def free(self, name: str, gradient: torch.Tensor) -> None:
        self._spaces[name].free_(gradient)

    def rehearse(self) -> dict[str, float]:
        assert self.config.share is not None
        reading, whole = str(self.config.reading), 0
        for name in self._mine:
            rows, columns = self._shapes[name]
            count = count_by_share(self.config.share, rows, columns)
            self._spaces[name] = Subspace.of(reading, room_of(reading, rows, columns, count, self._device))
            nothing = room_of(reading, rows, columns, min(rows, columns), torch.device("meta"))
            whole += sum(tensor.numel() * tensor.element_size() for tensor in nothing.values())
            if "updates" in (self.config.claim or ()) and len(self.facts.tasks) > 1:
                self._start[name] = torch.zeros(rows, columns)
        return {"directions of this rank, when all are protected": float(whole)}

    # ---- what is protected

    def begin_task(self, index: int, name: str, ranks: Ranks) -> None:
        if index == 0:
            texts = self._texts(ranks)
            self._protect_more(ranks, lambda: _text_passes(texts))
            for matrix, space in self._spaces.items():
                sides = space.right, space.left
                self._base[matrix] = torch.tensor([s.shape[1] for s in sides] + [len(s) - s.shape[1] for s in sides])
        elif self.config.when_short == "give_back":
            self._give_back()
        self._check_room(name, ranks)
        if "updates" in (self.config.claim or ()) and name != self.facts.tasks[-1]:

            def keep(matrix: str, weight: torch.Tensor) -> None:
                self._start[matrix] = weight.to("cpu", copy=True)

            ranks.visit(keep, list(self._shapes))

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        to_come = len(self.facts.tasks) - index - 1
        if not to_come:
            return Ended(numbers=self._capacity(ranks))

        def passes() -> Iterator[Pass]:
            return _task_passes(ranks.batches(SAMPLES))

        def claimed(matrix: str, found: Directions, taken: torch.Tensor, whole: float) -> int:
            count = count_by_energy(found, self.config.claim_energy or 0.0)
            room = int((len(taken) - taken.shape[1]) * PART / (PART + to_come))
            return min(count, room) if self.config.when_short == "share" else count

        if self.config.claim:
            self._protect(ranks, self.config.claim, passes, claimed)
            self._start = {}
        if self.config.allocate != "fixed":
            self._protect_more(ranks, passes)
        return Ended(self._told(ranks), self._capacity(ranks))

    def _capacity(self, ranks: Ranks) -> dict[str, float]:
        """The bytes of all that is protected, over all ranks."""
        kept = sum(t.numel() * t.element_size() for space in self._spaces.values() for t in space.tensors().values())
        total = ranks.sum_(torch.tensor([kept], dtype=torch.int64, device=ranks.device))
        return {"capacity_bytes": float(total)}

    def _protect_more(self, ranks: Ranks, passes: Callable[[], Iterable[Pass]]) -> None:
        """Protect what the base, as it is now, needs most, up to the share that is set."""
        assert self.config.share is not None
        share = self.config.share
        shares = self._important(ranks, passes) if self.config.allocate == "importance" else {}

        def lacking(matrix: str, found: Directions, taken: torch.Tensor, whole: float) -> int:
            if self.config.allocate != "energy":
                return max(0, count_by_share(shares.get(matrix, share), *self._shapes[matrix]) - taken.shape[1])
            rest = float(found.energies.sum())
            return count_by_energy(found, max(0.0, 1.0 - (1.0 - share) * whole / rest)) if rest else 0

        assert self.config.basis is not None
        self._protect(ranks, self.config.basis, passes, lacking)

    def _protect(
        self, ranks: Ranks, sources: Sequence[str], passes: Callable[[], Iterable[Pass]], count: Count
    ) -> None:
        """Every matrix protects as many more directions as `count` says, the strongest in these sources."""
        for number, names in enumerate(portions := self._portions()):
            layers = [self._layers[name] for name in names if name in self._layers]
            seen = {
                kind: Moments(felt=kind == "sensitivity") for kind in ("activations", "sensitivity") if kind in sources
            }
            with ExitStack() as stack:
                for moments in seen.values():
                    stack.enter_context(moments.gathering(ranks.module, layers))
                for each in passes() if seen else ():
                    for moments in seen.values():
                        moments.counted = each.counted
                    ranks.probe(each.loss, "sensitivity" in seen)
            for moments in seen.values():
                for layer in sorted(moments.sums):
                    ranks.sum_(moments.sums[layer])
                ranks.said("passes", number + 1, len(portions))

            def look(name: str, weight: torch.Tensor, seen: dict[str, Moments] = seen) -> None:
                space = self._spaces.setdefault(name, Subspace.empty(str(self.config.reading), weight))
                roots = {"weights": weight}
                if name in self._start:
                    roots["updates"] = weight - self._start[name].to(weight)
                given = {kind: moments.of(self._layers.get(name, "")) for kind, moments in seen.items()}
                inputs = {kind: moment for kind, moment in given.items() if moment is not None}
                exact = weight.double()
                # A matrix that is no linear layer's is given nothing; it is judged by its weights.
                found = {kind: roots[kind] for kind in roots if kind in sources or not (inputs or "updates" in sources)}
                right = self._strongest(name, found, inputs, space.right, count)
                left = space.left[:, :0]
                untouched = not space.right.numel() and not space.left.numel()
                if space.reading != "input" and untouched and list(found) == ["weights"] and not inputs:
                    left = left_of(weight, right)
                elif space.reading != "input":
                    turned = {kind: root.T for kind, root in found.items()}
                    outputs = {kind: exact @ moment @ exact.T for kind, moment in inputs.items()}
                    left = self._strongest(name, turned, outputs, space.left, count).vectors
                space.grow(weight, right.vectors, left)

            self._visit(ranks, names, look)

    @staticmethod
    def _strongest(
        name: str,
        roots: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        taken: torch.Tensor,
        count: Count,
    ) -> Directions:
        """Of the directions beside those taken the strongest, in `rootᵀ root` and in moments."""
        if len(roots) == 1 and not moments:
            (root,) = roots.values()
            found, whole = right_directions(root, taken), float(root.double().square().sum())
        else:
            parts = [*moments.values(), *(root.double().T @ root.double() for root in roots.values())]
            moment = (
                sum((_scaled(part, taken) for part in parts), torch.zeros_like(parts[0])) if parts[1:] else parts[0]
            )
            found, whole = moment_directions(moment, taken), float(moment.trace())
        most = count(name, found, taken, whole)
        return Directions(found.energies[:most], found.vectors[:, :most])

    def _give_back(self) -> None:
        """Where tasks have left less than an equal part of the first room, the base's weakest directions are freed."""
        for matrix, space in self._spaces.items():
            parts = []
            for side, basis in enumerate((space.right, space.left)):
                held, room = (int(self._base[matrix][at]) for at in (side, side + 2))
                short = room // len(self.facts.tasks) - (len(basis) - basis.shape[1])
                parts.append(slice(held - min(held, max(0, short)), held))
                self._base[matrix][side] = parts[-1].start
            if any(part.start < part.stop for part in parts):
                space.release(*parts)

    def _check_room(self, name: str, ranks: Ranks) -> None:
        """A task needs free directions; where there are none, or by `when_short: stop` too few, it is told now."""
        stuck = sum(self._is_full(space) for space in self._spaces.values())
        count = int(ranks.sum_(torch.tensor([stuck], dtype=torch.int64, device=ranks.device)))
        where = self.setting.removesuffix("targets")
        if count == len(self._shapes) or (count and self.config.when_short == "stop"):
            raise UserError(
                f"method osft: task {name} finds no free direction in {count} of {len(self._shapes)} matrices; run "
                f"again with {where}when_short=give_back, or start anew with a lower {where}share or "
                f"{where}claim_energy"
            )

    @staticmethod
    def _is_full(space: Subspace) -> bool:
        full = [basis.shape[1] == len(basis) for basis in (space.right, space.left)]
        return all(full) if space.reading == "paper" else any(full)

    def _texts(self, ranks: Ranks) -> list[Drawn]:
        """Texts that the base model makes up, if any are needed: what it needs in general shows in them."""
        if self.config.basis == ("weights",) and self.config.allocate != "importance":
            return []
        training = ranks.module.training
        ranks.module.eval()
        with torch.no_grad():
            texts = sample_texts(
                ranks.module,
                TEXTS,
                LENGTH,
                self.facts.seed,
                ranks.device,
                functools.partial(ranks.said, "making up texts"),
            )
        ranks.module.train(training)
        return texts

    def _important(self, ranks: Ranks, passes: Callable[[], Iterable[Pass]]) -> dict[str, float]:
        """The paper's share for each matrix, by the importance of the decoder layer that it stands in."""
        layers: Any = ranks.module.get_submodule("model.layers")
        changes = Changes(len(layers), ranks.device)
        with changes.gathering(layers):
            for each in passes():
                changes.counted = each.counted
                ranks.probe(each.loss, False)
        ranks.sum_(changes.sums)
        assert self.config.least is not None
        assert self.config.share is not None
        try:
            found = shares_by_importance(changes.means(), self.config.least, self.config.share).tolist()
        except ArithmeticError as error:
            raise UserError(f"method.allocate: given importance, but {error}; set method.allocate=fixed") from None
        return {name: found[layer_of(name)] if layer_of(name) >= 0 else self.config.share for name in self._shapes}

    def _portions(self) -> list[list[str]]:
        """The matrices in portions whose inputs' second moments fit into memory together, decoder layer by layer."""
        portions: list[list[str]] = [[]]
        room, layer = MEMORY, None
        for name, (_, columns) in self._shapes.items():
            room -= 8 * columns**2
            if room < 0 and layer != layer_of(name):
                portions.append([])
                room = MEMORY - 8 * columns**2
            layer = layer_of(name)
            portions[-1].append(name)
        return portions

    def _visit(self, ranks: Ranks, names: Sequence[str], look: Look) -> None:
        """Show matrices to their owners; what one of them finds wrong stops all ranks, with one line."""
        wrong = ""

        def guarded(name: str, weight: torch.Tensor) -> None:
            nonlocal wrong
            try:
                look(name, weight)
            except ArithmeticError as error:
                wrong = wrong or f"method osft: {name}: {error}; start from weights, and a rate, that stay finite"

        ranks.visit(guarded, names)
        ranks.refuse(wrong)

    def _told(self, ranks: Ranks) -> str:
        """How much is free now, over all ranks."""
        counts = [self._room(space) for space in self._spaces.values()]
        free, whole = ranks.sum_(
            torch.tensor([(0, 0), *counts], dtype=torch.int64, device=ranks.device).sum(0)
        ).tolist()
        return f"{1 - free / whole:.1%} of the directions are protected from now on"

    @staticmethod
    def _room(space: Subspace) -> tuple[int, int]:
        """The free directions of a matrix, and all."""
        right, left = (len(basis) - basis.shape[1] for basis in (space.right, space.left))
        if space.reading == "input":
            return right, len(space.right)
        return right + left, len(space.right) + len(space.left)

    # ---- what survives a restart

    def owned(self) -> dict[str, torch.Tensor]:
        kept = {f"{name}|{what}": t for name, space in self._spaces.items() for what, t in space.tensors().items()}
        kept |= {f"{name}|base": counts for name, counts in self._base.items()}
        return kept | {f"{name}|start": weight for name, weight in self._start.items()}

    def load_owned(self, read: Callable[[str], dict[str, torch.Tensor]]) -> None:
        for name in self._mine:
            tensors = read(name)
            if "start" in tensors:
                self._start[name] = tensors.pop("start")
            if "base" in tensors:
                self._base[name] = tensors.pop("base")
            if tensors:
                moved = {what: tensor.to(self._device) for what, tensor in tensors.items()}
                self._spaces[name] = Subspace.of(str(self.config.reading), moved)


def _scaled(moment: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """With 1 as the energy that it has beside the directions taken."""
    exact, whole = taken.to(moment), moment.trace()
    rest = whole - (exact * (moment @ exact)).sum()
    return moment / rest.clamp_min(1e-10 * float(whole) + torch.finfo(moment.dtype).tiny)  # what is rounding stays so


def _text_passes(texts: Iterable[Drawn]) -> Iterator[Pass]:
    """Texts that the model made up, a few rows at a time."""
    for ids, counting in texts:
        for at in range(0, len(ids), ROWS):
            rows = ids[at : at + ROWS]
            counts = (torch.arange(at, at + len(rows), device=ids.device) < counting)[:, None].expand(rows.shape)
            yield Pass(counts.double(), functools.partial(_text_loss, rows, rows.masked_fill(~counts, -100)[:, 1:]))


def _text_loss(ids: torch.Tensor, targets: torch.Tensor, model: Any) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _task_passes(batches: Iterable[Batch]) -> Iterator[Pass]:
    """The task's own samples: what is asked and what is answered count alike."""
    for batch in batches:
        prompts, answers = (torch.zeros(batch.input_ids.shape, dtype=torch.float64) for _ in range(2))
        for row, start, stop in batch.prompts:
            prompts[row, start:stop] = 1
        answers.view(-1)[batch.places.cpu()] = (batch.labels.cpu() != -100).double()
        counted = (prompts / prompts.sum().clamp_min(1) + answers / answers.sum().clamp_min(1)) * len(batch.samples)
        yield Pass(counted.to(batch.input_ids.device), functools.partial(answer_loss, batch=batch))
