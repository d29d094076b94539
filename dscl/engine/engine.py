"""The training engine: one DeepSpeed engine for the whole stream of tasks.

It shards the model, makes optimizer steps, resets the optimizer, and gives access to this rank's shards. It knows
nothing about tasks. A step takes micro-batches and a loss function. The loss of a step is exactly the mean over all
target tokens of the global batch, for any number of ranks, accumulation steps and sample lengths.
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

from dscl.config.deepspeed_json import refuse_optimizer_bypass
from dscl.distributed import comm
from dscl.engine.gradient_hooks import GradientCallback, GradientHook
from dscl.engine.matrix_owners import Constraint, OwnerExchange, ShardSlice, assign_owners, load_imbalance
from dscl.engine.optimizer import HookedAdamW, ParamShard
from dscl.engine.zero_shards import ZeroShards, shard_slice
from dscl.model.backbone import DTYPES
from dscl.utils import timers
from dscl.utils.cache import hold_file_lock
from dscl.utils.errors import UserError

# DeepSpeed's collectives: (kind in the statistics, index and name of the argument that holds the tensors they send).
COLLECTIVE_SIGNATURES = {
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
DISABLE_COMPILER_VARIABLE = "TORCHDYNAMO_DISABLE"  # environment variable that turns torch.compile off


ZERO_SUPPORTED_OPTIMIZERS.append(HookedAdamW)  # DeepSpeed compares exact types, so a subclass of AdamW must be listed


class Engine:
    """Builds the sharded model, loads its weights, and trains it step by step.

    The constructor calls, in this order: `build`, which creates the module; `read(name, shape, start, stop)`, which
    returns slices of its weights; `prepare`, which chooses the trainable parameters and may add modules; `constraint`,
    which may return a constraint on trained matrices; and `gradient_hook`, which may return a hook that changes
    gradients.
    """

    def __init__(
        self,
        deepspeed_config: dict[str, Any],
        *,
        build: Callable[[], nn.Module],
        read: Callable[[str, torch.Size, int, int], torch.Tensor],
        prepare: Callable[[nn.Module], nn.Module],
        constraint: Callable[[], Constraint | None] = lambda: None,
        gradient_hook: Callable[[], GradientHook | None] = lambda: None,
        precision: str,
        micro_batch: int = 1,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.device = comm.device()
        timers.set_device(self.device)
        self.dtype = DTYPES[precision]
        self.stage = int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
        self.grad_clip = grad_clip
        # The gradient norm of the last step before clipping: a number, or a tensor that was not synchronized.
        self.last_grad_norm: Any = None
        # At ZeRO 0 in fp32 DeepSpeed would clip without returning the norm.
        self._engine_clips_gradients = self.stage == 0 and precision == "fp32"
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("train.precision: given 'fp16', which CPUs do not train in; allowed here: fp32, bf16")
        config = {
            **deepspeed_config,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,  # `step` sets the accumulation boundary itself
            "gradient_clipping": 0.0 if self._engine_clips_gradients else grad_clip,
            "steps_per_print": None,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on CPU
        }
        for kind in ("bf16", "fp16"):
            if kind == precision or kind in deepspeed_config:
                config[kind] = {**deepspeed_config.get(kind, {}), "enabled": kind == precision}
        _init_deepspeed_comm()
        with _deepspeed_errors_as_user_errors(), self._zero3_init_context(config):
            module = build()
        if self.stage != 3:
            module.to(self.device)
        load_parameters(module, read)
        module = prepare(module)
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("method: nothing to train; no parameter of the model is trainable under these settings")
        # ZeRO takes a dummy step to allocate the optimizer state. With lr=0 this step does not decay the weights.
        self.optimizer = HookedAdamW(trainable, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        with _deepspeed_errors_as_user_errors(), redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.shards = ZeroShards(self.deepspeed, self.optimizer, self.stage)
        self.constraint, self.gradient_hook = constraint(), gradient_hook()
        self._has_unprojected_steps = False  # whether there were steps since the last projection of the weights
        if self.constraint is not None or self.gradient_hook is not None:
            refuse_optimizer_bypass(deepspeed_config.get("zero_optimization", {}))
        if self.gradient_hook is not None:
            self._attach_gradient_hook(self.gradient_hook)
        self._local_shards = list(self.shards.local_shards())
        if self.constraint is not None:
            self._assign_matrix_owners(self.constraint)
        self.optimizer.before_step, self.optimizer.after_step = self._before_step, self._after_step

    @property
    def project_every(self) -> int:
        """The number of steps from one projection of the weights to the next."""
        return self.constraint.project_every if self.constraint is not None else 1

    @property
    def module(self) -> nn.Module:
        """The model inside DeepSpeed's engine."""
        return self.deepspeed.module

    def step(
        self,
        loss_fn: Callable[[nn.Module, Any], torch.Tensor],
        micro_batches: Sequence[Any],
        *,
        targets: int,
        lr: float,
        skip_non_finite: bool = False,
        project: bool = True,
    ) -> torch.Tensor:
        """One optimizer step over the global batch. Returns this rank's sum of losses, on the device and not
        synchronized.

        `loss_fn`: the sum of losses over a micro-batch's target tokens. `targets`: the number of target tokens on all
        ranks. `skip_non_finite`: a step whose loss or gradient is not finite changes nothing. `project`: whether the
        constraint, if any, is enforced after this step.
        """
        self._project_after_step = project
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = self._accumulate_gradients(loss_fn, micro_batches, targets)
        with timers.timed_part("optimizer"):
            self.optimizer.skip_step = skip_non_finite and comm.any_rank_true(not bool(torch.isfinite(loss_sum)))
            if self._engine_clips_gradients:
                self.last_grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.grad_clip or math.inf)
                self.optimizer.skip_step |= skip_non_finite and not math.isfinite(self.last_grad_norm)
            self.deepspeed.step()
            if not self._engine_clips_gradients:
                self.last_grad_norm = self.deepspeed.get_global_grad_norm()
            self.optimizer.skip_step = False
            if project and self._has_unprojected_steps:  # this step was skipped, so earlier steps are not projected yet
                self._project_weights(list(self._constrained_masters))
                self.shards.sync_model_weights()
        return loss_sum

    def compute_gradients(
        self,
        loss_fn: Callable[[nn.Module, Any], torch.Tensor],
        micro_batches: Sequence[Any],
        targets: int,
        on_gradients: GradientCallback,
    ) -> None:
        """Compute the gradient that a step would use, without clipping, and make no step.

        `on_gradients` receives this rank's shards; at ZeRO 3 it is called once for each sub-group of the optimizer.
        """
        zero_optimizer = self.deepspeed.optimizer
        clip = getattr(zero_optimizer, "clip_grad", None)  # None at ZeRO 0 in fp32, where DeepSpeed does not clip
        self._accumulate_gradients(loss_fn, micro_batches, targets)
        if clip is not None:
            zero_optimizer.clip_grad = 0.0
        self.optimizer.step_override = lambda step_tensors: on_gradients(self._shards_in(step_tensors))
        try:
            with timers.timed_part("steering"):
                self.deepspeed.step()
        finally:
            self.optimizer.step_override = None
            if clip is not None:
                zero_optimizer.clip_grad = clip

    def _accumulate_gradients(
        self, loss_fn: Callable[[nn.Module, Any], torch.Tensor], micro_batches: Sequence[Any], targets: int
    ) -> torch.Tensor:
        """Accumulate the gradient of the sum of losses over all ranks' micro-batches, divided by `targets`. Returns
        this rank's sum of losses."""
        self.module.train()
        loss_sum = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            with timers.timed_part("data"):
                device_batch = batch.to(self.device)
            with timers.timed_part("forward"):
                loss_value = loss_fn(self.deepspeed, device_batch).float()
            with timers.timed_part("backward"):
                # DeepSpeed averages over ranks. The factor world_size / targets turns this into the mean over all
                # target tokens of the global batch.
                self.deepspeed.backward(loss_value * (comm.world_size() / targets), scale_wrt_gas=False)
            loss_sum += loss_value.detach()
        return loss_sum

    @torch.no_grad()
    def reset_optimizer(self, read: Callable[[str, torch.Size, int, int], torch.Tensor | None] | None) -> None:
        """Reset the optimizer for a new task. `read(name, shape, start, stop)` returns the initial values of a slice of
        a trainable tensor, or None to leave it unchanged."""
        self.shards.reset_moments()
        if read is not None:
            for shard in self.shards.local_shards():
                values = read(shard.name, shard.shape, shard.start, shard.stop)
                if values is not None:
                    shard.master.copy_(values)
            self.shards.sync_model_weights()

    @torch.no_grad()
    def apply_on_owners(
        self,
        matrix_fn: Callable[[str, torch.Tensor], None],
        names: Iterable[str] | None = None,
        on_progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Call `matrix_fn(name, matrix)` for each of these constrained matrices (None: for all), whole and in fp32, on
        the matrix's owner. An owner holds one whole matrix at a time."""
        matrix_names = list(self._constrained_masters) if names is None else list(names)
        self._owner_exchange.apply_on_owners(
            matrix_names,
            self._constrained_masters,
            matrix_fn,
            write_back=False,
            max_elements=1,
            on_progress=on_progress,
        )

    def probe_activations(self, loss_fn: Callable[[nn.Module], torch.Tensor], backward: bool) -> None:
        """One forward pass in evaluation mode, for forward and backward hooks on the model's layers.

        With `backward`, the loss is backpropagated to activations only. Parameters get no gradient.
        """
        module: Any = self.module
        training, trained = module.training, [p for p in module.parameters() if p.requires_grad]
        module.eval().requires_grad_(False)
        hook = module.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_(backward))
        try:
            with torch.set_grad_enabled(backward):
                loss_value = loss_fn(module)
            if backward:
                loss_value.backward()
        finally:
            hook.remove()
            module.train(training)
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def uses_loss_scaling(self) -> bool:
        """Whether dynamic loss scaling is on (fp16). It skips steps whose scaled gradient overflows."""
        return self.dtype is torch.float16

    def loss_scale_state(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scaling; empty in other precisions."""
        if not self.uses_loss_scaling:
            return {}
        scaler = self._loss_scaler()
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        """Load what `loss_scale_state` returned."""
        for name, value in state.items():
            setattr(self._loss_scaler(), name, value)

    def simulate_peers(self) -> None:
        """Called only by `dscl plan`, which runs one process for a world of many ranks: compute the shards of
        constrained matrices that the other ranks would hold."""
        slices = None if self.constraint is None else self.shards.peer_slices(self._sub_group_of_matrix)
        if slices is not None:
            self._owner_exchange.rank_slices = slices

    def load_imbalance(self) -> float | None:
        """The most loaded rank's work on constrained matrices divided by the mean; None without a constraint."""
        return None if self.constraint is None else load_imbalance(self.constraint.matrix_costs(), comm.world_size())

    def close(self) -> None:
        self.deepspeed.destroy()

    def _assign_matrix_owners(self, constraint: Constraint) -> None:
        """Assign every constrained matrix to an owner rank, and prepare the exchange of shards with the owners."""
        parameters, shapes = dict(self.shards.trainable_parameters()), self.shards.full_shapes()
        costs = constraint.matrix_costs()
        owners = assign_owners(costs, comm.world_size())
        constrained_shards = {f.name: f for f in self._local_shards if f.name in costs}
        local_slices = {name: ShardSlice(f.start, f.stop) for name, f in constrained_shards.items()}
        self._constrained_masters = {
            name: constrained_shards[name].master if name in constrained_shards else torch.empty(0) for name in costs
        }
        self._owner_exchange = OwnerExchange(owners, {name: shapes[name] for name in costs}, local_slices, self.device)
        constraint.set_owned([name for name, owner in owners.items() if owner == comm.rank()], self.device)
        self._sub_group_of_matrix = {name: self.shards.sub_group_index(parameters[name]) for name in costs}

    def _attach_gradient_hook(self, gradient_hook: GradientHook) -> None:
        """Create the hook's extra tensors, and refuse settings under which the hook cannot work."""
        groups = self.shards.sub_group_tensors()
        if gradient_hook.needs_all_shards and len(groups) > 1:
            raise UserError(
                f"deepspeed: zero_optimization.sub_group_size: given a size that steps {len(groups)} groups of "
                "tensors one after the other, and this method has to see all gradients before any step; set it to "
                f"{sum(tensor.numel() for tensor in groups)} or more"
            )
        self.shards.add_extra_state(gradient_hook.extra_state_names)

    def _shards_in(self, step_tensors: Sequence[torch.Tensor]) -> list[ParamShard]:
        """This rank's shards of the tensors that the optimizer is about to step."""
        tensor_ids = set(map(id, step_tensors))
        return [shard for shard in self._local_shards if id(shard.optimizer_tensor) in tensor_ids]

    def _before_step(self, step_tensors: Sequence[torch.Tensor]) -> None:
        if self.gradient_hook is not None:
            with timers.timed_part("steering"):
                self.gradient_hook.modify_gradients(self._shards_in(step_tensors), self._sum_over_shards)
        if self.constraint is not None and self.constraint.project_gradients:
            with timers.timed_part("projection"):
                gradients = {
                    f.name: f.gradient for f in self._shards_in(step_tensors) if f.name in self._sub_group_of_matrix
                }
                self._owner_exchange.apply_on_owners(
                    self._constrained_names(step_tensors), gradients, self.constraint.project_gradient, write_back=True
                )

    def _after_step(self, step_tensors: Sequence[torch.Tensor]) -> None:
        if self.constraint is not None:
            self._has_unprojected_steps = True
            if self._project_after_step:
                self._project_weights(self._constrained_names(step_tensors))

    def _constrained_names(self, step_tensors: Sequence[torch.Tensor]) -> list[str]:
        """The constrained matrices that the optimizer is about to step. ZeRO-3 steps one sub-group at a time."""
        number = next((i for i, tensor in enumerate(self.shards.sub_group_tensors()) if tensor is step_tensors[0]), 0)
        return [name for name, group in self._sub_group_of_matrix.items() if group == number]

    def _sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Sum per-rank results that cover disjoint shards. At ZeRO 0 every rank has all shards, so nothing is added."""
        return values if self.stage == 0 else comm.all_reduce_sum(values.to(self.device)).to(values.device)

    def _project_weights(self, names: Sequence[str]) -> None:
        """Project the fp32 masters of these matrices so that they satisfy the constraint."""
        assert self.constraint is not None
        with timers.timed_part("projection"):
            self._owner_exchange.apply_on_owners(
                names, self._constrained_masters, self.constraint.project_weight, write_back=True
            )
        self._has_unprojected_steps = False

    def _zero3_init_context(self, config: dict[str, Any]) -> Any:
        """The context for building the module. At ZeRO 3 it shards every layer when it is created, so that no rank ever
        holds the whole model."""
        if self.stage != 3:
            return nullcontext()
        # Override the device only. A dtype override would also round the rotary embedding's frequencies.
        return deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[DeepSpeedTensorOverride.device])

    def _loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler object."""
        zero_optimizer = self.deepspeed.optimizer
        return getattr(zero_optimizer, "loss_scaler", None) or zero_optimizer.loss_scale_config


@contextmanager
def _deepspeed_errors_as_user_errors() -> Iterator[None]:
    """Turn DeepSpeed's complaints about its settings into a one-line error for the user."""
    try:
        yield
    except (DeepSpeedConfigError, NotImplementedError, ValidationError) as error:
        raise UserError(f"deepspeed: these settings are refused: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def without_cross_rank_asserts() -> Iterator[None]:
    """Turn off ZeRO-3's asserts that all ranks pass the same values. `dscl plan` has no other ranks."""
    names = [name for name in vars(partitioned_param_coordinator) if name.startswith("assert_ints_same")]
    original = {name: getattr(partitioned_param_coordinator, name) for name in names}
    for name in names:
        setattr(partitioned_param_coordinator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, check in original.items():
            setattr(partitioned_param_coordinator, name, check)


def _init_deepspeed_comm() -> None:
    """Initialize DeepSpeed's communication on the existing process group. On CPU, DeepSpeed's extension is built
    first; its output is suppressed."""
    if deepspeed.comm.is_initialized():
        return
    _import_muon_without_compiler()
    if shutil.which("ninja") is None:  # it is a dependency, but its folder need not be on the PATH
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with redirect_stdout(io.StringIO()):
        if comm.device().type == "cpu":
            _build_shm_extension()
        deepspeed.init_distributed(verbose=False)
    _count_collectives(deepspeed.comm.comm.cdb)


def _import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon optimizer while torch.compile is turned off.

    DeepSpeed always imports Muon, which decorates its kernels with torch.compile. Importing the compiler takes a
    second, and nothing here is compiled.
    """
    original = os.environ.get(DISABLE_COMPILER_VARIABLE)
    os.environ[DISABLE_COMPILER_VARIABLE] = "1"
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if original is None:
            del os.environ[DISABLE_COMPILER_VARIABLE]
        else:
            os.environ[DISABLE_COMPILER_VARIABLE] = original


def _count_collectives(backend: Any) -> None:
    """Wrap the collectives of DeepSpeed's backend so that their bytes and waiting times are counted."""
    for name, (kind, arg_index, keyword) in COLLECTIVE_SIGNATURES.items():
        setattr(backend, name, timers.wrap_collective(kind, getattr(backend, name), arg_index, keyword))
    # ZeRO-3 gathers weights in a separate stream. `fetch_sub_module` is where a layer waits for its weights.
    if not hasattr(PartitionedParameterCoordinator.fetch_sub_module, "__wrapped__"):
        fetch = PartitionedParameterCoordinator.fetch_sub_module
        PartitionedParameterCoordinator.fetch_sub_module = wraps(fetch)(timers.wrap_wait("all_gather", fetch))


def _build_shm_extension() -> None:
    """Build and load DeepSpeed's extension for all-reduce in shared memory. It is compiled once per machine.

    torch protects the build with a lock file. A killed process leaves this file behind, and all others would wait for
    ever. Our own lock, which is released when its holder dies, makes it safe to remove the file.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(f"no C++ compiler found ({compiler}), which DeepSpeed needs on CPUs; install g++, or set CXX")
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    with hold_file_lock(folder.with_name(f"{folder.name}.dscl-lock")):
        (folder / "lock").unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


@torch.no_grad()
def load_parameters(module: nn.Module, read: Callable[[str, torch.Size, int, int], torch.Tensor]) -> None:
    """Load every parameter from `read(name, shape, start, stop)`. Of a sharded parameter, a rank reads only its own
    shard."""
    parameters: Iterable[tuple[str, Any]] = module.named_parameters()  # `Any`: DeepSpeed adds attributes to them
    for name, parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            start, stop = shard_slice(parameter)
            parameter.ds_tensor.zero_()  # the last rank's padding
            if start < stop:
                parameter.ds_tensor[: stop - start].copy_(read(name, parameter.ds_shape, start, stop))
        else:
            num_elements = math.prod(parameter.shape)
            parameter.copy_(read(name, parameter.shape, 0, num_elements).view(parameter.shape))
