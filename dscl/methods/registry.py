"""The table of methods by the name that a recipe gives."""

from __future__ import annotations

from dscl.config.methods import find_preset
from dscl.methods.agem import Agem
from dscl.methods.asr import Asr
from dscl.methods.base import Method
from dscl.methods.ewc import Ewc
from dscl.methods.lora_per_task import LoraPerTask
from dscl.methods.lwf import Lwf
from dscl.methods.moses import Moses
from dscl.methods.olora import Olora
from dscl.methods.osft import Osft
from dscl.methods.replay import Replay
from dscl.methods.sequential import Joint, Sequential

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

__all__ = ["METHODS", "Method", "find_method"]


def find_method(name: str) -> type[Method]:
    """The class of a method."""
    find_preset(name)  # refuses unknown names
    return METHODS[name]
