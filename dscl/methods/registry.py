"""Continual-learning methods: one file each, one table of names."""

from __future__ import annotations

from dscl.config.methods import method_config
from dscl.methods.agem import Agem
from dscl.methods.asr import Asr
from dscl.methods.base import Ended, Facts, Look, Matrix, Method, Ranks
from dscl.methods.ewc import Ewc
from dscl.methods.joint import Joint
from dscl.methods.lora_per_task import LoraPerTask
from dscl.methods.lwf import Lwf
from dscl.methods.moses import Moses
from dscl.methods.olora import Olora
from dscl.methods.osft import Osft
from dscl.methods.replay import Replay
from dscl.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "joint": Joint,
    "replay": Replay,
    "agem": Agem,
    "ewc": Ewc,
    "lwf": Lwf,
    "olora": Olora,
    "lora_per_task": LoraPerTask,
    "asr": Asr,
    "osft": Osft,
    "moses": Moses,
}

__all__ = ["METHODS", "Ended", "Facts", "Look", "Matrix", "Method", "Ranks", "find_method"]


def find_method(name: str) -> type[Method]:
    method_config(name)  # which refuses a name that is none
    return METHODS[name]
