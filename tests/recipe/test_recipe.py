"""The whole recipe: the keys of the contract, one owner for every setting, and changes with which a run may resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.config.deepspeed_json import OWNED_BY_JSON, OWNED_BY_RECIPE, read_deepspeed_json
from dscl.config.parsing import key_name, to_plain_data
from dscl.recipe.recipe import CHANGEABLE_KEYS, SECTION_CONFIGS, Recipe, find_difference, read_recipe, resolve_recipe
from dscl.utils.errors import UserError

CONTRACT = """
run_dir: out/first
seed: 0
model: {name: path-or-hub-id}
method: {name: sequential, tune: full}
stream:
  - {name: agnews, path: data/agnews, metric: accuracy, epochs: 2, train_limit: 1000, test_limit: 300}
  - {name: sst2, path: data/sst2}
train: {lr: 3.0e-4, schedule: cosine, warmup: 0.03, weight_decay: 0.0, grad_clip: 1.0, epochs: 1,
        global_batch: 16, micro_batch: 4, max_length: 256, packing: false, precision: bf16, non_finite: stop}
evaluate: {mode: rank, batch: 16, max_new_tokens: 32, tasks: all, every: 1, split: test, oracle_task_id: false,
           zero_shot: true, heldout: null}
deepspeed: ds_configs/zero3.json
checkpoint: {every: 200, keep: 2, grace: 120.0, async: false, best: null}
observe: {every: 10, tensorboard: true, peak_tflops: null, live: auto, profile: {}}
"""

OWNED = {name.partition(".")[0] for name in OWNED_BY_RECIPE}
DEEPSPEED_NAMES = sorted({*OWNED_BY_JSON, *OWNED, "zero_stage", "offload_param", "stage3_max_live_parameters"})


@pytest.fixture
def contract(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(CONTRACT)
    return str(path)


def refusal(document: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve_recipe({**document, **changes})
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def small() -> dict[str, Any]:
    return {"run_dir": "out/x", "stream": [{"name": "a", "path": "data/a"}]}


def test_contract_is_a_complete_recipe_and_states_the_defaults(contract: str) -> None:
    recipe = read_recipe(contract)
    assert [task.name for task in recipe.stream] == ["agnews", "sst2"]
    assert (recipe.stream[0].epochs, recipe.stream[1].epochs) == (2, None)
    bare = resolve_recipe(
        {**yaml.safe_load(CONTRACT), "train": None, "evaluate": {}, "checkpoint": {}, "observe": None}
    )
    assert bare == dataclasses.replace(recipe, source=bare.source)
    for section in ("train", "evaluate", "checkpoint", "observe"):
        assert yaml.safe_load(CONTRACT)[section].keys() == {
            key_name(f) for f in dataclasses.fields(SECTION_CONFIGS[section])
        }


def test_resolved_recipe_reads_back_as_itself(tmp_path: Path, contract: str) -> None:
    odd = ["run_dir='1e-4'", 'model.name="no"', 'stream.0.template="{prompt}: \\"é\\" # 😀\\n\\t- x"', "train.lr=1e-5"]
    odd += ['stream.1.labels=["yes", "1", "~", " a", "a: b"]', "method.tune=lora", "method.tune.rank=4"]
    for words in ([], odd):
        recipe = read_recipe(contract, words)
        again = tmp_path / "again.yaml"
        again.write_text(recipe.to_yaml(), "utf-8")
        assert dataclasses.replace(read_recipe(str(again)), source=recipe.source) == recipe
        assert find_difference(yaml.safe_load(recipe.to_yaml()), recipe.to_dict()) == ""


def test_recipe_text_names_every_setting(small: dict[str, Any]) -> None:
    document = yaml.safe_load(resolve_recipe(small).to_yaml())
    for section, config in SECTION_CONFIGS.items():
        assert set(document[section]) == {key_name(field) for field in dataclasses.fields(config)}
    assert set(document) == {field.name for field in dataclasses.fields(Recipe)} - {"source"}


def test_another_method_leaves_the_keys_of_the_one_before(contract: str) -> None:
    """The contract's own example: the file's `tune: full` is no part of asr."""
    recipe = read_recipe(contract, ["method.name=asr", "method.router.num_features=64", "run_dir=out/a"])
    assert (recipe.method.name, recipe.method.router.num_features) == ("asr", 64)
    assert read_recipe(contract, ["method.name=sequential", "method.tune=lora"]).method.tune.name == "lora"
    method = read_recipe(contract, ["method.tune=lora", "method.name=sequential"]).method
    assert method.tune.name == "lora"
    with pytest.raises(UserError, match=r"method\.tune\.name: given 'full' \(str\); allowed: lora_per_task$"):
        read_recipe(contract, ["method.name=asr", "method.tune=full"])


def test_faithful_is_the_papers_settings_and_no_others(small: dict[str, Any]) -> None:
    paper = resolve_recipe({**small, "method": {"name": "asr", "paper_preset": True}}).method
    router = paper.router
    assert (router.layer, router.num_features, router.ridge, router.ood_fallback) == (4, 10000, 100.0, False)
    assert (paper.tune.rank, paper.tune.alpha, paper.tune.dropout, paper.tune.targets) == (
        8, 32.0, 0.1, ("q_proj", "v_proj"),
    )  # fmt: skip
    again = resolve_recipe(
        {**small, "method": resolve_recipe({**small, "method": to_plain_data(paper)}).to_dict()["method"]}
    ).method
    assert again == paper
    assert "method.router.num_features: given 64 together with paper_preset: true, which sets 10000" in refusal(
        small, method={"name": "asr", "paper_preset": True, "router": {"num_features": 64}}
    )


@pytest.mark.parametrize(
    ("method", "mapping"),
    [
        ({"tune": "full"}, {}),
        ({"tune": None}, {}),  # all its keys are commented out
        ({"tune": "lora"}, {"tune": {"name": "lora"}}),
        ({"name": "moses", "router": "key"}, {"name": "moses", "router": {"name": "key"}}),
        ({"name": "moses", "router": {"layer": 1}}, {"name": "moses", "router": {"name": "rls", "layer": 1}}),
        ({"name": "moses", "constraint": "osft"}, {"name": "moses", "constraint": {}}),
    ],
)
def test_a_part_is_a_word_or_a_mapping(small: dict[str, Any], method: Any, mapping: Any) -> None:
    """The first part of the method is selected if no name is given."""
    parsed = [resolve_recipe({**small, "method": each}) for each in (method, mapping)]
    assert parsed[0] == parsed[1]
    document = parsed[0].to_dict()
    assert resolve_recipe(document, source=parsed[0].source) == parsed[0]
    assert all(isinstance(document["method"][name], dict) for name in ("tune", "router") if name in document["method"])


def test_a_constraint_of_null_is_none(tmp_path: Path, small: dict[str, Any]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**small, "method": {"name": "moses", "constraint": {"protected_ratio": 0.5}}}))
    assert read_recipe(str(path)).method.constraint.protected_ratio == 0.5
    assert read_recipe(str(path), ["method.constraint=null"]).method.constraint is None
    assert resolve_recipe({**small, "method": {"name": "moses", "constraint": None}}).method.constraint is None
    assert read_recipe(str(path), ["method.constraint=null", "method.constraint=osft"]).method.constraint is not None


@pytest.mark.parametrize("tune", [None, "full", "lora", {"name": "lora", "alpha": 3.0}, {"name": "full"}])
@pytest.mark.parametrize("words", [["method.tune=lora", "method.tune.rank=4"], ["method.tune={name: lora, rank: 4}"]])
def test_an_override_selects_a_part_by_a_word(tmp_path: Path, small: dict[str, Any], tune: Any, words: Any) -> None:
    """In any order with overrides of the part's keys, and for any value in the file."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**small, "method": {"name": "sequential", "tune": tune}}))
    for order in (words, words[::-1]):
        parsed = read_recipe(str(path), order).method.tune
        stays = isinstance(tune, dict) and "alpha" in tune and len(words) == 2  # keys of the part that stays selected
        assert (parsed.name, parsed.rank, parsed.alpha) == ("lora", 4, 3.0 if stays else 16.0)


