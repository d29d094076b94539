"""The typed keys of every part of a method: what trains, what may not change, the router, replay, and the loss.

A recipe selects a part by its `name`, which is the first key of each class here. `dscl.config.methods` says which parts
a method is made of. Neither file imports a heavy package, so a recipe is checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dscl.config.parsing import config_key
from dscl.maths.projections import PROJECTIONS
from dscl.utils.errors import UserError

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def part_name(name: str) -> Any:
    """The key `name` of a part. It has one allowed value."""
    return config_key(name, choices=(name,), help="selects this part")


# ---- tune: what trains


@dataclass(frozen=True)
class FullConfig:
    """All weights of the model."""

    name: str = part_name("full")


@dataclass(frozen=True)
class LoraConfig:
    """One LoRA for all tasks."""

    name: str = part_name("lora")
    rank: int = config_key(8, at_least=1, at_most=16384, help="rank of the adapters")
    alpha: float = config_key(16.0, above=0.0, help="the adapter's output is scaled by alpha / rank")
    dropout: float = config_key(0.0, at_least=0.0, at_most=0.99, help="dropout on the adapters' input")
    targets: tuple[str, ...] = config_key(
        LLAMA_PROJECTIONS, help="names (or endings of names) of the layers that get an adapter"
    )


@dataclass(frozen=True)
class LoraPerTaskConfig(LoraConfig):
    """A LoRA for each task."""

    name: str = part_name("lora_per_task")


@dataclass(frozen=True)
class SubExpertsConfig:
    """Sparse low-rank sub-experts that tasks share."""

    name: str = part_name("sub_experts")
    masks: str = config_key(
        "rank1",
        choices=("rank1", "element"),
        help="what a task's mask selects: rank-1 pairs of a column and a row, or single entries of the matrices",
    )
    num_experts: int = config_key(
        8, at_least=1, at_most=4096, help="initial number of sub-experts beside each projection"
    )
    rank: int = config_key(8, at_least=1, at_most=16384, help="rank of a sub-expert")
    max_experts: int | None = config_key(
        None, at_least=1, at_most=65536, help="maximum number of sub-experts; default: what the stream can need"
    )
    mask_density: float = config_key(
        0.25, above=0.0, at_most=1.0, help="share of the initial sub-experts' parameters that a task's mask selects"
    )
    gate: str = config_key(
        "token",
        choices=("token", "uniform"),
        help="token: a gate sends every token to top_k sub-experts; uniform: every token to all, with equal weight",
    )
    top_k: int | None = config_key(
        None, at_least=1, help="number of sub-experts for each token; default: 2, or all if fewer"
    )
    reuse: bool = config_key(True, help="a task's mask may select parameters that earlier tasks have frozen")
    on_full: str = config_key(
        "grow",
        choices=("grow", "reuse", "stop"),
        help="if too few parameters are free for a task: add a sub-expert, train on fewer, or stop with an error",
    )
    alpha: float = config_key(64.0, above=0.0, help="the sub-experts' output is scaled by alpha / rank")
    dropout: float = config_key(0.0, at_least=0.0, at_most=0.99, help="dropout on the sub-experts' input")
    targets: tuple[str, ...] = config_key(
        ("q_proj", "k_proj", "v_proj", "o_proj"), help="names (or endings of names) of the layers that get sub-experts"
    )

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError("method.tune.targets: given []; sub-experts stand beside projections, so name some")
        if self.gate == "uniform" and self.top_k is not None:
            raise UserError(
                f"method.tune.top_k: given {self.top_k} with gate: uniform, which uses all sub-experts; remove it"
            )
        if self.top_k is not None and self.top_k > self.num_experts:
            raise UserError(
                f"method.tune.top_k: given {self.top_k}; there are {self.num_experts} sub-experts, so at most that many"
            )
        if self.max_experts is not None and self.max_experts < self.num_experts:
            raise UserError(
                f"method.tune.max_experts: given {self.max_experts}; at least method.tune.num_experts="
                f"{self.num_experts} are needed"
            )
        if not self.reuse and self.on_full == "reuse":
            raise UserError(
                "method.tune.on_full: given reuse with reuse: false; a task would find nothing to train; set grow or "
                "stop"
            )


# ---- constraint: what may not change


@dataclass(frozen=True)
class EwcConfig:
    """A quadratic penalty on changes of parameters that matter for ended tasks."""

    name: str = part_name("ewc")
    ewc_lambda: float = config_key(1000.0, above=0.0, help="weight of the quadratic penalty (λ)")
    gamma: float = config_key(
        1.0,
        at_least=0.0,
        at_most=1.0,
        help="factor on the earlier tasks' Fisher information at the end of a task",
    )
    fisher_samples: int = config_key(512, at_least=1, help="samples of a task for its Fisher information")


@dataclass(frozen=True)
class AgemConfig:
    """Gradients may not increase the loss on stored samples."""

    name: str = part_name("agem")
    memory_ratio: float | None = config_key(
        None, above=0.0, at_most=1.0, help="share of each task's samples that is stored; default: 0.1 (no memory_size)"
    )
    memory_size: int | None = config_key(
        None, at_least=1, help="instead of memory_ratio: number of stored samples, equally many of each ended task"
    )

    def __post_init__(self) -> None:
        _fill_ratio(self, "memory_ratio", "memory_size", "method.constraint")


@dataclass(frozen=True)
class OloraConfig:
    """A new LoRA is kept orthogonal to the earlier ones."""

    name: str = part_name("olora")
    orthogonality: float = config_key(
        0.5, at_least=0.0, help="weight of the orthogonality loss between a new LoRA and the earlier ones (λ)"
    )


# Sources of the protected directions of a weight matrix. Several sources have equal weight.
DIRECTION_SOURCES = {
    "weights": "the largest singular directions of the weights",
    "activations": "the directions of the layer's inputs",
    "sensitivity": "the directions of the inputs, weighted by the gradient of the loss for the layer's output",
    "updates": "the directions in which the task changed the weights",
}
# The settings of OSFT's paper. With `paper_preset: true` a recipe may not set another value for these keys.
OSFT_PAPER_SETTINGS: dict[str, Any] = {
    "projection": "paper",
    "protect_base": ("weights",),
    "rank_allocation": "importance",
    "min_protected": 0.1,
    "protected_ratio": 0.8,
    "protect_task": (),
    "project_gradients": True,
}
OSFT_DEFAULTS: dict[str, Any] = {
    "projection": "input",
    "protect_base": ("activations",),
    "rank_allocation": "fixed",
    "protected_ratio": 0.33,
    "protect_task": ("updates", "activations", "sensitivity"),
    "project_gradients": True,
}


@dataclass(frozen=True)
class OsftConfig:
    """Each weight matrix has a protected subspace in which it cannot change."""

    name: str = part_name("osft")
    paper_preset: bool = config_key(False, help="the paper's settings: sets the keys below up to project_gradients")
    projection: str | None = config_key(
        None,
        choices=PROJECTIONS,
        help="what of a weight matrix is protected. input: its effect on the protected input directions; two_sided: "
        "also its effect into the protected output directions; paper: only what maps protected inputs to protected "
        "outputs, as the paper prints it; default: input",
    )
    protect_base: tuple[str, ...] | None = config_key(
        None,
        help="sources of the base model's protected directions: one or more of weights, activations and sensitivity; "
        "the last two are measured on texts that the model generates; default: activations",
    )
    rank_allocation: str | None = config_key(
        None,
        choices=("fixed", "importance", "energy"),
        help="what protected_ratio is a share of. fixed: each matrix's rank; importance: of that at most, by the "
        "paper's layer importance; energy: the energy of the directions",
    )
    protected_ratio: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="how much is protected before the first task; default: 0.33"
    )
    min_protected: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="with rank_allocation: importance, the smallest share of a matrix"
    )
    protect_task: tuple[str, ...] | None = config_key(
        None,
        help="sources of the directions that are protected after each task: any of updates, activations and "
        "sensitivity, measured on the task's samples; []: protect none; default: all three",
    )
    energy_threshold: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="protect the directions with this share of the energy; default: 0.99"
    )
    project_gradients: bool | None = config_key(
        None, help="also project the gradients, before AdamW normalises them; default: true"
    )
    on_full: str = config_key(
        "fair_share",
        choices=("fair_share", "release_base", "stop"),
        help="if a task needs more directions than its part of the free ones. fair_share: it gets its part; "
        "release_base: it gets all it needs, and the base model gives up its weakest directions when a later task has "
        "too few; stop: it gets all it needs, and a later task with too few is refused",
    )
    project_every: int = config_key(
        1, at_least=1, help="optimizer steps between two projections; the weights are always projected before a save"
    )
    targets: tuple[str, ...] = config_key(
        LLAMA_PROJECTIONS, help="names (or endings of names) of the constrained layers"
    )
    other_params: str = config_key(
        "frozen",
        choices=("frozen", "free", "protected"),
        help="how embeddings, head and norms are treated; norms are never protected",
    )

    def __post_init__(self) -> None:
        fill_preset(self, self.paper_preset, OSFT_PAPER_SETTINGS, OSFT_DEFAULTS, "method.constraint")
        for name, allowed in (
            ("protect_base", tuple(DIRECTION_SOURCES)[:3]),
            ("protect_task", tuple(DIRECTION_SOURCES)[1:]),
        ):
            sources = getattr(self, name)
            is_invalid = not set(sources) <= set(allowed) or len(set(sources)) < len(sources)
            if is_invalid or (name == "protect_base" and not sources):
                raise UserError(
                    f"method.constraint.{name}: given {list(sources)}; allowed: one or several of {', '.join(allowed)}"
                )
        if not self.protect_task and self.energy_threshold is not None:
            raise UserError(
                f"method.constraint.energy_threshold: given {self.energy_threshold} with protect_task: [], which has "
                "no use for it; remove it"
            )
        object.__setattr__(self, "energy_threshold", 0.99 if self.energy_threshold is None else self.energy_threshold)
        if self.rank_allocation != "importance" and self.min_protected is not None:
            raise UserError(
                f"method.constraint.min_protected: given {self.min_protected} with rank_allocation: "
                f"{self.rank_allocation}, which has no use for it; remove it, or set "
                "method.constraint.rank_allocation=importance"
            )
        if self.rank_allocation == "importance":
            object.__setattr__(self, "min_protected", 0.1 if self.min_protected is None else self.min_protected)
            if self.min_protected > self.protected_ratio:  # type: ignore[operator]
                raise UserError(
                    f"method.constraint.min_protected: given {self.min_protected}, more than protected_ratio="
                    f"{self.protected_ratio}, the most; lower it"
                )


# ---- router: who finds a prompt's task


@dataclass(frozen=True)
class OracleRouterConfig:
    """The caller names every prompt's task."""

    name: str = part_name("oracle")


