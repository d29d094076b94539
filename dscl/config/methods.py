"""The typed keys of every method, by its name in a recipe. The methods themselves are in `dscl.methods.registry`.

A method's class names its keys again as `Config`. They are here, and not beside the class, because a recipe is checked
before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dscl.config.parsing import key, nearest
from dscl.maths.readings import READINGS
from dscl.utils.errors import UserError

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = key(8, at_least=1, help="rank of the adapters")
    alpha: float = key(16.0, above=0.0, help="the adapter's output is scaled by alpha / rank")
    dropout: float = key(0.0, at_least=0.0, at_most=0.99, help="dropout on the adapters' input")
    targets: tuple[str, ...] = key(LLAMA_PROJECTIONS, help="names (or endings of names) of the layers that get one")


@dataclass(frozen=True)
class SequentialConfig:
    name: str = key("sequential")
    tune: str = key("full", choices=("full", "lora"), help="all weights, or one LoRA shared by all tasks")
    lora: LoraConfig | None = key(None, help="the LoRA's settings, with tune: lora")

    def __post_init__(self) -> None:
        if self.tune == "full" and self.lora is not None:
            raise UserError("method.lora: given together with tune: full; set method.tune=lora or remove method.lora")


@dataclass(frozen=True)
class JointConfig(SequentialConfig):
    name: str = key("joint")


@dataclass(frozen=True)
class ReplayConfig(SequentialConfig):
    name: str = key("replay")
    share: float | None = key(
        None, above=0.0, at_most=1.0, help="of each task's samples, how many are kept; default: 0.1, without `most`"
    )
    most: int | None = key(
        None, at_least=1, help="instead: samples kept in all, an equal number of each task that has ended"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.most is not None:
            raise UserError(f"method.most: given {self.most} together with share: {self.share}; remove one of them")
        if self.share is None and self.most is None:
            object.__setattr__(self, "share", 0.1)


@dataclass(frozen=True)
class AgemConfig(ReplayConfig):
    name: str = key("agem")


@dataclass(frozen=True)
class EwcConfig(SequentialConfig):
    name: str = key("ewc")
    strength: float = key(1000.0, above=0.0, help="of the penalty (the paper's λ)")
    memory: float = key(
        1.0, at_least=0.0, at_most=1.0, help="what is left of earlier tasks' information when one ends (μ)"
    )
    samples: int = key(512, at_least=1, help="of a task, by which its information is measured")


@dataclass(frozen=True)
class LwfConfig(SequentialConfig):
    name: str = key("lwf")
    strength: float = key(1.0, above=0.0, help="of what was said, beside the task's own loss (λ)")
    temperature: float = key(2.0, above=0.0, help="by which logits are divided for it (T)")
    tokens: int = key(64, at_least=1, help="how many of the likeliest tokens are recorded at each target")


@dataclass(frozen=True)
class LoraPerTaskConfig:
    name: str = key("lora_per_task")
    lora: LoraConfig | None = key(None, help="the adapters; default: as in sequential")


@dataclass(frozen=True)
class OloraConfig:
    name: str = key("olora")
    lora: LoraConfig | None = key(None, help="the adapters; default: as in sequential")
    orthogonality: float = key(0.5, at_least=0.0, help="how much a new LoRA's overlap with earlier ones costs (λ)")


# ASR's settings in its paper; a recipe that asks for them may not ask for others.
ASR_PAPER: dict[str, Any] = {
    "feature_layer": 4,
    "width": 10000,
    "ridge": 100.0,
    "reject": False,
    "lora": LoraConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class AsrConfig:
    name: str = key("asr")
    faithful: bool = key(False, help="the paper's settings and its features in floating point; sets all keys below")
    feature_layer: int | None = key(
        None,
        at_least=1,
        help="layers below are never adapted, the features are its input; default: an eighth of all, from 2",
    )
    width: int | None = key(None, at_least=8, at_most=65536, help="features; default: twice the hidden size, from 2048")
    ridge: float | None = key(
        None, above=0.0, help="in units of the features' mean square; default: chosen from the statistics"
    )
    reject: bool | None = key(None, help="prompts far from every task go to the base model; default: true")
    lora: LoraConfig | None = key(None, help="the adapters; default: as in sequential")

    def __post_init__(self) -> None:
        default = ASR_PAPER if self.faithful else {"reject": True, "lora": LoraConfig()}
        for name, value in default.items():
            given = getattr(self, name)
            if self.faithful and given is not None and given != value:
                raise UserError(
                    f"method.{name}: given {given} together with faithful: true, which sets {value}; remove one of them"
                )
            object.__setattr__(self, name, value if given is None else given)


# Where directions come from. Of several sources each counts alike.
SOURCES = {
    "weights": "those in which the weights are strong",
    "activations": "in which the layer's inputs are",
    "sensitivity": "in which they are where the loss feels the layer's output",
    "updates": "in which the task changed the weights",
}
# OSFT's settings in its paper; a recipe that asks for them may not ask for others.
OSFT_PAPER: dict[str, Any] = {
    "reading": "paper",
    "basis": ("weights",),
    "allocate": "importance",
    "least": 0.1,
    "share": 0.8,
    "claim": (),
    "gradients": True,
}
OSFT_DEFAULT: dict[str, Any] = {
    "reading": "input",
    "basis": ("activations",),
    "allocate": "fixed",
    "share": 0.33,
    "claim": ("updates", "activations", "sensitivity"),
    "gradients": True,
}


@dataclass(frozen=True)
class OsftConfig:
    name: str = key("osft")
    faithful: bool = key(False, help="the paper's settings: sets the keys from `reading` to `gradients`")
    reading: str | None = key(
        None,
        choices=READINGS,
        help="what may not change: the outputs of protected inputs; that and the protected outputs; or, as the paper "
        "prints it, only what leads from the ones to the others; default: input",
    )
    basis: tuple[str, ...] | None = key(
        None,
        help="the base model's directions to protect, of weights, activations and sensitivity, the last two on texts "
        "that the model makes up; default: activations",
    )
    allocate: str | None = key(
        None,
        choices=("fixed", "importance", "energy"),
        help="`share` is of each matrix's rank; or the most that the paper's importance gives; or of the energy",
    )
    share: float | None = key(None, at_least=0.0, at_most=1.0, help="how much is protected at the start; default: 0.33")
    least: float | None = key(None, at_least=0.0, at_most=1.0, help="with allocate: importance, the least share")
    claim: tuple[str, ...] | None = key(
        None,
        help="a finished task's directions to protect for good, of updates, activations and sensitivity, on its own "
        "samples; []: none; default: all three",
    )
    claim_energy: float | None = key(
        None, at_least=0.0, at_most=1.0, help="the share of their energy that is protected; default: 0.99"
    )
    when_short: str = key(
        "share",
        choices=("share", "give_back", "stop"),
        help="a task that needs more room than its part of what is free gets that part; or gets all, and the base "
        "gives back its weakest directions where the next task finds too little; or all, and that task is refused",
    )
    gradients: bool | None = key(
        None, help="free the gradients of their protected part too, before AdamW scales by their size; default: true"
    )
    project_every: int = key(1, at_least=1, help="steps between projections; one always comes before a checkpoint")
    targets: tuple[str, ...] = key(LLAMA_PROJECTIONS, help="names (or endings of names) of the constrained layers")
    rest: str = key(
        "frozen", choices=("frozen", "free", "protected"), help="embeddings, head and norms; norms are never protected"
    )

    def __post_init__(self) -> None:
        for name, value in (OSFT_PAPER if self.faithful else OSFT_DEFAULT).items():
            given = getattr(self, name)
            if self.faithful and given is not None and given != value:
                raise UserError(
                    f"method.{name}: given {given} together with faithful: true, which sets {value}; remove one of them"
                )
            object.__setattr__(self, name, value if given is None else given)
        for name, allowed in (("basis", tuple(SOURCES)[:3]), ("claim", tuple(SOURCES)[1:])):
            given = getattr(self, name)
            if not set(given) <= set(allowed) or len(set(given)) < len(given) or (name == "basis" and not given):
                raise UserError(f"method.{name}: given {list(given)}; allowed: one or several of {', '.join(allowed)}")
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
    name: str = key("moses")
    masks: str = key(
        "atom", choices=("atom", "element"), help="what a mask opens: pairs of a column and a row, or single entries"
    )
    experts: int = key(8, at_least=1, help="sub-experts beside each projection")
    rank: int = key(8, at_least=1, help="rank of a sub-expert")
    most: int | None = key(
        None, at_least=1, help="sub-experts that there is room for; default: what the stream can need"
    )
    share: float = key(
        0.25, above=0.0, at_most=1.0, help="of the first sub-experts' parameters, how much a task's mask opens"
    )
    gate: str = key(
        "token", choices=("token", "uniform"), help="a router sends every token to a few sub-experts; or all alike"
    )
    top_k: int | None = key(None, at_least=1, help="sub-experts that a token is sent to; default: 2, or all if fewer")
    reuse: bool = key(True, help="a task's mask may open what earlier tasks have claimed")
    when_full: str = key(
        "grow",
        choices=("grow", "reuse", "stop"),
        help="a task that finds too little unclaimed gets a further sub-expert, or makes do, or is refused",
    )
    alpha: float = key(64.0, above=0.0, help="what is added is scaled by alpha / rank")
    dropout: float = key(0.0, at_least=0.0, at_most=0.99, help="dropout on the sub-experts' input")
    targets: tuple[str, ...] = key(
        ("q_proj", "k_proj", "v_proj", "o_proj"), help="names (or endings of names) of the layers that get them"
    )
    task_inference: str = key(
        "rls",
        choices=("given", "key", "rls"),
        help="who says which task a prompt belongs to: the caller, a key for each task, or the analytic router",
    )
    feature_layer: int | None = key(
        None,
        at_least=1,
        help="layers below are never changed, the features are its input; default: an eighth of all, from 2",
    )
    width: int | None = key(
        None, at_least=8, at_most=65536, help="with rls: features; default: twice the hidden size, from 2048"
    )
    ridge: float | None = key(
        None, above=0.0, help="with rls: in units of the features' mean square; default: chosen from the statistics"
    )
    reject: bool | None = key(None, help="with rls: prompts far from every task go to the bare model; default: true")
    weights: OsftConfig | None = key(
        None, help="the dense weights of the layers that have sub-experts: frozen, or {name: osft, ...}"
    )

    def __post_init__(self) -> None:
        unused = {
            "given": ("feature_layer", "width", "ridge", "reject"),
            "key": ("width", "ridge", "reject"),
            "rls": (),
        }
        for name in unused[self.task_inference]:
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


def method_config(name: str) -> type:
    """The keys of a method, each a frozen dataclass whose first field is `name`."""
    if name not in METHOD_CONFIGS:
        given = nearest(str(name), METHOD_CONFIGS)
        raise UserError(f"method.name: given {name!r}; allowed: {', '.join(METHOD_CONFIGS)}{given}")
    return METHOD_CONFIGS[name]
