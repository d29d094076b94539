"""Adapter folders: PEFT reads those of dscl, dscl reads those of PEFT, and adapters beyond LoRA are refused."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.model.adapters import peft_files
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights, read_adapter, task_file_name, write_adapter
from dscl.utils.errors import ExternalFailure, UserError

CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(40).view(2, 20) % 37
UPPER = [f"model.layers.{i}.self_attn.{p}" for i in (2, 3) for p in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(plain: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(plain)  # PEFT changes the model in place


@pytest.fixture(scope="module")
def shapes(plain: LlamaForCausalLM) -> dict[str, tuple[int, int]]:
    linear = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linear.items()}


def make_adapter(
    shapes: Mapping[str, tuple[int, int]], modules: list[str], rank: int = 4, scale: float = 2.0
) -> LoraAdapter:
    torch.manual_seed(11)
    layers = {}
    for module in modules:
        out, into = shapes[module]
        layers[module] = LoraWeights(torch.randn(rank, into) / 6, torch.randn(out, rank) / 6, scale)
    return LoraAdapter("task", "models/base", layers)


@contextmanager
def add_lora_hooks(model: nn.Module, adapter: LoraAdapter) -> Iterator[None]:
    """Within, the model computes the reference: base + scale · B(A x)."""

    def hook(pair: LoraWeights) -> Callable[..., torch.Tensor]:
        return lambda module, inputs, output: output + pair.scale * (inputs[0] @ pair.a.float().T @ pair.b.float().T)

    hooks = [model.get_submodule(m).register_forward_hook(hook(pair)) for m, pair in adapter.layers.items()]
    yield
    for handle in hooks:
        handle.remove()


@torch.no_grad()
def logits(model: Any, adapter: LoraAdapter | None = None) -> torch.Tensor:
    with add_lora_hooks(model, adapter or LoraAdapter("", "", {})):
        return model(input_ids=IDS).logits


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def equal_adapters(one: LoraAdapter, other: LoraAdapter) -> bool:
    """Bit for bit, in the same order, with the same types."""
    return (one.name, one.base_model, list(one.layers)) == (other.name, other.base_model, list(other.layers)) and all(
        x.scale == y.scale
        and (x.a.dtype, x.b.dtype) == (y.a.dtype, y.b.dtype)
        and torch.equal(x.a, y.a)
        and torch.equal(x.b, y.b)
        for x, y in zip(one.layers.values(), other.layers.values(), strict=True)
    )


# Folders that dscl writes.


@pytest.mark.parametrize(
    "chosen",
    [
        lambda shapes: UPPER,
        lambda shapes: [m for m in shapes if m != "lm_head"],
        lambda shapes: [m for m in shapes if m.endswith("down_proj")],
        lambda shapes: [m for m in shapes if m.startswith("model.layers.0.")],
        lambda shapes: list(shapes),
        lambda shapes: ["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.v_proj"],
        lambda shapes: [*UPPER, "model.layers.1.self_attn.q_proj"],
    ],
    ids=["upper q v", "all", "one kind", "one layer", "with the head", "scattered", "a grid and one more"],
)
def test_peft_loads_what_is_written(
    chosen: Callable[..., list[str]], model: LlamaForCausalLM, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    adapter = make_adapter(shapes, chosen(shapes))
    expected, base = logits(model, adapter), logits(model)
    write_adapter(tmp_path / "task", adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of weights that it misses
        loaded = PeftModel.from_pretrained(model, tmp_path / "task")
    assert (logits(loaded) - expected).abs().max() <= 1e-5
    assert (expected - base).abs().max() > 0.1  # else the line above would show nothing
    assert set(lora_layers(loaded)) == set(adapter.layers)


def test_configuration_has_only_keys_that_servers_know(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    write_adapter(tmp_path / "task", make_adapter(shapes, UPPER, rank=4, scale=2.0))
    config = json.loads((tmp_path / "task" / CONFIG_FILE).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [2, 3]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert isinstance(config["lora_alpha"], int)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    assert config["base_model_name_or_path"] == "models/base"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [CONFIG_FILE, ADAPTER_WEIGHTS_FILE, "task"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "alpha"), [(8, 32), (3, 0.3), (7, 16), (5, 1.1), (1, 0), (6, -2)])
def test_write_and_read_round_trip_is_bitwise_equal(
    rank: int, alpha: float, dtype: torch.dtype, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    adapter = make_adapter(shapes, UPPER, rank, alpha / rank)
    layers = {m: LoraWeights(p.a.to(dtype), p.b.to(dtype), p.scale) for m, p in adapter.layers.items()}
    write_adapter(tmp_path / "task", LoraAdapter("task", "models/base", layers))
    assert equal_adapters(read_adapter(tmp_path / "task", shapes), LoraAdapter("task", "models/base", layers))


def test_views_of_larger_tensors_are_written_alone(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """A bank holds such views: stacked by task, trainable or transposed."""
    bank = torch.randn(5, 4, 32, requires_grad=True)
    columns = torch.randn(3, 4, 32)
    layers = {m: LoraWeights(bank[i], columns[2].T, 1.0) for i, m in enumerate(UPPER) if m.endswith("q_proj")}
    write_adapter(tmp_path / "task", LoraAdapter("task", "", layers))
    assert (tmp_path / "task" / ADAPTER_WEIGHTS_FILE).stat().st_size < 4 * 4 * 4 * 32 + 2000
    assert equal_adapters(read_adapter(tmp_path / "task", shapes), LoraAdapter("task", "", layers))


def test_layers_of_different_rank_or_scale_are_refused(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    first, second = UPPER[:2]
    for rank, scale in ((3, 2.0), (4, 1.0)):
        layers = {**make_adapter(shapes, [first]).layers, **make_adapter(shapes, [second], rank, scale).layers}
        with pytest.raises(AssertionError):
            write_adapter(tmp_path / "task", LoraAdapter("task", "", layers))


def test_all_of_a_file_is_there_when_it_is_brought_to_the_disk(
    shapes: dict[str, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, int] = {}

    def sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path.name] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", sync)
    write_adapter(tmp_path / "task", make_adapter(shapes, UPPER))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "task").iterdir()}
    assert {name: synced[name] for name in sizes} == sizes


def test_adapter_folder_is_replaced_atomically(
    shapes: dict[str, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "task"
    old, new = make_adapter(shapes, UPPER), make_adapter(shapes, UPPER[:2], rank=2)
    write_adapter(folder, old)
    (folder / "README.md").write_text("of the old one")

    with monkeypatch.context() as patched:
        for broken in ("fsync", "replace"):  # a full disk while writing, and a failure while replacing
            patched.setattr(os, broken, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(
                ExternalFailure, match=r"task: the adapter cannot be written \(No space left on device\)"
            ):
                write_adapter(folder, new)
            assert equal_adapters(read_adapter(folder, shapes), old)

    assert (tmp_path / "task.partial").is_dir()  # as a killed process would leave it
    write_adapter(folder, new)
    assert equal_adapters(read_adapter(folder, shapes), new)
    assert [p.name for p in tmp_path.iterdir()] == ["task"]
    assert not (folder / "README.md").exists()


def test_task_file_names_are_safe_and_unique(tmp_path: Path) -> None:
    plain = ["agnews", "C-STANCE", "task_002", "two words"]
    assert [task_file_name(name) for name in plain] == plain
    odd = [
        ".", "..", "a/b", "a%2Fb", "../up", "a.partial", "a", "a.old", "\0", "a\n", "任务", "x" * 150, "x" * 151,
        "x" * 152, "务" * 90, "务" * 91, "x" * 100, task_file_name("x" * 152), "version 1.5", "~", "A", "-",
    ]  # fmt: skip
    for name in odd:
        (tmp_path / task_file_name(name)).mkdir()  # fails if the folder exists
        (tmp_path / (task_file_name(name) + ".partial")).mkdir()
    assert len(list(tmp_path.iterdir())) == 2 * len(odd)


# Folders that PEFT writes.


def save_with_peft(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "lora_dropout": 0.3, **options})
    peft_model = get_peft_model(model, config).eval()
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": list(PROJECTIONS), "use_rslora": True, "r": 3},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]},
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.layers\.(1|3)\.(self_attn\.o|mlp\.(up|down))_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.gate_proj"]},
        {"target_modules": list(PROJECTIONS), "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3, r".*layers\.[23].*q_proj": 1.5}},
        {
            "target_modules": list(PROJECTIONS),
            "use_rslora": True,
            "rank_pattern": {r"^model\.layers\.2\.mlp\.up_proj": 5, "up_proj": 6},
            "alpha_pattern": {r"layers\.0\.self_attn\.(q|k)_proj": 11, r"self_attn\..*": 9},
        },
    ],
)
def test_adapters_of_peft_are_read(
    options: dict[str, Any], model: LlamaForCausalLM, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    plain = copy.deepcopy(model)
    peft_model = save_with_peft(model, tmp_path / "mine", **options)
    adapter = read_adapter(tmp_path / "mine", shapes)
    assert adapter.name == "mine"
    assert list(adapter.layers) == [module for module in shapes if module in lora_layers(peft_model)]
    for module, layer in lora_layers(peft_model).items():
        pair = adapter.layers[module]
        assert pair.scale == layer.scaling["default"]
        assert torch.equal(pair.a, layer.lora_A["default"].weight)
        assert torch.equal(pair.b, layer.lora_B["default"].weight)
    assert (logits(plain, adapter) - logits(peft_model)).abs().max() <= 1e-5
    assert (logits(peft_model) - logits(plain)).abs().max() > 0.1


def test_written_by_peft_then_here_then_loaded_by_peft(
    model: LlamaForCausalLM, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    plain = copy.deepcopy(model)
    peft_model = save_with_peft(model, tmp_path / "a", target_modules=["q_proj", "mlp.down_proj"], use_rslora=True, r=6)
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a", shapes))
    loaded = PeftModel.from_pretrained(plain, tmp_path / "b")
    assert torch.allclose(logits(loaded), logits(peft_model), rtol=0, atol=1e-5)


def test_an_adapter_that_transformers_saved(
    model: LlamaForCausalLM, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    plain = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    assert (logits(plain, read_adapter(tmp_path / "a", shapes)) - logits(model.eval())).abs().max() <= 1e-5


@pytest.fixture
def adapter_folder(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A valid folder that PEFT has written."""
    save_with_peft(model, tmp_path / "made", target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2])
    return tmp_path / "made"