@pytest.mark.parametrize("assignment", ["method.router.name=oracle", "method.router=oracle"])
def test_an_override_of_a_parts_name_drops_the_files_keys_of_the_other_part(
    tmp_path: Path, small: dict[str, Any], assignment: str
) -> None:
    path = tmp_path / "r.yaml"
    method = {"name": "moses", "tune": {"num_experts": 3}, "router": {"name": "rls", "layer": 1}}
    path.write_text(json.dumps({**small, "method": method}))
    parsed = read_recipe(str(path), [assignment]).method
    assert to_plain_data(parsed.router) == {"name": "oracle"}
    assert parsed.tune.num_experts == 3  # the other parts stay
    assert read_recipe(str(path), [assignment.replace("oracle", "rls")]).method.router.layer == 1
    assert read_recipe(str(path), [assignment.replace("oracle", "key")]).method.router.layer is None
    with pytest.raises(
        UserError, match=r"method\.router\.layer: a key of rls and key, but method\.router\.name is oracle"
    ):
        read_recipe(str(path), [assignment, "method.router.layer=1"])


def test_overrides_reach_everywhere(contract: str) -> None:
    words = ["method.tune=lora", "stream.1.epochs=3", "model.name=", "model.shape.hidden_size=64", "run_dir=out/a"]
    recipe = read_recipe(contract, [*words, "stream_defaults.test_limit=7", "train.lr=1e-4", "data.bad_records=skip"])
    assert recipe.method.tune.name == "lora"
    assert [(task.epochs, task.test_limit) for task in recipe.stream] == [(2, 300), (3, 7)]
    assert (recipe.model.name, recipe.model.shape) == (None, {"hidden_size": 64})
    assert (recipe.run_dir, recipe.train.lr, recipe.data.bad_records) == ("out/a", 1e-4, "skip")