@dataclass(frozen=True)
class KeyRouterConfig:
    """The task with the most similar key."""

    name: str = part_name("key")
    layer: int | None = config_key(
        None,
        at_least=1,
        help="the router reads this layer's input, and layers below are never changed; default: an eighth of all, at "
        "least 2",
    )


@dataclass(frozen=True)
class RlsRouterConfig(KeyRouterConfig):
    """The analytic router: ridge regression on random features, in closed form."""

    name: str = part_name("rls")
    num_features: int | None = config_key(
        None, at_least=8, at_most=65536, help="number of random features; default: twice the hidden size, at least 2048"
    )
    ridge: float | None = config_key(
        None, above=0.0, help="ridge in units of the features' mean square; default: chosen from the statistics"
    )
    ood_fallback: bool | None = config_key(
        None, help="answer prompts far from every task with the base model; default: true"
    )


# ---- replay: what is seen again


@dataclass(frozen=True)
class ReplayConfig:
    """Stored samples of ended tasks are mixed into every later task."""

    ratio: float | None = config_key(
        None, above=0.0, at_most=1.0, help="share of each task's samples that is stored; default: 0.1, without size"
    )
    size: int | None = config_key(
        None, at_least=1, help="instead of ratio: the size of the buffer, equally many samples of each ended task"
    )

    def __post_init__(self) -> None:
        _fill_ratio(self, "ratio", "size", "method.replay")