def rename_tensors(folder: Path, change: Callable[[str], str]) -> None:
    save_file(
        {change(name): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS_FILE).items()},
        folder / ADAPTER_WEIGHTS_FILE,
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".version 1.5.weight"),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_other_tensor_name_layouts_are_read(
    change: Callable[[str], str], adapter_folder: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    before = read_adapter(adapter_folder, shapes)
    rename_tensors(adapter_folder, change)
    assert equal_adapters(read_adapter(adapter_folder, shapes), before)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_that_peft_takes_from_the_model(
    targets: str | None, adapter_folder: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    before = read_adapter(adapter_folder, shapes)
    set_config(adapter_folder, target_modules=targets)
    assert equal_adapters(read_adapter(adapter_folder, shapes), before)


def test_read_tensors_do_not_change_with_the_file(adapter_folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    adapter = read_adapter(adapter_folder, shapes)
    before = copy.deepcopy(adapter)
    with open(adapter_folder / ADAPTER_WEIGHTS_FILE, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert equal_adapters(adapter, before)


# Folders that are refused.


def refusal(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(folder, shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def set_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_key(folder: Path, key: str) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def set_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors: A and B stand for those of layer 1's q_proj, other names for themselves; None removes."""
    names = {key: Q.format(key) if key in "AB" else key for key in tensors}
    changed = {**load_file(folder / ADAPTER_WEIGHTS_FILE), **{names[key]: value for key, value in tensors.items()}}
    save_file({name: value for name, value in changed.items() if value is not None}, folder / ADAPTER_WEIGHTS_FILE)


def with_value(shape: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor[-1, -1] = value
    return tensor


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # files
        (lambda f: (f / CONFIG_FILE).unlink(), f"no {CONFIG_FILE} there"),
        (lambda f: (f / ADAPTER_WEIGHTS_FILE).unlink(), f"no {ADAPTER_WEIGHTS_FILE} there"),
        (
            lambda f: (f / ADAPTER_WEIGHTS_FILE).write_bytes((f / ADAPTER_WEIGHTS_FILE).read_bytes()[:-1]),
            "not a readable safetensors file",
        ),
        (lambda f: (f / ADAPTER_WEIGHTS_FILE).write_bytes(b""), "not a readable safetensors file"),
        (lambda f: (f / ADAPTER_WEIGHTS_FILE).write_bytes(b"\xff" * 400), "not a readable safetensors file"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "not readable JSON"),
        (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), "not readable JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[" * 100000), "not readable JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), "peft_type is a list"),
        # kinds of adapter
        (lambda f: set_config(f, peft_type="LOHA"), "peft_type is 'LOHA' (str); allowed: LORA"),
        (lambda f: drop_key(f, "peft_type"), "peft_type is nothing (null); allowed: LORA"),
        (lambda f: set_config(f, use_dora=True), "use_dora is True (bool); allowed: off"),
        (lambda f: set_config(f, bias="lora_only"), "bias is 'lora_only' (str); allowed: 'none'"),
        (lambda f: set_config(f, lora_bias=True), "lora_bias is True (bool); allowed: off"),
        (lambda f: set_config(f, modules_to_save=["lm_head"]), "modules_to_save is a list; allowed: off"),
        (lambda f: set_config(f, trainable_token_indices=[1, 2]), "trainable_token_indices is a list; allowed: off"),
        (lambda f: set_config(f, fan_in_fan_out=True), "fan_in_fan_out is True (bool); allowed: off"),
        (lambda f: set_config(f, alora_invocation_tokens=[5]), "alora_invocation_tokens is a list; allowed: off"),
        (lambda f: set_config(f, layer_replication=[[0, 2]]), "layer_replication is a list; allowed: off"),
        (lambda f: set_config(f, init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4' (str)"),
        # tensors that are no plain LoRA
        (
            lambda f: set_tensors(f, **{"base_model.model.model.embed_tokens.weight": torch.zeros(37, 32)}),
            "holds base_model.model.model.embed_tokens.weight; allowed: lora_A.weight and lora_B.weight",
        ),
        (
            lambda f: set_tensors(f, **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 37)}),
            "embed_tokens.lora_embedding_A; allowed",
        ),
        (
            lambda f: set_tensors(f, **{Q.format("magnitude_vector"): torch.zeros(32)}),
            "lora_magnitude_vector.weight; allow",
        ),
        (
            lambda f: set_tensors(f, **{Q.format("B").replace("weight", "bias"): torch.zeros(32)}),
            "lora_B.bias; allowed",
        ),
        (lambda f: set_tensors(f, B=None), "for model.layers.1.self_attn.q_proj only lora_A is there"),
        (lambda f: set_tensors(f, A=None), "for model.layers.1.self_attn.q_proj only lora_B is there"),
        (lambda f: save_file({}, f / ADAPTER_WEIGHTS_FILE), "holds no tensors"),
        (
            lambda f: set_tensors(f, **{Q.format("A.other"): torch.zeros(4, 32)}),
            "holds 2 adapters (one without a name, other); one in a folder is allowed",
        ),
        # the wrong model
        (
            lambda f: rename_tensors(f, lambda name: name.replace("self_attn", "attn")),
            "model.layers.1.attn.q_proj, and the model has no such linear layer (did you mean "
            "'model.layers.1.self_attn.q_proj'?)",
        ),
        (
            lambda f: rename_tensors(f, lambda name: name.replace("layers.2", "layers.7")),
            "model.layers.7.self_attn.q_proj, and the model has no such linear layer",
        ),
        (
            lambda f: set_tensors(f, A=torch.zeros(4, 48)),
            "q_proj.lora_A.weight has shape [4, 48], the model's layer and the rank in adapter_config.json ask for "
            "[4, 32]",
        ),
        (lambda f: set_tensors(f, B=torch.zeros(16, 4)), "q_proj.lora_B.weight has shape [16, 4]"),
        (lambda f: set_tensors(f, A=torch.zeros(128)), "q_proj.lora_A.weight has shape [128]"),
        # files that do not belong together
        (lambda f: set_tensors(f, A=torch.zeros(6, 32), B=torch.zeros(32, 6)), "lora_A.weight has shape [6, 32]"),
        (lambda f: set_config(f, r=8), "has shape [4, 32], the model's layer and the rank in adapter_config.json ask"),
        (lambda f: set_config(f, rank_pattern={"v_proj": 2}), "v_proj.lora_A.weight has shape [4, 32]"),
        (lambda f: set_config(f, r=4.0), "the rank of model.layers.1.self_attn.q_proj is 4.0; a whole number"),
        (lambda f: set_config(f, r=0), "the rank of model.layers.1.self_attn.q_proj is 0; a whole number"),
        (lambda f: set_config(f, r="4"), "r (or rank_pattern) is '4' (str); a number is needed"),
        (lambda f: set_config(f, r=True), "r (or rank_pattern) is True (bool); a number is needed"),
        (lambda f: drop_key(f, "lora_alpha"), "lora_alpha (or alpha_pattern) is nothing (null); a number is needed"),
        (lambda f: set_config(f, lora_alpha=math.nan), "lora_alpha (or alpha_pattern) is nan (float)"),
        (lambda f: set_config(f, lora_alpha=10**400), "lora_alpha (or alpha_pattern) is a number of 1329 bits"),
        (lambda f: set_config(f, alpha_pattern={"(": 2}), "alpha_pattern makes no sense"),
        (lambda f: set_config(f, alpha_pattern=[2]), "alpha_pattern makes no sense"),
        (
            lambda f: set_config(f, layers_to_transform=[2]),
            f"holds weights for model.layers.1.self_attn.q_proj, which {CONFIG_FILE} does not target",
        ),
        (
            lambda f: set_config(f, target_modules=["q_proj", "v_proj", "o_proj"]),
            f"lacks model.layers.1.self_attn.o_proj, which {CONFIG_FILE} targets",
        ),
        (lambda f: set_config(f, target_modules="*", layers_to_transform=None), "make no sense"),
        (lambda f: set_config(f, target_modules=5), "make no sense"),
        (lambda f: set_config(f, layers_to_transform=None, layers_pattern="layers"), "make no sense"),
        # values
        (
            lambda f: set_tensors(f, A=with_value((4, 32), math.nan)),
            "q_proj.lora_A.weight holds values that are not finite",
        ),
        (
            lambda f: set_tensors(f, B=with_value((32, 4), math.inf)),
            "q_proj.lora_B.weight holds values that are not finite",
        ),
        (
            lambda f: set_tensors(f, A=torch.zeros(4, 32, dtype=torch.int8)),
            "is of type I8; allowed: F64, F32, F16, BF16",
        ),
        (
            lambda f: set_tensors(f, A=torch.zeros(64, 1, dtype=torch.uint8)),
            "is of type U8; allowed: F64, F32, F16, BF16",
        ),
        (lambda f: set_tensors(f, A=torch.zeros(4, 32).to(torch.float8_e4m3fn)), "is of type F8_E4M3; allowed"),
    ],
)
def test_damaged_adapters_are_refused(
    damage: Callable[[Path], None], message: str, adapter_folder: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    read_adapter(adapter_folder, shapes)  # valid so far
    damage(adapter_folder)
    assert message in refusal(adapter_folder, shapes)


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_pickled_weights_are_never_read(adapter_folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    (adapter_folder / ADAPTER_WEIGHTS_FILE).unlink()
    (adapter_folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(adapter_folder, shapes)
    assert "adapter_model.bin is pickled" in message
    assert "write it with save_pretrained" in message


def test_missing_folder_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    assert f"no {CONFIG_FILE} there" in refusal(tmp_path / "nowhere", shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"alora_invocation_tokens": [3]},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 3], [1, 4]]},
    ],
)
def test_adapters_beyond_plain_lora_are_refused(
    options: dict[str, Any], model: LlamaForCausalLM, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_with_peft(model, tmp_path / "a", **{"target_modules": ["q_proj", "v_proj"], **options})
    refusal(tmp_path / "a", shapes)


def test_every_option_of_peft_is_known_here() -> None:
    """A new option of PEFT fails here: then decide whether it makes an adapter more than scale · B(A x)."""
    harmless = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "qalora_group_size", "ensure_weight_tying",
    }  # fmt: skip
    assert set(LoraConfig().to_dict()) <= harmless | set(peft_files.UNSUPPORTED_OPTIONS)