@pytest.mark.parametrize(
    ("changes", "expected_message"),
    [
        ({"trian": {}}, "trian: no such key (did you mean 'train'?); allowed here: run_dir, seed, deepspeed, method, "),
        ({"train": {"epoch": 1}}, "train.epoch: no such key (did you mean 'epochs'?); allowed here: lr, schedule"),
        ({"train": [1]}, "train: given a list; a mapping of keys is needed"),
        ({"train": 3}, "train: given 3 (int); a mapping of keys is needed"),
        ({"run_dir": None}, "run_dir: given nothing (null); text is needed"),
        ({"run_dir": ""}, "run_dir: given ''; text that is not blank is needed"),
        ({"seed": -1}, "seed: given -1; it must be at least 0"),
        ({"seed": 2**63}, "seed: given 9223372036854775808; it must be at most 9223372036854775807"),
        ({"method": {"name": "emc"}}, "method.name: given 'emc'; allowed: sequential, joint, replay, "),
        ({"method": {"name": "Sequental"}}, "(did you mean 'sequential'?)"),
        ({"method": {"name": ["asr"]}}, "method.name: given a list; the name of a method is needed"),
        ({"method": {"name": None}}, "method.name: given nothing (null); the name of a method is needed"),
        ({"method": "sequential"}, "method: given 'sequential' (str); a mapping of keys is needed"),
        ({"method": {"tune": {"name": "lora", "rnk": 1}}}, "method.tune.rnk: no such key (did you mean 'rank'?)"),
        (
            {"method": {"tune": {"rank": 4}}},
            "method.tune.rank: a key of lora, but method.tune.name is full; remove it, or set method.tune.name=lora",
        ),
        (
            {"method": {"name": "moses", "router": {"name": "key", "ridge": 1}}},
            "method.router.ridge: a key of rls, but method.router.name is key; remove it, or set method.router.name=",
        ),
        (
            {"method": {"tune": "lroa"}},
            "method.tune.name: given 'lroa' (str); allowed: full, lora (did you mean 'lora'?)",
        ),
        ({"method": {"tune": {"name": ["lora"]}}}, "method.tune.name: given a list; allowed: full, lora"),
        ({"method": {"tune": 3}}, "method.tune: given 3 (int); one of full, lora or a mapping is needed"),
        (
            {"method": {"name": "osft", "tune": "lora"}},
            "method.tune.name: given 'lora' (str); allowed: full",
        ),
        (
            {"method": {"router": "rls"}},
            "method.router: no such key; allowed here: name, tune",
        ),
        ({"stream": None}, "stream: given nothing (null); a list of tasks is needed, for example [{name: sst2, "),
        ({"stream": []}, "stream: given an empty list; a list of tasks is needed"),
        ({"stream": {"name": "a"}}, "stream: given a mapping; a list of tasks is needed"),
        ({"stream": ["a"]}, "stream.0: given 'a' (str); a mapping is needed"),
        ({"stream": [{"name": "a"}]}, "stream.0.path: missing; give it in the recipe or as stream.0.path=VALUE"),
        ({"stream": [{"name": 1, "path": "a"}]}, "stream.0.name: given 1 (int); text is needed, so write it in quotes"),
        (
            {"stream": [{"name": "a", "path": "a", "metrics": "x"}]},
            "stream.0.metrics: no such key (did you mean 'metric'?)",
        ),
        ({"stream_defaults": {"epoch": 1}}, "stream_defaults.epoch: no such key (did you mean 'epochs'?)"),
        ({"stream_defaults": {"epochs": 0}}, "stream_defaults.epochs: given 0; it must be at least 1"),
        ({"stream_defaults": [1]}, "stream_defaults: given a list; a mapping of keys is needed"),
        ({"deepspeed": {"bf16": {}}}, "deepspeed: given a mapping; the path of a DeepSpeed JSON is needed"),
    ],
)
def test_refusals(small: dict[str, Any], changes: dict[str, Any], expected_message: str) -> None:
    assert expected_message in refusal(small, **changes)


