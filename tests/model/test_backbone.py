"""Opening a backbone: errors of one line, one training of the tokenizer, activation checkpointing without effects."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscl.engine.zero_layouts import load_parameters
from dscl.model.backbone import Backbone, ModelConfig, resolve_backbone
from dscl.utils.errors import UserError
from tests.support.small_models import PIECES, SHAPE, TEXT

REQUIRED_SHAPE_KEYS = {"vocab_size": PIECES, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def open_backbone(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Backbone]:
    def open_one(**settings: Any) -> Backbone:
        settings.setdefault("tokenizer", str(tokenizer_folder))
        config = ModelConfig(**settings)
        return resolve_backbone(config, seed=3, dtype=torch.float32, cache=tmp_path / "cache", texts=lambda: TEXT)

    return open_one


@pytest.fixture
def refusal(open_backbone: Callable[..., Backbone]) -> Callable[..., str]:
    def refuse(**settings: Any) -> str:
        with pytest.raises(UserError) as raised:
            open_backbone(**settings)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500
        return str(raised.value)

    return refuse


def test_exactly_one_of_name_and_shape(refusal: Callable[..., str]) -> None:
    assert "exactly one of model.name" in refusal()
    assert "exactly one of model.name" in refusal(name="x", shape=REQUIRED_SHAPE_KEYS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "model.shape.hiden_size: no such key of a LLaMA configuration (did you mean 'hidden"),
        ({"hidden_size": 1.5}, "model.shape.hidden_size: given 1.5; a whole number of at least 1 is needed"),
        ({"hidden_size": True}, "model.shape.hidden_size: given True"),
        ({"num_hidden_layers": 0}, "model.shape.num_hidden_layers: given 0"),
        ({"num_key_value_heads": "2"}, "model.shape.num_key_value_heads: given '2'"),
        ({"num_key_value_heads": 3}, "model.shape.num_key_value_heads: given 3; it must divide num_attention_heads=4"),
        ({"num_attention_heads": 5}, "model.shape.num_attention_heads: given 5; it must divide hidden_size=64"),
        ({"num_attention_heads": 64}, "model.shape.num_attention_heads: given 64; it must divide hidden_size=64 into"),
        ({"intermediate_size": -4}, "model.shape.intermediate_size: given -4"),
        ({"rms_norm_eps": "a"}, "model.shape: "),
        ({"initializer_range": -1.0}, "model.shape: "),
        ({"hidden_act": "foo"}, "model: none can be built of this configuration (KeyError: 'foo')"),
        ({"vocab_size": PIECES - 1}, f"the tokenizer has {PIECES} pieces, the model only {PIECES - 1}"),
    ],
)
def test_invalid_shapes_are_refused(change: dict[str, Any], message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal(shape={**REQUIRED_SHAPE_KEYS, **change})


@pytest.mark.parametrize("missing", list(REQUIRED_SHAPE_KEYS))
def test_incomplete_shapes_are_refused(missing: str, refusal: Callable[..., str]) -> None:
    shape = {key: value for key, value in REQUIRED_SHAPE_KEYS.items() if key != missing}
    assert f"model.shape.{missing}: missing" in refusal(shape=shape)


def test_unavailable_attention_is_refused(refusal: Callable[..., str]) -> None:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        assert "model.attention: given 'flash_attention_2'" in refusal(
            shape=REQUIRED_SHAPE_KEYS, attention="flash_attention_2"
        )
    else:
        pytest.skip("flash_attn is installed here")


def test_cudnn_attention_is_disabled(open_backbone: Callable[..., Backbone]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_backbone(shape=SHAPE).build()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_pass_in_training_keeps_no_cache(open_backbone: Callable[..., Backbone]) -> None:
    assert open_backbone(shape=SHAPE).build()(torch.tensor([[1, 2]])).past_key_values is None


def test_the_order_of_the_configurations_keys_is_not_part_of_the_fingerprint(
    open_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = open_backbone(shape=SHAPE)
    before, keys = backbone.fingerprint(), backbone.hf_config.to_dict()
    monkeypatch.setattr(type(backbone.hf_config), "to_dict", lambda self: dict(reversed(keys.items())))
    assert backbone.fingerprint() == before


def test_count_parameters_equals_the_built_model(open_backbone: Callable[..., Backbone]) -> None:
    for tied in (True, False):
        backbone = open_backbone(shape={**SHAPE, "tie_word_embeddings": tied})
        assert backbone.count_parameters() == sum(p.numel() for p in backbone.build().parameters())


def test_building_does_not_change_the_configuration(open_backbone: Callable[..., Backbone]) -> None:
    backbone = open_backbone(shape=REQUIRED_SHAPE_KEYS)
    backbone.build()
    assert backbone.hf_config.use_cache is True  # an exported model generates with a cache again


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "a bert model is no causal language model"),
        ({"model_type": "t5"}, "a t5 model is no causal language model"),
        ({"model_type": "nosuch"}, "model_type 'nosuch' is not one that transformers itself has"),
        ({"model_type": "nosuch", "auto_map": {"AutoConfig": "code.C"}}, "code that comes with a model is never run"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"hidden_size": 32}, "config.json and the weights do not belong together"),
        ({"num_hidden_layers": 3}, "the weights lack 9 of the"),
        ({"hidden_size": "many"}, "config.json: cannot be used"),
    ],
)
def test_unusable_folders_are_refused(
    values: dict[str, Any], message: str, save: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    folder = save()
    edit_config(folder, **values)
    error_message = refusal(name=str(folder))
    assert message in error_message
    assert str(folder) in error_message


def test_code_in_a_folder_is_not_run(
    save: Callable[..., Path], open_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    folder = save()
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    (folder / "code.py").write_text(trap + "class C: pass\n")
    edit_config(folder, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoTokenizer": "code.C"})
    assert type(open_backbone(name=str(folder)).build()).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"llama"'])
def test_broken_config_is_refused(content: str, save: Callable[..., Path], refusal: Callable[..., str]) -> None:
    folder = save()
    (folder / "config.json").write_text(content)
    assert "config.json: not the JSON description of a model" in refusal(name=str(folder))


def test_unknown_model_names_are_refused(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no config.json there" in refusal(name=str(tmp_path))
    assert "there is no such folder" in refusal(name=str(tmp_path / "none"))
    assert "there is no such folder" in refusal(name="models/a/b")
    assert "a folder or a hub id is needed" in refusal(name="")
    assert "model.tokenizer: given './none'; there is no such folder" in refusal(
        shape=REQUIRED_SHAPE_KEYS, tokenizer="./none"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    message = refusal(name="no-such/model")
    assert "model.name: given 'no-such/model'; no such folder, and the hub could not give it" in message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("extra", [True, False])
def test_tied_embeddings_need_no_second_copy(
    extra: bool, save: Callable[..., Path], open_backbone: Callable[..., Backbone]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    if extra:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors")
    backbone = open_backbone(name=str(folder))
    model = backbone.build()
    load_parameters(model, backbone.weights.read)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])  # type: ignore[union-attr,arg-type]


def test_untied_embeddings_need_a_head(save: Callable[..., Path], refusal: Callable[..., str]) -> None:
    folder = save(tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    assert "the weights lack 1 of the" in refusal(name=str(folder))


def test_trained_tokenizer_is_cached_by_texts_and_size(tmp_path: Path) -> None:
    num_trained = 0

    def open_tokenizer(size: int, text: list[str]) -> Any:
        nonlocal num_trained
        reads = 0

        def texts() -> Iterable[str]:
            nonlocal reads
            reads += 1
            return iter(text)

        config = ModelConfig(shape={**REQUIRED_SHAPE_KEYS, "vocab_size": size})
        backbone = resolve_backbone(config, seed=0, dtype=torch.float32, cache=tmp_path, texts=texts)
        num_trained += reads - 1  # the texts are read once for their fingerprint
        return backbone.tokenizer

    assert len(open_tokenizer(300, TEXT)) == 300
    assert num_trained == 1
    first = open_tokenizer(300, TEXT)
    assert num_trained == 1
    assert len(open_tokenizer(310, TEXT)) == 310
    assert open_tokenizer(300, TEXT[:200]).get_vocab() != first.get_vocab()
    assert num_trained == 3


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and how many numbers the forward pass saves for the backward pass."""
    num_saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_saved
        if not isinstance(tensor, nn.Parameter):
            num_saved += tensor.numel()
        return tensor

    ids = torch.randint(0, PIECES, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        num_saved_by_forward = num_saved
    loss.backward()
    return (
        loss.detach(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        num_saved_by_forward,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_saves_memory_and_changes_nothing(
    lora: bool, open_backbone: Callable[..., Backbone]
) -> None:
    from dscl.model.adapters.injection import LoraConfig, inject_lora

    results = []
    for checkpointing in (False, True):
        backbone = open_backbone(shape={**SHAPE, "num_hidden_layers": 4}, activation_checkpointing=checkpointing)
        model = backbone.build()
        load_parameters(model, backbone.weights.read)
        results.append(loss_and_gradients(inject_lora(model, LoraConfig(), 0) if lora else model))
    (loss, grads, saved), (loss2, grads2, saved2) = results
    assert torch.equal(loss, loss2)
    assert grads.keys() == grads2.keys()
    assert len(grads) > 10
    assert all(torch.equal(grads[name], grads2[name]) for name in grads)
    assert saved2 < 0.5 * saved