# ---- loss


@dataclass(frozen=True)
class LwfConfig:
    """Distillation from the model before the task."""

    name: str = part_name("lwf")
    weight: float = config_key(1.0, above=0.0, help="weight of the distillation loss (λ)")
    temperature: float = config_key(2.0, above=0.0, help="temperature of the distillation (T): divides the logits")
    top_tokens: int = config_key(
        64, at_least=1, help="how many of the teacher's most likely tokens are recorded at each position"
    )


def fill_preset(
    config: Any, is_paper: bool, paper_settings: dict[str, Any], defaults: dict[str, Any], path: str
) -> None:
    """Set every key that is None: to the paper's value, or to its default. Under the paper's preset, another value is
    refused."""
    for name, value in (paper_settings if is_paper else defaults).items():
        chosen = getattr(config, name)
        if is_paper and chosen is not None and chosen != value:
            raise UserError(
                f"{path}.{name}: given {chosen} together with paper_preset: true, which sets {value}; remove one of "
                "them"
            )
        object.__setattr__(config, name, value if chosen is None else chosen)


def _fill_ratio(config: Any, ratio: str, size: str, path: str) -> None:
    """Refuse a ratio together with a size; without both, the ratio is 0.1."""
    chosen_ratio, chosen_size = getattr(config, ratio), getattr(config, size)
    if chosen_ratio is not None and chosen_size is not None:
        raise UserError(f"{path}.{size}: given {chosen_size} together with {ratio}: {chosen_ratio}; remove one of them")
    if chosen_ratio is None and chosen_size is None:
        object.__setattr__(config, ratio, 0.1)
