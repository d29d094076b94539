"""The typed keys of every method, by the method's name in a recipe.

The methods themselves are in `dscl.methods`; each refers to its class here as `Config`. The keys are declared here, and
not beside the method, because a recipe is checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dscl.config.parsing import config_key, did_you_mean
from dscl.maths.readings import PROJECTIONS
from dscl.utils.errors import UserError

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = config_key(8, at_least=1, help="rank of the adapters")
    alpha: float = config_key(16.0, above=0.0, help="the adapter's output is scaled by alpha / rank")
    dropout: float = config_key(0.0, at_least=0.0, at_most=0.99, help="dropout on the adapters' input")
    targets: tuple[str, ...] = config_key(
        LLAMA_PROJECTIONS, help="names (or endings of names) of the layers that get an adapter"
    )


@dataclass(frozen=True)
class SequentialConfig:
    name: str = config_key("sequential")
    tune: str = config_key("full", choices=("full", "lora"), help="train all weights, or one LoRA shared by all tasks")
    lora: LoraConfig | None = config_key(None, help="the LoRA's settings, with tune: lora")

    def __post_init__(self) -> None:
        if self.tune == "full" and self.lora is not None:
            raise UserError("method.lora: given together with tune: full; set method.tune=lora or remove method.lora")


@dataclass(frozen=True)
class JointConfig(SequentialConfig):
    name: str = config_key("joint")


@dataclass(frozen=True)
class ReplayConfig(SequentialConfig):
    name: str = config_key("replay")
    share: float | None = config_key(
        None, above=0.0, at_most=1.0, help="share of each task's samples that is kept; default: 0.1, without `most`"
    )
    most: int | None = config_key(
        None, at_least=1, help="instead of `share`: the size of the buffer, equally many samples of each finished task"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.most is not None:
            raise UserError(f"method.most: given {self.most} together with share: {self.share}; remove one of them")
        if self.share is None and self.most is None:
            object.__setattr__(self, "share", 0.1)


@dataclass(frozen=True)
class AgemConfig(ReplayConfig):
    name: str = config_key("agem")


@dataclass(frozen=True)
class EwcConfig(SequentialConfig):
    name: str = config_key("ewc")
    strength: float = config_key(1000.0, above=0.0, help="weight of the quadratic penalty (the paper's λ)")
    memory: float = config_key(
        1.0, at_least=0.0, at_most=1.0, help="factor on the earlier tasks' Fisher information at the end of a task (μ)"
    )
    samples: int = config_key(512, at_least=1, help="samples of a task for its Fisher information")


@dataclass(frozen=True)
class LwfConfig(SequentialConfig):
    name: str = config_key("lwf")
    strength: float = config_key(1.0, above=0.0, help="weight of the distillation loss (λ)")
    temperature: float = config_key(2.0, above=0.0, help="temperature of the distillation (T): divides the logits")
    tokens: int = config_key(
        64, at_least=1, help="how many of the teacher's most likely tokens are recorded at each position"
    )


@dataclass(frozen=True)
class LoraPerTaskConfig:
    name: str = config_key("lora_per_task")
    lora: LoraConfig | None = config_key(None, help="the adapters; default: as in sequential")


@dataclass(frozen=True)
class OloraConfig:
    name: str = config_key("olora")
    lora: LoraConfig | None = config_key(None, help="the adapters; default: as in sequential")
    orthogonality: float = config_key(
        0.5, at_least=0.0, help="weight of the orthogonality loss between a new LoRA and the earlier ones (λ)"
    )


# The settings of ASR's paper. With `faithful: true` a recipe may not set another value for these keys.
ASR_PAPER_SETTINGS: dict[str, Any] = {
    "feature_layer": 4,
    "width": 10000,
    "ridge": 100.0,
    "reject": False,
    "lora": LoraConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class AsrConfig:
    name: str = config_key("asr")
    faithful: bool = config_key(
        False, help="the paper's settings and its features in floating point; sets all keys below"
    )
    feature_layer: int | None = config_key(
        None,
        at_least=1,
        help="the router reads this layer's input, and layers below get no adapter; default: an eighth of all, at "
        "least 2",
    )
    width: int | None = config_key(
        None, at_least=8, at_most=65536, help="number of random features; default: twice the hidden size, at least 2048"
    )
    ridge: float | None = config_key(
        None, above=0.0, help="ridge in units of the features' mean square; default: chosen from the statistics"
    )
    reject: bool | None = config_key(None, help="answer prompts far from every task with the base model; default: true")
    lora: LoraConfig | None = config_key(None, help="the adapters; default: as in sequential")

    def __post_init__(self) -> None:
        presets = ASR_PAPER_SETTINGS if self.faithful else {"reject": True, "lora": LoraConfig()}
        for name, preset in presets.items():
            chosen = getattr(self, name)
            if self.faithful and chosen is not None and chosen != preset:
                raise UserError(
                    f"method.{name}: given {chosen} together with faithful: true, which sets {preset}; remove one of "
                    "them"
                )
            object.__setattr__(self, name, preset if chosen is None else chosen)


# What the protected directions of a weight matrix are computed from. Several sources have equal weight.
DIRECTION_SOURCES = {
    "weights": "the largest singular directions of the weights",
    "activations": "the directions of the layer's inputs",
    "sensitivity": "the directions of the inputs, weighted by the gradient of the loss for the layer's output",
    "updates": "the directions in which the task changed the weights",
}
# The settings of OSFT's paper. With `faithful: true` a recipe may not set another value for these keys.
OSFT_PAPER_SETTINGS: dict[str, Any] = {
    "reading": "paper",
    "basis": ("weights",),
    "allocate": "importance",
    "least": 0.1,
    "share": 0.8,
    "claim": (),
    "gradients": True,
}
OSFT_DEFAULTS: dict[str, Any] = {
    "reading": "input",
    "basis": ("activations",),
    "allocate": "fixed",
    "share": 0.33,
    "claim": ("updates", "activations", "sensitivity"),
    "gradients": True,
}


@dataclass(frozen=True)
class OsftConfig:
    name: str = config_key("osft")
    faithful: bool = config_key(False, help="the paper's settings: sets the keys from `reading` to `gradients`")
    reading: str | None = config_key(
        None,
        choices=PROJECTIONS,
        help="what of a weight matrix is protected. input: its effect on the protected input directions; two_sided: "
        "also its effect into the protected output directions; paper: only what maps protected inputs to protected "
        "outputs, as the paper prints it; default: input",
    )
    basis: tuple[str, ...] | None = config_key(
        None,
        help="sources of the base model's protected directions: one or more of weights, activations and sensitivity; "
        "the last two are measured on texts that the model generates; default: activations",
    )
    allocate: str | None = config_key(
        None,
        choices=("fixed", "importance", "energy"),
        help="what `share` is a share of. fixed: each matrix's rank; importance: of that at most, by the paper's layer "
        "importance; energy: the energy of the directions",
    )
    share: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="how much is protected before the first task; default: 0.33"
    )
    least: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="with allocate: importance, the smallest share of a matrix"
    )
    claim: tuple[str, ...] | None = config_key(
        None,
        help="sources of the directions that are protected after each task: any of updates, activations and "
        "sensitivity, measured on the task's samples; []: protect none; default: all three",
    )
    claim_energy: float | None = config_key(
        None, at_least=0.0, at_most=1.0, help="protect the directions with this share of the energy; default: 0.99"
    )
    when_short: str = config_key(
        "share",
        choices=("share", "give_back", "stop"),
        help="if a task needs more directions than its part of the free ones. share: it gets its part; give_back: it "
        "gets all it needs, and the base model gives up its weakest directions when a later task has too few; stop: it "
        "gets all it needs, and a later task with too few is refused",
    )
    gradients: bool | None = config_key(
        None, help="also project the gradients, before AdamW normalises them; default: true"
    )
    project_every: int = config_key(
        1, at_least=1, help="optimizer steps between two projections; the weights are always projected before a save"
    )
    targets: tuple[str, ...] = config_key(
        LLAMA_PROJECTIONS, help="names (or endings of names) of the constrained layers"
    )
    rest: str = config_key(
        "frozen",
        choices=("frozen", "free", "protected"),
        help="how embeddings, head and norms are treated; norms are never protected",
    )

    def __post_init__(self) -> None:
        for name, preset in (OSFT_PAPER_SETTINGS if self.faithful else OSFT_DEFAULTS).items():
            chosen = getattr(self, name)
            if self.faithful and chosen is not None and chosen != preset:
                raise UserError(
                    f"method.{name}: given {chosen} together with faithful: true, which sets {preset}; remove one of "
                    "them"
                )
            object.__setattr__(self, name, preset if chosen is None else chosen)
        for name, allowed in (("basis", tuple(DIRECTION_SOURCES)[:3]), ("claim", tuple(DIRECTION_SOURCES)[1:])):
            sources = getattr(self, name)
            is_invalid = not set(sources) <= set(allowed) or len(set(sources)) < len(sources)
            if is_invalid or (name == "basis" and not sources):
                raise UserError(
                    f"method.{name}: given {list(sources)}; allowed: one or several of {', '.join(allowed)}"
                )
        if not self.claim and self.claim_energy is not None:
            raise UserError(
                f"method.claim_energy: given {self.claim_energy} with claim: [], which has no use for it; remove it"
            )
        object.__setattr__(self, "claim_energy", 0.99 if self.claim_energy is None else self.claim_energy)
        if self.allocate != "importance" and self.least is not None:
            raise UserError(
                f"method.least: given {self.least} with allocate: {self.allocate}, which has no use for it; remove it, "
                "or set method.allocate=importance"
            )
        if self.allocate == "importance":
            object.__setattr__(self, "least", 0.1 if self.least is None else self.least)
            if self.least > self.share:  # type: ignore[operator]
                raise UserError(f"method.least: given {self.least}, more than share={self.share}, the most; lower it")


@dataclass(frozen=True)
class MosesConfig:
    name: str = config_key("moses")
    masks: str = config_key(
        "atom",
        choices=("atom", "element"),
        help="what a task's mask selects: rank-1 pairs of a column and a row, or single entries of the matrices",
    )
    experts: int = config_key(8, at_least=1, help="initial number of sub-experts beside each projection")
    rank: int = config_key(8, at_least=1, help="rank of a sub-expert")
    most: int | None = config_key(
        None, at_least=1, help="maximum number of sub-experts; default: what the stream can need"
    )
    share: float = config_key(
        0.25, above=0.0, at_most=1.0, help="share of the initial sub-experts' parameters that a task's mask selects"
    )
    gate: str = config_key(
        "token",
        choices=("token", "uniform"),
        help="token: a router sends every token to top_k sub-experts; uniform: every token to all, with equal weight",
    )
    top_k: int | None = config_key(
        None, at_least=1, help="number of sub-experts for each token; default: 2, or all if fewer"
    )
    reuse: bool = config_key(True, help="a task's mask may select parameters that earlier tasks have frozen")
    when_full: str = config_key(
        "grow",
        choices=("grow", "reuse", "stop"),
        help="if too few parameters are free for a task: add a sub-expert, train on fewer, or stop with an error",
    )
    alpha: float = config_key(64.0, above=0.0, help="the sub-experts' output is scaled by alpha / rank")
    dropout: float = config_key(0.0, at_least=0.0, at_most=0.99, help="dropout on the sub-experts' input")
    targets: tuple[str, ...] = config_key(
        ("q_proj", "k_proj", "v_proj", "o_proj"), help="names (or endings of names) of the layers that get sub-experts"
    )
    task_inference: str = config_key(
        "rls",
        choices=("given", "key", "rls"),
        help="how the task of a prompt is found. given: by the caller; key: by the most similar task key; rls: by the "
        "analytic router",
    )
    feature_layer: int | None = config_key(
        None,
        at_least=1,
        help="the router reads this layer's input, and layers below are never changed; default: an eighth of all, at "
        "least 2",
    )
    width: int | None = config_key(
        None,
        at_least=8,
        at_most=65536,
        help="with rls: number of random features; default: twice the hidden size, at least 2048",
    )
    ridge: float | None = config_key(
        None,
        above=0.0,
        help="with rls: ridge in units of the features' mean square; default: chosen from the statistics",
    )
    reject: bool | None = config_key(
        None, help="with rls: answer prompts far from every task with the base model; default: true"
    )
    weights: OsftConfig | None = config_key(
        None, help="how the dense weights of the same layers are trained: {name: osft, ...}; default: frozen"
    )

    def __post_init__(self) -> None:
        unused_keys = {
            "given": ("feature_layer", "width", "ridge", "reject"),
            "key": ("width", "ridge", "reject"),
            "rls": (),
        }
        for name in unused_keys[self.task_inference]:
            if getattr(self, name) is not None:
                raise UserError(
                    f"method.{name}: given {getattr(self, name)} with task_inference: {self.task_inference}, which has "
                    "no use for it; remove it, or set method.task_inference=rls"
                )
        if not self.targets:
            raise UserError("method.targets: given []; sub-experts stand beside projections, so name some")
        if self.gate == "uniform" and self.top_k is not None:
            raise UserError(
                f"method.top_k: given {self.top_k} with gate: uniform, which asks all sub-experts; remove it"
            )
        if self.top_k is not None and self.top_k > self.experts:
            raise UserError(
                f"method.top_k: given {self.top_k}; there are {self.experts} sub-experts, so at most that many"
            )
        if self.most is not None and self.most < self.experts:
            raise UserError(f"method.most: given {self.most}; at least method.experts={self.experts} are needed")
        if not self.reuse and self.when_full == "reuse":
            raise UserError(
                "method.when_full: given reuse with reuse: false; a task would find nothing to train; set grow or stop"
            )
        if self.weights is not None:
            if self.weights.name != "osft":
                raise UserError(
                    f"method.weights.name: given {self.weights.name!r}; allowed: osft, or no weights at all"
                )
            if self.weights.rest != "frozen" and self.task_inference != "given":
                raise UserError(
                    f"method.weights.rest: given {self.weights.rest} with task_inference: {self.task_inference}; what "
                    "decides needs features that stay the same for ever, so leave embeddings frozen, or set "
                    "method.task_inference=given"
                )


METHOD_CONFIGS: dict[str, type] = {
    "sequential": SequentialConfig,
    "joint": JointConfig,
    "replay": ReplayConfig,
    "agem": AgemConfig,
    "ewc": EwcConfig,
    "lwf": LwfConfig,
    "olora": OloraConfig,
    "lora_per_task": LoraPerTaskConfig,
    "asr": AsrConfig,
    "osft": OsftConfig,
    "moses": MosesConfig,
}


def find_config_class(name: str) -> type:
    """The config class of the method with this name: a frozen dataclass whose first field is `name`."""
    if name not in METHOD_CONFIGS:
        suggestion = did_you_mean(str(name), METHOD_CONFIGS)
        raise UserError(f"method.name: given {name!r}; allowed: {', '.join(METHOD_CONFIGS)}{suggestion}")
    return METHOD_CONFIGS[name]
