"""The engine: one DeepSpeed engine for the whole stream. It shards, steps, resets and gives access to its own shards.

It knows no task. It is handed micro-batches and a pure loss function, and makes one exact optimizer step of them:
the loss is the mean over all target tokens of the global batch, whatever the ranks, accumulation or lengths.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from dscl.config.deepspeed_json import refuse_other_steps
from dscl.distributed import comm
from dscl.engine.gradient_hooks import Shown, Steering
from dscl.engine.matrix_owners import Constraint, Rounds, Stretch, busiest, deal
from dscl.engine.optimizer import Fragment, HookedAdamW
from dscl.engine.zero_shards import Shards, stretch
from dscl.model.backbone import DTYPES
from dscl.utils import timers
from dscl.utils.cache import locked
from dscl.utils.errors import UserError

# DeepSpeed's collectives: their kind, and which argument is what they send.
COLLECTIVES = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_reduce_coalesced": ("all_reduce", 0, "tensors"),
    "inference_all_reduce": ("all_reduce", 0, "tensor"),
    "reduce": ("reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_gather": ("all_gather", 1, "tensor"),
    "all_gather_into_tensor": ("all_gather", 1, "input_tensor"),
    "all_gather_coalesced": ("all_gather", 1, "input_tensors"),
    "reduce_scatter": ("reduce_scatter", 1, "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input_tensor"),
    "all_to_all_single": ("all_to_all", 1, "input"),
}
COMPILER_OFF = "TORCHDYNAMO_DISABLE"  # the environment's: torch.compile does nothing


ZERO_SUPPORTED_OPTIMIZERS.append(HookedAdamW)  # DeepSpeed knows optimizers by their exact type; this is AdamW


class Engine:
    """Build the sharded model, fill it from its weights, and train it step by step.

    `build` makes the bare module, `read(name, shape, start, stop)` gives stretches of its tensors, and `prepare`
    decides what trains (it may add modules) once the backbone is in place. Then `constraint` is asked for, which may
    name trained matrices that every step has to leave in a certain state, and `steering`, which may change gradients.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        build: Callable[[], nn.Module],
        read: Callable[[str, torch.Size, int, int], torch.Tensor],
        prepare: Callable[[nn.Module], nn.Module],
        constraint: Callable[[], Constraint | None] = lambda: None,
        steering: Callable[[], Steering | None] = lambda: None,
        precision: str,
        micro_batch: int = 1,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.device = comm.device()
        timers.use(self.device)
        self.dtype = DTYPES[precision]
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self.grad_clip = grad_clip
        self.last_norm: Any = None  # of the last step's gradient before clipping: a number, or a tensor not waited for
        # In this one case DeepSpeed clips without telling the norm.
        self._clips_itself = self.stage == 0 and precision == "fp32"
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("train.precision: given 'fp16', which CPUs do not train in; allowed here: fp32, bf16")
        config = {
            **settings,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,  # every step says itself where it ends
            "gradient_clipping": 0.0 if self._clips_itself else grad_clip,
            "steps_per_print": None,
            "zero_force_ds_cpu_optimizer": False,  # torch's own fused AdamW serves the CPU too
        }
        for kind in ("bf16", "fp16"):
            if kind == precision or kind in settings:
                config[kind] = {**settings.get(kind, {}), "enabled": kind == precision}
        _join_deepspeed()
        with _refusals(), self._sharded_construction(config):
            module = build()
        if self.stage != 3:
            module.to(self.device)
        fill(module, read)
        module = prepare(module)
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("method: nothing to train; no parameter of the model is trainable under these settings")
        # A rate of zero, because ZeRO makes its optimizer state with a step of its own: nothing may decay by it.
        self.optimizer = HookedAdamW(trainable, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        with _refusals(), redirect_stdout(io.StringIO()):  # it prints how much memory is in use as it goes
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.shards = Shards(self.deepspeed, self.optimizer, self.stage)
        self.constraint, self.steering = constraint(), steering()
        self._loose = False  # whether steps were made since the constraint was last made to hold
        if self.constraint is not None or self.steering is not None:
            refuse_other_steps(settings.get("zero_optimization", {}))
        if self.steering is not None:
            self._steer(self.steering)
        self._held = list(self.shards.fragments())
        if self.constraint is not None:
            self._deal(self.constraint)
        self.optimizer.before, self.optimizer.after = self._before, self._after

    @property
    def hold_every(self) -> int:
        """After how many steps the constraint is made to hold."""
        return self.constraint.every if self.constraint is not None else 1

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def step(
        self,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        micro_batches: Sequence[Any],
        *,
        targets: int,
        lr: float,
        skip_non_finite: bool = False,
        hold: bool = True,
    ) -> torch.Tensor:
        """One optimizer step over the global batch; returns this rank's sum of losses (on the device, not waited for).

        `loss` sums over the target tokens of a micro-batch; `targets` counts them over all ranks. With
        `skip_non_finite` a step whose loss or gradient is not finite changes nothing. `hold`: whether the constraint,
        if there is one, is made to hold after it.
        """
        self._holding = hold
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = self._backward(loss, micro_batches, targets)
        with timers.part("optimizer"):
            self.optimizer.skip = skip_non_finite and comm.any_rank(not bool(torch.isfinite(total)))
            if self._clips_itself:
                self.last_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.grad_clip or math.inf)
                self.optimizer.skip |= skip_non_finite and not math.isfinite(self.last_norm)
            self.deepspeed.step()
            if not self._clips_itself:
                self.last_norm = self.deepspeed.get_global_grad_norm()
            self.optimizer.skip = False
            if hold and self._loose:  # the step was left out: nothing brought back what those before it had done
                self._bring_back(list(self._views))
                self.shards.publish()
        return total

    def sense(
        self, loss: Callable[[nn.Module, Any], torch.Tensor], micro_batches: Sequence[Any], targets: int, shown: Shown
    ) -> None:
        """Show the gradient that a step would be made of, not clipped, and make none.

        Stretch by stretch; at stage 3 in one call for each of the optimizer's sub-groups.
        """
        wrapper = self.deepspeed.optimizer
        clip = getattr(wrapper, "clip_grad", None)  # where DeepSpeed clips, which is not in fp32 at stage 0
        self._backward(loss, micro_batches, targets)
        if clip is not None:
            wrapper.clip_grad = 0.0
        self.optimizer.instead = lambda stepped: shown(self._stepped(stepped))
        try:
            with timers.part("steering"):
                self.deepspeed.step()
        finally:
            self.optimizer.instead = None
            if clip is not None:
                wrapper.clip_grad = clip

    def _backward(
        self, loss: Callable[[nn.Module, Any], torch.Tensor], micro_batches: Sequence[Any], targets: int
    ) -> torch.Tensor:
        """The gradient of the sum of losses over all ranks' micro-batches, divided by `targets`; this rank's sum."""
        self.module.train()
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            with timers.part("data"):
                here = batch.to(self.device)
            with timers.part("forward"):
                value = loss(self.deepspeed, here).float()
            with timers.part("backward"):
                # DeepSpeed averages over ranks; times world over all targets makes that the mean over the global batch.
                self.deepspeed.backward(value * (comm.world() / targets), scale_wrt_gas=False)
            total += value.detach()
        return total

    @torch.no_grad()
    def start_over(self, read: Callable[[str, torch.Size, int, int], torch.Tensor | None] | None) -> None:
        """A new task: a fresh optimizer; the trainable tensors become what `read` gives, or else stay as they are."""
        self.shards.reset_moments()
        if read is not None:
            for fragment in self.shards.fragments():
                values = read(fragment.name, fragment.shape, fragment.start, fragment.stop)
                if values is not None:
                    fragment.master.copy_(values)
            self.shards.publish()

    @torch.no_grad()
    def visit(
        self,
        look: Callable[[str, torch.Tensor], None],
        names: Iterable[str] | None = None,
        said: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Constrained matrices (all, or these), complete and in fp32, each shown to its owner, one at a time."""
        named = list(self._views) if names is None else list(names)
        self._rounds.visit(named, self._views, look, change=False, at_once=1, said=said)

    def probe(self, loss: Callable[[nn.Module], torch.Tensor], back: bool) -> None:
        """One pass through the model as it stands, for hooks on what flows between its layers.

        With `back` the loss's gradient follows, which reaches activations only: no parameter gets one, nothing trains.
        """
        module: Any = self.module
        training, trained = module.training, [p for p in module.parameters() if p.requires_grad]
        module.eval().requires_grad_(False)
        hook = module.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_(back))
        try:
            with torch.set_grad_enabled(back):
                value = loss(module)
            if back:
                value.backward()
        finally:
            hook.remove()
            module.train(training)
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def scales_loss(self) -> bool:
        """Whether it is fp16, whose loss scaling tries scales out and leaves out the steps in which one overflows."""
        return self.dtype is torch.float16

    def loss_scale(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scaling; empty for the other precisions."""
        if not self.scales_loss:
            return {}
        scaler = self._loss_scaler()
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self._loss_scaler(), name, value)

    def imagine_others(self) -> None:
        """For a rehearsal, where no other rank says what it holds of constrained matrices."""
        held = None if self.constraint is None else self.shards.of_others(self._constrained)
        if held is not None:
            self._rounds.held = held

    def busiest(self) -> float | None:
        """Of the ranks that own constrained matrices: the work of the one that has most, over the mean."""
        return None if self.constraint is None else busiest(self.constraint.costs(), comm.world())

    def close(self) -> None:
        self.deepspeed.destroy()

    def _deal(self, constraint: Constraint) -> None:
        """Give every constrained matrix an owner, and have each optimizer step make the constraint hold."""
        parameters, shapes = dict(self.shards.named()), self.shards.shapes()
        costs = constraint.costs()
        owners = deal(costs, comm.world())
        fragments = {f.name: f for f in self._held if f.name in costs}
        held = {name: Stretch(f.start, f.stop) for name, f in fragments.items()}
        self._views = {name: fragments[name].master if name in fragments else torch.empty(0) for name in costs}
        self._rounds = Rounds(owners, {name: shapes[name] for name in costs}, held, self.device)
        constraint.own([name for name, owner in owners.items() if owner == comm.rank()], self.device)
        self._constrained = {name: self.shards.sub_group(parameters[name]) for name in costs}

    def _steer(self, steering: Steering) -> None:
        """Keep what the method keeps beside the trained tensors, and have it change each step's gradients."""
        groups = self.shards.stepped_apart()
        if steering.at_once and len(groups) > 1:
            raise UserError(
                f"deepspeed: zero_optimization.sub_group_size: given a size that steps {len(groups)} groups of "
                "tensors one after the other, and this method has to see all gradients before any step; set it to "
                f"{sum(tensor.numel() for tensor in groups)} or more"
            )
        self.shards.keep(steering.kinds)

    def _stepped(self, stepped: Sequence[torch.Tensor]) -> list[Fragment]:
        """This rank's stretches of the tensors that the optimizer is about to step."""
        holders = set(map(id, stepped))
        return [fragment for fragment in self._held if id(fragment.holder) in holders]

    def _before(self, stepped: Sequence[torch.Tensor]) -> None:
        if self.steering is not None:
            with timers.part("steering"):
                self.steering.steer(self._stepped(stepped), self._over_stretches)
        if self.constraint is not None and self.constraint.gradients:
            with timers.part("projection"):
                gradients = {f.name: f.gradient for f in self._stepped(stepped) if f.name in self._constrained}
                self._rounds.visit(self._names(stepped), gradients, self.constraint.free, change=True)

    def _after(self, stepped: Sequence[torch.Tensor]) -> None:
        if self.constraint is not None:
            self._loose = True
            if self._holding:
                self._bring_back(self._names(stepped))

    def _names(self, stepped: Sequence[torch.Tensor]) -> list[str]:
        """The constrained matrices that are stepped now: ZeRO-3 steps one sub-group at a time."""
        number = next((i for i, tensor in enumerate(self.shards.stepped_apart()) if tensor is stepped[0]), 0)
        return [name for name, group in self._constrained.items() if group == number]

    def _over_stretches(self, found: torch.Tensor) -> torch.Tensor:
        """Added up over the ranks that hold different stretches; at stage 0 each holds all."""
        return found if self.stage == 0 else comm.sum_(found.to(self.device)).to(found.device)

    def _bring_back(self, names: Sequence[str]) -> None:
        """Make the constraint hold for these matrices' masters."""
        assert self.constraint is not None
        with timers.part("projection"):
            self._rounds.visit(names, self._views, self.constraint.hold, change=True)
        self._loose = False

    def _sharded_construction(self, config: dict[str, Any]) -> Any:
        """ZeRO-3 shards every layer as soon as it is made, so no rank ever holds the whole model."""
        if self.stage != 3:
            return nullcontext()
        # The device only: an override of the dtype would round the rotary embedding's frequencies as well.
        return deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[DeepSpeedTensorOverride.device])

    def _loss_scaler(self) -> Any:
        wrapper = self.deepspeed.optimizer
        return getattr(wrapper, "loss_scaler", None) or wrapper.loss_scale_config