def test_run_dir_and_stream_are_needed() -> None:
    assert refusal({}).startswith("run_dir: missing; give it in the recipe or as run_dir=VALUE")
    assert refusal({"run_dir": "x"}).startswith("stream: given nothing (null); a list of tasks is needed")


@pytest.mark.parametrize(
    ("name", "section"),
    [
        (name, section)
        for section in ("", "train", "method", "observe", "stream_defaults")
        for name in DEEPSPEED_NAMES
        if (section, name) != ("observe", "tensorboard")  # which is dscl's own key
    ],
)
def test_settings_of_deepspeed_are_sent_to_their_owner(small: dict[str, Any], section: str, name: str) -> None:
    message = refusal({**small, section: {name: 1}} if section else {**small, name: 1})
    assert message.startswith(f"{section}.{name}: " if section else f"{name}: ")
    owners = [owner for key, owner in OWNED_BY_RECIPE.items() if key.partition(".")[0] == name]
    if owners:  # even where the JSON owns other keys of that section (bf16): it would refuse this one
        assert f"in a recipe it is {owners[0]}" in message
    else:
        assert "belong to the DeepSpeed JSON; remove it here and name a file in deepspeed" in message


@pytest.mark.parametrize("name", ["train_batch_size", "gradient_clipping", "optimizer", "scheduler", "tensorboard"])
def test_settings_of_the_recipe_are_refused_in_the_json(tmp_path: Path, name: str) -> None:
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, name: 1}))
    with pytest.raises(UserError, match=f"sets {name}, which belongs to the recipe; remove it and set") as caught:
        read_deepspeed_json(path)
    assert OWNED_BY_RECIPE[name] in str(caught.value)


@pytest.mark.parametrize(
    ("zero", "expected_message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer does nothing at stage 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param does nothing at stage 2"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size: given 2; allowed: 1"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "zero_optimization.offload_optimizer.ratio: given 0.5; allowed: 1",
        ),
    ],
)
def test_zero_settings_that_would_do_nothing_or_harm_are_refused(
    tmp_path: Path, zero: Any, expected_message: str
) -> None:
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=expected_message):
        read_deepspeed_json(path)


def test_a_profile_is_not_written_outside_the_run_directory(tmp_path: Path) -> None:
    path = tmp_path / "z.json"
    profiler = {"enabled": True, "profile_step": 2}
    path.write_text(json.dumps({"flops_profiler": {**profiler, "output_file": "/tmp/x/flops.txt"}}))
    with pytest.raises(UserError, match=r'flops_profiler\.output_file: given "/tmp/x/flops\.txt".*leave it out'):
        read_deepspeed_json(path)
    path.write_text(json.dumps({"flops_profiler": {**profiler, "output_file": None}}))
    assert read_deepspeed_json(path)["flops_profiler"]["enabled"]


@pytest.mark.parametrize("name", ["autotuning", "csv_monitor", "wandb", "comet", "nebula", "checkpoint"])
def test_what_else_of_deepspeed_writes_files_is_no_key(tmp_path: Path, name: str) -> None:
    path = tmp_path / "z.json"
    path.write_text(json.dumps({name: {"enabled": True}}))
    with pytest.raises(UserError, match=f"no such key '{name}'"):
        read_deepspeed_json(path)


