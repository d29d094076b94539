"""The training engine: one DeepSpeed engine for the whole stream of tasks.

It shards the model, makes optimizer steps, resets the optimizer, and gives access to this rank's shards. It knows
nothing about tasks. A step takes micro-batches and a loss function. The loss of a step is exactly the mean over all
target tokens of the global batch, for any number of ranks, accumulation steps and sample lengths.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from torch import nn

from dscl.config.deepspeed_json import refuse_optimizer_bypass
from dscl.distributed import comm
from dscl.engine import deepspeed_patches
from dscl.engine.full_shape import full_shape
from dscl.engine.gradient_hooks import GradientCallback, GradientHook
from dscl.engine.matrix_owners import Constraint
from dscl.engine.optimizer import HookedAdamW, ParamShard
from dscl.engine.projector import ConstraintProjector
from dscl.engine.zero_layouts import ReadWeights, choose_layout
from dscl.engine.zero_shards import ZeroShards
from dscl.model.backbone import DTYPES
from dscl.utils import timers
from dscl.utils.errors import UserError


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
        read: ReadWeights,
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
        # The gradient norm of the last step before clipping: a number, or a tensor that was not synchronized.
        self.last_grad_norm: Any = None
        self.grad_clip = grad_clip
        self.stage = int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))  # for reports only
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("train.precision: given 'fp16', which CPUs do not train in; allowed here: fp32, bf16")
        layout_class = choose_layout(self.stage, precision)
        config = _complete_config(
            deepspeed_config, precision, micro_batch, grad_clip if layout_class.deepspeed_clips else 0.0
        )
        deepspeed_patches.init_deepspeed_comm()
        with deepspeed_patches.deepspeed_errors_as_user_errors():
            module = layout_class.build_module(build, config, self.device)
        layout_class.load_parameters(module, read)
        module = prepare(module)
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("method: nothing to train; no parameter of the model is trainable under these settings")
        # ZeRO takes a dummy step to allocate the optimizer state. With lr=0 this step does not decay the weights.
        self.optimizer = HookedAdamW(trainable, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        deepspeed_patches.allow_zero_with(HookedAdamW)
        # DeepSpeed prints its memory use.
        with deepspeed_patches.deepspeed_errors_as_user_errors(), redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.layout = layout_class(self.deepspeed, self.optimizer)
        self.shards = ZeroShards(self.layout, self.optimizer)
        self._attach_method(constraint(), gradient_hook(), deepspeed_config.get("zero_optimization", {}))

    @property
    def project_every(self) -> int:
        """The number of steps from one projection of the weights to the next."""
        return self.constraint.project_every if self.constraint is not None else 1

    @property
    def module(self) -> nn.Module:
        """The model inside DeepSpeed's engine."""
        return self.deepspeed.module

    def full_shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter before sharding, by name, whether it is trained or not."""
        return {name: full_shape(parameter) for name, parameter in self.module.named_parameters()}

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
            grad_norm = self.layout.clip_gradients(self.grad_clip)
            if grad_norm is not None:
                self.optimizer.skip_step |= skip_non_finite and not math.isfinite(grad_norm)
            self.deepspeed.step()
            self.last_grad_norm = self.deepspeed.get_global_grad_norm() if grad_norm is None else grad_norm
            self.optimizer.skip_step = False
            projector = self._projector
            if project and projector is not None and projector.has_unprojected_steps:
                projector.project_weights()  # this step was skipped, so earlier steps are not projected yet
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
        self._accumulate_gradients(loss_fn, micro_batches, targets)
        self.optimizer.step_override = lambda step_tensors: on_gradients(self._shards_in(step_tensors))
        try:
            with timers.timed_part("gradient_hook"), self.layout.without_clipping():
                self.deepspeed.step()
        finally:
            self.optimizer.step_override = None

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
        assert self._projector is not None
        self._projector.apply_on_owners(matrix_fn, names, on_progress)

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
        scaler = vars(self.layout.loss_scaler())
        return {k: v for k, v in scaler.items() if isinstance(v, int | float) and not isinstance(v, bool)}

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        """Load what `loss_scale_state` returned."""
        for name, value in state.items():
            setattr(self.layout.loss_scaler(), name, value)

    def simulate_peers(self) -> None:
        """Called only by `dscl plan`, which runs one process for a world of many ranks: compute the shards of
        constrained matrices that the other ranks would hold."""
        if self._projector is not None:
            self._projector.simulate_peers()

    def load_imbalance(self) -> float | None:
        """The most loaded rank's work on constrained matrices divided by the mean; None without a constraint."""
        return None if self._projector is None else self._projector.load_imbalance()

    def close(self) -> None:
        self.deepspeed.destroy()

    def _attach_method(
        self, constraint: Constraint | None, gradient_hook: GradientHook | None, zero_settings: dict[str, Any]
    ) -> None:
        """Have every optimizer step enforce the constraint and call the hook."""
        self.constraint, self.gradient_hook = constraint, gradient_hook
        if constraint is not None or gradient_hook is not None:
            refuse_optimizer_bypass(zero_settings)
        if gradient_hook is not None:
            self._attach_gradient_hook(gradient_hook)
        self._local_shards = list(self.shards.local_shards())
        self._projector = (
            None
            if constraint is None
            else ConstraintProjector(constraint, self.layout, self._local_shards, self.device)
        )
        self.optimizer.before_step, self.optimizer.after_step = self._before_step, self._after_step

    def _attach_gradient_hook(self, gradient_hook: GradientHook) -> None:
        """Create the hook's extra tensors, and refuse settings under which the hook cannot work."""
        groups = self.layout.step_groups()
        if gradient_hook.needs_all_shards and len(groups) > 1:
            raise UserError(
                f"deepspeed: zero_optimization.sub_group_size: given a size that steps {len(groups)} groups of "
                "tensors one after the other, and this method has to see all gradients before any step; set it to "
                f"{sum(tensor.numel() for group in groups for tensor in group)} or more"
            )
        self.shards.add_extra_state(gradient_hook.extra_state_names)

    def _shards_in(self, step_tensors: Sequence[torch.Tensor]) -> list[ParamShard]:
        """This rank's shards of the tensors that the optimizer is about to step."""
        tensor_ids = set(map(id, step_tensors))
        return [shard for shard in self._local_shards if id(shard.optimizer_tensor) in tensor_ids]

    def _before_step(self, step_tensors: Sequence[torch.Tensor]) -> None:
        step_shards = self._shards_in(step_tensors)
        if self.gradient_hook is not None:
            with timers.timed_part("gradient_hook"):
                self.gradient_hook.modify_gradients(step_shards, self.layout.sum_over_shards)
        if self._projector is not None:
            self._projector.before_step(step_tensors, step_shards)

    def _after_step(self, step_tensors: Sequence[torch.Tensor]) -> None:
        if self._projector is not None:
            self._projector.after_step(step_tensors, project=self._project_after_step)


def _complete_config(
    deepspeed_config: Mapping[str, Any], precision: str, micro_batch: int, grad_clip: float
) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON, and the keys that the recipe and the engine set."""
    config = {
        **deepspeed_config,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # `step` sets the accumulation boundary itself
        "gradient_clipping": grad_clip,
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on CPU
    }
    for kind in ("bf16", "fp16"):
        if kind == precision or kind in deepspeed_config:
            config[kind] = {**deepspeed_config.get(kind, {}), "enabled": kind == precision}
    return config