@contextmanager
def _refusals() -> Iterator[None]:
    """What DeepSpeed finds wrong in its settings, or does not do (NotImplementedError), as one line."""
    try:
        yield
    except (DeepSpeedConfigError, NotImplementedError, ValidationError) as error:
        raise UserError(f"deepspeed: these settings are refused: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def unchecked() -> Iterator[None]:
    """ZeRO-3 does not ask the other ranks whether they do the same: for where there are none."""
    names = [name for name in vars(partitioned_param_coordinator) if name.startswith("assert_ints_same")]
    before = {name: getattr(partitioned_param_coordinator, name) for name in names}
    for name in names:
        setattr(partitioned_param_coordinator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, check in before.items():
            setattr(partitioned_param_coordinator, name, check)


def _join_deepspeed() -> None:
    """DeepSpeed joins the process group that is there; on CPUs it builds an extension first, and says so by a print."""
    if deepspeed.comm.is_initialized():
        return
    _import_muon()
    if shutil.which("ninja") is None:  # it is a dependency, but its folder need not be on the PATH
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with redirect_stdout(io.StringIO()):
        if comm.device().type == "cpu":
            _build_extension()
        deepspeed.init_distributed(verbose=False)
    _count_collectives(deepspeed.comm.comm.cdb)


def _import_muon() -> None:
    """DeepSpeed imports its Muon optimizer whichever optimizer it is given, and decorates Muon's kernels by
    torch.compile, with which the compiler would be imported: a second. Nothing here is compiled, so torch's switch is
    off while that module is imported, and as it was afterwards."""
    before = os.environ.get(COMPILER_OFF)
    os.environ[COMPILER_OFF] = "1"
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ[COMPILER_OFF]
        else:
            os.environ[COMPILER_OFF] = before


def _count_collectives(backend: Any) -> None:
    for name, (kind, place, keyword) in COLLECTIVES.items():
        setattr(backend, name, timers.counted(kind, getattr(backend, name), place, keyword))
    # ZeRO-3 gathers in a stream of its own; this is where a layer waits for its weights.
    if not hasattr(PartitionedParameterCoordinator.fetch_sub_module, "__wrapped__"):
        fetch = PartitionedParameterCoordinator.fetch_sub_module
        PartitionedParameterCoordinator.fetch_sub_module = wraps(fetch)(timers.waiting("all_gather", fetch))


def _build_extension() -> None:
    """DeepSpeed's sums in shared memory, compiled at the first start on a machine.

    torch guards a build by a mere file, which a process that is killed leaves behind for all others to wait on for
    ever. A lock that dies with its holder stands around it here, so that whoever has it may remove such a file.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(f"no C++ compiler found ({compiler}), which DeepSpeed needs on CPUs; install g++, or set CXX")
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    with locked(folder.with_name(f"{folder.name}.dscl-lock")):
        (folder / "lock").unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


@torch.no_grad()
def fill(module: nn.Module, read: Callable[[str, torch.Size, int, int], torch.Tensor]) -> None:
    """Give every parameter its values; of a sharded one each rank reads just the stretch that it holds."""
    parameters: Iterable[tuple[str, Any]] = module.named_parameters()  # DeepSpeed hangs attributes on them
    for name, parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            start, stop = stretch(parameter)
            parameter.ds_tensor.zero_()  # the last rank's padding
            if start < stop:
                parameter.ds_tensor[: stop - start].copy_(read(name, parameter.ds_shape, start, stop))
        else:
            whole = math.prod(parameter.shape)
            parameter.copy_(read(name, parameter.shape, 0, whole).view(parameter.shape))