def test_deepspeed_file_is_found(tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "project" / "recipes"
    folder.mkdir(parents=True)
    recipe = resolve_recipe({**small, "deepspeed": "own/z.json"}, source=str(folder / "r.yaml"))
    with pytest.raises(
        UserError, match=r"^deepspeed: given 'own/z.json'; no such file here or beside the recipe"
    ) as caught:
        recipe.find_deepspeed_json()
    assert "dscl brings ds_configs/ with zero0.json, " in str(caught.value)
    for place in (tmp_path / "project", folder, tmp_path):  # each is nearer than the one before
        (place / "own").mkdir()
        (place / "own" / "z.json").write_text("{}")
        assert recipe.find_deepspeed_json().resolve() == place / "own" / "z.json"
    brought = resolve_recipe(
        {**small, "deepspeed": "ds_configs/zero2.json"}, source=str(folder / "r.yaml")
    ).find_deepspeed_json()
    assert json.loads(brought.read_text())["zero_optimization"]["stage"] == 2
    with pytest.raises(UserError, match=r"\(did you mean 'zero3.json'\?\)"):
        resolve_recipe({**small, "deepspeed": "ds_configs/zero_3.json"}).find_deepspeed_json()
    with pytest.raises(UserError, match="no such file"):
        resolve_recipe({**small, "deepspeed": "~nobody-of-this-name/z.json"}).find_deepspeed_json()


def test_home_folder_in_run_dir(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_recipe({**small, "run_dir": "~/out"}).run_folder == tmp_path / "out"


def test_difference_names_the_first_key_that_matters(contract: str) -> None:
    def changed(*words: str) -> str:
        return find_difference(read_recipe(contract).to_dict(), read_recipe(contract, words).to_dict())

    assert changed() == ""
    assert changed("run_dir=b", "observe.every=1", "checkpoint.every=1", "evaluate.batch=2", "data.cache_dir=c") == ""
    assert changed("deepspeed=other.json") == ""
    assert changed("train.lr=1", "seed=3") == "seed (there: 0, given: 3)"
    assert changed("train.lr=1") == "train.lr (there: 0.0003, given: 1.0)"
    assert changed("stream.1.path=p") == "stream.1.path (there: 'data/sst2', given: 'p')"
    assert changed("stream=[{name: a, path: b}]") == "stream (there: 2 entries, given: 1 entries)"
    assert changed("model.name=", "model.shape={a: 1}").startswith("model.name (there: 'path-or-hub-id', given: None)")
    assert len(changed("model.name=" + "x" * 999)) < 200
    assert find_difference(None, read_recipe(contract).to_dict()) != ""  # a file that was cut short


def test_what_may_change_exists(small: dict[str, Any]) -> None:
    methods = ({"name": "asr"}, {"name": "osft"}, {"name": "moses", "constraint": {"name": "osft"}})
    documents = [resolve_recipe({**small, "method": method}).to_dict() for method in methods]
    for dotted in CHANGEABLE_KEYS:
        nodes: list[Any] = documents
        for part in dotted.split("."):
            nodes = [node[part] for node in nodes if part in node]
        assert nodes, dotted


def test_folder_is_where_everything_lies(contract: str, tmp_path: Path) -> None:
    """`folder` holds the tasks, and the model and the held-out texts if they are there. The resolved paths name it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "texts.jsonl").write_text("{}")
    words = [f"folder={tmp_path}", "stream.1={name: sst2}", "model.name=base", "evaluate.heldout=texts.jsonl"]
    recipe = read_recipe(contract, words)
    assert [task.path for task in recipe.stream] == [f"{tmp_path}/data/agnews", f"{tmp_path}/sst2"]
    assert recipe.model.name == f"{tmp_path}/base"
    assert recipe.evaluate.heldout == f"{tmp_path}/texts.jsonl"
    assert "folder" not in recipe.to_dict()
    assert read_recipe(contract, [f"folder={tmp_path}"]).model.name == "path-or-hub-id"
    assert read_recipe(contract, [f"folder={tmp_path}", "stream.0.path=/data/x"]).stream[0].path == "/data/x"
    with pytest.raises(UserError, match=r"folder: given 'nowhere' \(str\), which is no folder; give the one"):
        read_recipe(contract, ["folder=nowhere"])


def test_order_picks_tasks_by_name(contract: str) -> None:
    assert [task.name for task in read_recipe(contract, ["order=[sst2, agnews]"]).stream] == ["sst2", "agnews"]
    recipe = read_recipe(contract, ["order=[sst2]"])
    assert [task.path for task in recipe.stream] == ["data/sst2"]
    assert "order" not in recipe.to_dict()  # the stream already has that order


@pytest.mark.parametrize(
    ("order", "expected_message"),
    [
        ("sst2", "order: given 'sst2' (str); a list of names of the stream's tasks is needed"),
        ("[]", "order: given a list; a list of names"),
        (
            "[sst]",
            "order.0: given 'sst' (str), which is no task of the stream (did you mean 'sst2'?); allowed: agnews, sst2",
        ),
        ("[sst2, sst2]", "where a task comes twice; name each once"),
    ],
)
def test_a_wrong_order_is_told(contract: str, order: str, expected_message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(contract, [f"order={order}"])
    assert expected_message in str(caught.value)
