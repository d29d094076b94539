"""The keys of every method, by the method's name in a recipe: a preset of parts (`dscl.config.parts`).

The methods themselves are in `dscl.methods`; each refers to its class here as `Config`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dscl.config.parsing import config_key, did_you_mean
from dscl.config.parts import (
    AgemConfig,
    EwcConfig,
    FullConfig,
    KeyRouterConfig,
    LoraConfig,
    LoraPerTaskConfig,
    LwfConfig,
    OloraConfig,
    OracleRouterConfig,
    OsftConfig,
    ReplayConfig,
    RlsRouterConfig,
    SubExpertsConfig,
    fill_preset,
)
from dscl.utils.errors import UserError

TUNE_HELP = "what trains"
ADAPTERS_HELP = "the adapters: one for each task"


@dataclass(frozen=True)
class SequentialPreset:
    name: str = config_key("sequential")
    tune: FullConfig | LoraConfig = config_key(FullConfig, help="what trains: all weights, or one LoRA for all tasks")


@dataclass(frozen=True)
class JointPreset(SequentialPreset):
    name: str = config_key("joint")


@dataclass(frozen=True)
class ReplayPreset(SequentialPreset):
    name: str = config_key("replay")
    replay: ReplayConfig = config_key(ReplayConfig, help="the samples that are stored and seen again")


@dataclass(frozen=True)
class AgemPreset(SequentialPreset):
    name: str = config_key("agem")
    constraint: AgemConfig = config_key(AgemConfig, help="the constraint on gradients")


@dataclass(frozen=True)
class EwcPreset(SequentialPreset):
    name: str = config_key("ewc")
    constraint: EwcConfig = config_key(EwcConfig, help="the penalty on changes")


@dataclass(frozen=True)
class LwfPreset(SequentialPreset):
    name: str = config_key("lwf")
    loss: LwfConfig = config_key(LwfConfig, help="the distillation loss")


@dataclass(frozen=True)
class LoraPerTaskPreset:
    name: str = config_key("lora_per_task")
    tune: LoraPerTaskConfig = config_key(LoraPerTaskConfig, help=ADAPTERS_HELP)


@dataclass(frozen=True)
class OloraPreset(LoraPerTaskPreset):
    name: str = config_key("olora")
    constraint: OloraConfig = config_key(OloraConfig, help="the orthogonality of the adapters")


# The settings of ASR's paper. With `paper_preset: true` a recipe may not set another value for these keys.
ASR_PAPER_ROUTER: dict[str, Any] = {"layer": 4, "num_features": 10000, "ridge": 100.0, "ood_fallback": False}
ASR_PAPER_ADAPTERS = LoraPerTaskConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q_proj", "v_proj"))


@dataclass(frozen=True)
class AsrPreset:
    name: str = config_key("asr")
    paper_preset: bool = config_key(
        False, help="the paper's settings and its features in floating point; sets all keys below"
    )
    tune: LoraPerTaskConfig | None = config_key(None, help=ADAPTERS_HELP)
    router: RlsRouterConfig = config_key(RlsRouterConfig, help="the router that finds a prompt's task")

    def __post_init__(self) -> None:
        fill_preset(self, self.paper_preset, {"tune": ASR_PAPER_ADAPTERS}, {"tune": LoraPerTaskConfig()}, "method")
        router = dataclasses.replace(self.router)
        fill_preset(router, self.paper_preset, ASR_PAPER_ROUTER, {"ood_fallback": True}, "method.router")
        object.__setattr__(self, "router", router)


@dataclass(frozen=True)
class OsftPreset:
    name: str = config_key("osft")
    tune: FullConfig = config_key(FullConfig, help=TUNE_HELP)
    constraint: OsftConfig = config_key(OsftConfig, help="the protected subspaces of the weights")


@dataclass(frozen=True)
class MosesPreset:
    name: str = config_key("moses")
    tune: SubExpertsConfig = config_key(SubExpertsConfig, help="the sub-experts and their masks")
    router: RlsRouterConfig | KeyRouterConfig | OracleRouterConfig = config_key(
        RlsRouterConfig, help="who finds a prompt's task: the analytic router, task keys, or the caller"
    )
    constraint: OsftConfig | None = config_key(
        None, help="the dense weights of the same layers train under this constraint; default: they are frozen"
    )

    def __post_init__(self) -> None:
        if self.constraint is not None and self.constraint.other_params != "frozen" and self.router.name != "oracle":
            raise UserError(
                f"method.constraint.other_params: given {self.constraint.other_params} with router: "
                f"{self.router.name}; the router needs features that stay the same for ever, so leave embeddings "
                "frozen, or set method.router.name=oracle"
            )


METHOD_PRESETS: dict[str, type] = {
    "sequential": SequentialPreset,
    "joint": JointPreset,
    "replay": ReplayPreset,
    "agem": AgemPreset,
    "ewc": EwcPreset,
    "lwf": LwfPreset,
    "olora": OloraPreset,
    "lora_per_task": LoraPerTaskPreset,
    "asr": AsrPreset,
    "osft": OsftPreset,
    "moses": MosesPreset,
}


def find_preset(name: str) -> type:
    """The preset of the method with this name: a frozen dataclass whose first field is `name`."""
    if name not in METHOD_PRESETS:
        suggestion = did_you_mean(str(name), METHOD_PRESETS)
        raise UserError(f"method.name: given {name!r}; allowed: {', '.join(METHOD_PRESETS)}{suggestion}")
    return METHOD_PRESETS[name]
