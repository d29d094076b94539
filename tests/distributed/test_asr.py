"""ASR on real ranks: a task's artifacts do not depend on the other tasks, the ranks, the stage or a kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from dscl.config.methods import ASR_PAPER_ROUTER
from dscl.data.batches import collate_prompts
from dscl.methods.asr import Asr
from dscl.model import generation
from dscl.model.adapters.routing import Routing
from dscl.recipe.recipe import resolve_recipe
from dscl.training import evaluation, task_context
from dscl.training.setup import build_setup
from dscl.training.state import TrainState
from tests.support.five_tasks import NAMES, SIZES, artifact_checksums, read_scores, router_statistics, tasks
from tests.support.five_tasks import recipe as recipe_of_tasks
from tests.support.runs import read_metrics, run, run_error, run_outcome, run_until

__all__ = ["tasks"]  # the fixture
EVALUATE_LAST: dict[str, Any] = {"evaluate": {"zero_shot": False, "every": 2}}  # of two tasks


def recipe(*arguments: Any, **changes: Any) -> Any:
    """An ASR recipe with two layers above the feature layer."""
    return recipe_of_tasks(*arguments, **{"layers": 3, **changes})


def test_task_orders_leave_the_same_bytes(ranks: Any, tasks: Path) -> None:
    """Adapters, statistics and final scores; with dropout, which would show a dependence on earlier steps."""
    dropout = {"tune": {"rank": 4, "dropout": 0.2}}
    four = NAMES[:4]
    orders = [four, four[::-1], (*four[2:], *four[:2])]
    evaluation, trainer = {"zero_shot": False, "every": len(four)}, {"epochs": 1}
    for number, names in enumerate(orders):
        ranks(2)(run, recipe(tasks, f"order{number}", 2, names, asr=dropout, evaluate=evaluation, train=trainer))
    expected = artifact_checksums(tasks / "order0")
    assert len(expected) == 3 * len(four)
    assert len(set(expected.values())) > len(four)
    for number in (1, 2):
        assert artifact_checksums(tasks / f"order{number}") == expected
        first, other = (dict(zip(s["tasks"], s["matrix"][-1], strict=True)) for s in
                        (read_scores(tasks / "order0"), read_scores(tasks / f"order{number}")))  # fmt: skip
        assert first == other


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_ranks_and_stages_change_at_most_few_entries(ranks: Any, undisturbed_run: Any, tasks: Path, world: int) -> None:
    """Another batch shape may change the last bit of hidden states; quantization hides nearly all of these changes."""
    short: dict[str, Any] = {"evaluate": {"zero_shot": False}, "train": {"epochs": 1}}
    for stage in (0, 3):
        ranks(world)(run, recipe(tasks, f"world{world}-{stage}", stage, **short))
    reference = undisturbed_run(recipe(tasks, "reference", 1, **short), 1)
    expected, losses = router_statistics(reference), read_metrics(reference)
    for stage in (0, 3):
        run_dir = tasks / f"world{world}-{stage}"
        sums = router_statistics(run_dir)
        assert sorted(sums) == sorted(expected)
        differing = sum(int((sums[name] != expected[name]).sum()) for name in sums)
        total = sum(tensor.numel() for tensor in sums.values())
        print(f"world {world}, stage {stage}: {differing} of {total} entries differ")
        assert differing <= 0.02 * total
        if world == 1:
            assert differing == 0
        records = read_metrics(run_dir)
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in losses], rel=1e-4)
        assert read_scores(run_dir)["routing_accuracy"] == read_scores(reference)["routing_accuracy"]
        assert read_scores(run_dir)["confusion"] == read_scores(reference)["confusion"]
    confusion = read_scores(run_dir)["confusion"]
    assert (confusion["tasks"], confusion["answered_by"]) == (list(NAMES[:2]), [*NAMES[:2], None])
    assert [sum(row) for row in confusion["shares"]] == pytest.approx([1.0, 1.0])
    assert [row[i] for i, row in enumerate(confusion["shares"])] == read_scores(run_dir)["routing_accuracy"][-1]
    assert [row[-1] for row in confusion["shares"]] == read_scores(run_dir)["rejected_share"][-1]


DEATHS = [
    [("step", 2), ("step", 4), ("step", 7)],
    [("take", 1), ("take", 3), ("save", 3), ("step", 1)],
    [("shares", 5), ("gather", 4), ("step", 3)],
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_died_counts_no_sample_twice(ranks: Any, tasks: Path, stage: int) -> None:
    ranks(2)(run, recipe(tasks, f"whole{stage}", stage))
    expected = run_outcome(tasks / f"whole{stage}"), artifact_checksums(tasks / f"whole{stage}")
    for number, deaths in enumerate(DEATHS):
        ranks(2)(run_until, recipe(tasks, f"died{stage}-{number}", stage), deaths)
        run_dir = tasks / f"died{stage}-{number}"
        assert (run_outcome(run_dir), artifact_checksums(run_dir)) == expected


def run_killed_at_task_end(document: dict[str, Any], at: str) -> None:
    """Run and die at the end of the first task: before `end_task`, or right after its artifacts are written."""
    original = getattr(Asr, at)

    def call_and_die(self: Asr, *arguments: Any) -> Any:
        if at == "save_task_artifacts":
            original(self, *arguments)
        raise KeyboardInterrupt

    setattr(Asr, at, call_and_die)
    try:
        run(document)
    except KeyboardInterrupt:
        pass
    finally:
        setattr(Asr, at, original)


@pytest.mark.exhaustive
@pytest.mark.parametrize("at", ["end_task", pytest.param("save_task_artifacts", id="leave")])
def test_a_run_that_died_while_a_task_ended(ranks: Any, tasks: Path, at: str) -> None:
    ranks(1)(run, recipe(tasks, f"ending-whole-{at}"))
    ranks(1)(run_killed_at_task_end, recipe(tasks, f"ending-{at}"), at)
    assert not list((tasks / f"ending-{at}" / "checkpoints").glob("*-learned"))
    ranks(1)(run, recipe(tasks, f"ending-{at}"))
    assert run_outcome(tasks / f"ending-{at}") == run_outcome(tasks / f"ending-whole-{at}")
    assert artifact_checksums(tasks / f"ending-{at}") == artifact_checksums(tasks / f"ending-whole-{at}")


def test_each_sample_counts_once_whatever_epochs_and_recomputation(ranks: Any, tasks: Path) -> None:
    once = recipe(tasks, "once", 1, train={"epochs": 1}, **EVALUATE_LAST)
    ranks(2)(run, once)
    checkpointing = {"activation_checkpointing": True}
    twice = recipe(tasks, "twice", 1, train={"epochs": 2}, model=checkpointing, **EVALUATE_LAST)
    ranks(2)(run, twice)
    first, second = router_statistics(tasks / "once"), router_statistics(tasks / "twice")
    counts = [value for name, value in first.items() if name.endswith("count")]
    assert sorted(int(c) for c in counts) == sorted(round(size * 0.9) for size in SIZES[:2])  # a tenth is for dev
    assert all(torch.equal(first[name], second[name]) for name in first)


def compare_serving_features(document: dict[str, Any]) -> tuple[int, int, int]:
    """Compare the router features of the training pass with those of the same prompts in inference batches."""
    setup = build_setup(resolve_recipe(document))
    engine = setup.build_engine()
    method, task_data = setup.method, setup.tasks[0]
    assert isinstance(method, Asr)
    engine.reset_optimizer(method.begin_task(0, task_data.task.name, build_task_context(engine, task_data)))
    for number in range(task_data.sampler.steps_per_epoch):
        engine.step(
            method.loss,
            task_data.micro_batches(number),
            targets=task_data.sampler.step_plan(number).num_targets,
            lr=1e-2,
        )
    rows = method.row_state_dict()
    module = engine.module.eval()
    differing = 0
    for start in range(0, len(rows["samples"]), 5):
        samples = rows["samples"][start : start + 5].tolist()
        batch = collate_prompts(
            [task_data.dataset[sample][0] for sample in samples], task_data.pad_id, task_data.bos_id
        )
        with torch.no_grad(), method.routing.capture_features(batch.prompt_spans) as pooled:
            module(batch.input_ids, batch.attention_mask, batch.position_ids)
        serving_features = method.task_router.router.quantize(pooled())
        differing += int((serving_features != rows["features"][start : start + 5]).sum())
    engine.close()
    return len(rows["samples"]), differing, rows["features"].numel()


@pytest.mark.parametrize(("packing", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_training_and_serving_compute_the_same_features(ranks: Any, tasks: Path, packing: bool, dropout: float) -> None:
    """Also for a base model with dropout, which acts above the feature layer only."""
    document = recipe(tasks, "features", 0, train={"packing": packing, "epochs": 1})
    document["model"]["shape"]["attention_dropout"] = dropout
    document["method"]["router"]["layer"] = 2
    counted, differing, total = ranks(1)(compare_serving_features, document)[0]
    assert counted == round(SIZES[0] * 0.9)
    print(f"packing {packing}: {differing} of {total} entries differ")
    assert differing <= 1e-3 * total


def pad_right(prompts: list[list[int]], pad: int) -> tuple[Any, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[*p, *[pad] * (width - len(p))] for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])
    return ids, mask


def compare_mixed_batch(document: dict[str, Any]) -> tuple[float, float, float, int]:
    """Compare one batch of five tasks with five batches of one task each: logits (padded left and right) and tokens."""
    setup = build_setup(resolve_recipe(document))
    engine = setup.build_engine()
    for index, task_data in enumerate(setup.tasks):
        engine.reset_optimizer(
            setup.method.begin_task(index, task_data.task.name, build_task_context(engine, task_data))
        )
        for number in range(task_data.num_steps):
            plan = task_data.sampler.step_plan(number)
            engine.step(setup.method.loss, task_data.micro_batches(number), targets=plan.num_targets, lr=1e-2)
        summary = setup.method.end_task(index, task_data.task.name, build_task_context(engine, task_data))
        assert "condition" in summary.message
        trained = sum(4 * t.numel() for t in engine.shards.gather_full_weights().values())
        assert summary.metrics["capacity_bytes"] == (index + 1) * trained
    module, method, pad = engine.module.eval(), setup.method, setup.tasks[0].pad_id
    assert isinstance(method, Asr)
    prompts = [task_data.eval_set.prompt_ids[i] for i in range(3) for task_data in setup.tasks]
    batch = collate_prompts(prompts, pad, setup.tasks[0].bos_id)
    left_error = right_error = effect = 0.0
    different = 0
    with torch.no_grad():
        with method.inference_context(batch) as routes:
            logits = module(batch.input_ids, batch.attention_mask, batch.position_ids).logits[:, -1]
        base_logits = module(batch.input_ids, batch.attention_mask, batch.position_ids).logits[:, -1]
        assert routes is not None
        assert len(set(routes)) > 3, routes
        ids, mask = pad_right([list(p) for p in prompts], pad)
        spans = [(row, stop - start_of(batch, row) - (stop - start), stop - start_of(batch, row))
                 for row, start, stop in batch.prompt_spans]  # fmt: skip
        right_padded_batch = type(batch)(ids, mask, torch.arange(ids.shape[1]).repeat(len(ids), 1), spans)
        with method.inference_context(right_padded_batch) as routes_again:
            all_logits = module(ids, mask, right_padded_batch.position_ids).logits
        assert routes_again == routes
        last_logits = torch.stack([all_logits[row, len(p) - 1] for row, p in enumerate(prompts)])
        right_error = float((last_logits - logits).abs().max())
        with method.inference_context(batch):
            tokens = generation.generate(module, batch, 6, -1, pad)
        for place in range(5):
            rows = list(range(place, 15, 5))
            task_batch = collate_prompts([prompts[r] for r in rows], pad, setup.tasks[0].bos_id)
            with method.inference_context(task_batch) as task_routes:
                task_logits = module(task_batch.input_ids, task_batch.attention_mask, task_batch.position_ids).logits[
                    :, -1
                ]
            assert task_routes == [routes[r] for r in rows]
            left_error = max(left_error, float((task_logits - logits[rows]).abs().max()))
            with method.inference_context(task_batch):
                different += generation.generate(module, task_batch, 6, -1, pad) != [tokens[r] for r in rows]
        effect = float((base_logits - logits).abs().max())
    engine.close()
    return left_error, right_error, effect, different


class SilentObserver:
    """Stands for an observer whose methods are not called."""


def build_task_context(engine: Any, task_data: Any) -> Any:
    return task_context.build_task_context(engine, task_data, SilentObserver(), TrainState(), "")  # type: ignore[arg-type]


def start_of(batch: Any, row: int) -> int:
    """The position of the row's first token after its padding."""
    return int(batch.attention_mask.shape[1] - batch.attention_mask[row].sum())


@pytest.mark.parametrize("stage", [0, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (1, 2)), 3])
def test_a_batch_of_five_tasks_equals_five_batches(ranks: Any, tasks: Path, stage: int) -> None:
    few = {"train_limit": 20}
    document = recipe(tasks, "mixed", stage, NAMES, train={"epochs": 1}, stream_defaults=few)
    for left_error, right_error, effect, different in ranks(2)(compare_mixed_batch, document):
        assert left_error <= 1e-5
        assert right_error <= 1e-5
        assert effect > 1e-3  # the adapters do something
        assert different == 0


def run_and_record_likelihoods(document: dict[str, Any]) -> list[tuple[str, list[str | None], torch.Tensor]]:
    """Run; the routes and label log probabilities of every evaluation, in their order."""
    evaluations: list[Any] = []
    original, inference_context = evaluation.label_log_probs, Asr.inference_context
    routes: list[Any] = []

    def record_routes(self: Asr, batch: Any, task: str | None = None) -> Any:
        context = inference_context(self, batch, task)

        class Watching:
            def __enter__(self) -> Any:
                routes.append(context.__enter__())
                return routes[-1]

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Watching()

    def record_values(*arguments: Any) -> torch.Tensor:
        values = original(*arguments)
        evaluations.append((list(routes[-1]), values.clone()))
        return values

    evaluation.label_log_probs, Asr.inference_context = record_values, record_routes  # type: ignore[method-assign]
    try:
        run(document)
    finally:
        evaluation.label_log_probs, Asr.inference_context = original, inference_context  # type: ignore[method-assign]
    return evaluations


def test_nothing_is_forgotten_to_the_last_bit(ranks: Any, tasks: Path) -> None:
    """If a prompt has the same route after later tasks, its label log probabilities are bitwise the same."""
    names = NAMES[:3]
    evaluation, trainer = {"zero_shot": False, "batch": 64}, {"epochs": 1}
    never_base = {"router": {"ood_fallback": False}}
    document = recipe(tasks, "bits", 3, names, evaluate=evaluation, asr=never_base, train=trainer)
    compared = 0
    for evaluations in ranks(2)(run_and_record_likelihoods, document):
        assert len(evaluations) == len(names) ** 2
        for after, later in itertools.combinations(range(len(names)), 2):
            for task in range(after + 1):
                (routes, values), (later_routes, later_values) = (
                    evaluations[row * len(names) + task] for row in (after, later)
                )
                same = [i for i, (a, b) in enumerate(zip(routes, later_routes, strict=True)) if a == b]
                assert torch.equal(values[same], later_values[same])
                compared += len(same)
    assert compared > 20
    document = read_scores(tasks / "bits")
    right = document["routing_accuracy"]
    if all(right[i][j] == 1.0 for i in range(3) for j in range(i + 1)):
        assert document["summary"]["BWT"] == 0.0


def damage(run_dir: Path) -> None:
    path = run_dir / "router" / "animal.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    (run_dir / "scores.json").unlink()


def test_a_damaged_task_is_learnt_again_where_a_checkpoint_of_before_is_there(
    ranks: Any, undisturbed_run: Any, tasks: Path
) -> None:
    """If an artifact of an ended task is damaged, the run resumes from a checkpoint before that task's end."""
    intact = undisturbed_run(recipe(tasks, "intact", **EVALUATE_LAST), 1)
    document = recipe(tasks, "damaged", checkpoint={"every": 3, "keep": 99}, **EVALUATE_LAST)
    ranks(1)(run, document)
    damage(tasks / "damaged")
    assert artifact_checksums(tasks / "damaged") != artifact_checksums(intact)
    ranks(1)(run, document)
    assert artifact_checksums(tasks / "damaged") == artifact_checksums(intact)
    assert read_scores(tasks / "damaged")["complete"]


def test_without_a_whole_checkpoint_nothing_is_trained_anew_unasked(ranks: Any, tasks: Path) -> None:
    document = recipe(tasks, "lost", train={"epochs": 1}, **EVALUATE_LAST)
    ranks(2)(run, document)
    damage(tasks / "lost")
    for kind, message in ranks(2)(run_error, document):
        assert kind == "ExternalFailure"
        assert "router/animal.safetensors does not match its checksum" in message
        assert "restore that file, or remove the run's folder" in message


def test_a_ridge_that_fails_loses_nothing(ranks: Any, tasks: Path) -> None:
    """The task is saved before the router is fitted, and the resumed run may use another ridge."""

    def with_ridge(name: str, ridge: float) -> Any:
        asr = {"router": {"ridge": ridge}}
        return recipe(tasks, name, asr=asr, evaluate={"zero_shot": False}, train={"epochs": 1})

    document = with_ridge("ridge", 1e-18)
    for kind, message in ranks(2)(run_error, document):
        assert kind == "UserError"
        assert "give a larger ridge" in message
    assert len(list((tasks / "ridge" / "checkpoints").glob("*-learned"))) == 1
    ranks(2)(run, with_ridge("ridge", 0.1))
    ranks(2)(run, with_ridge("ridge-whole", 0.1))
    assert artifact_checksums(tasks / "ridge") == artifact_checksums(tasks / "ridge-whole")
    assert read_scores(tasks / "ridge") == read_scores(tasks / "ridge-whole")


def run_with_nan_state(document: dict[str, Any], at: int) -> None:
    """Run; the hidden state of the `at`-th batch at the feature layer is NaN in its first row."""
    original, calls = Routing.on_feature_layer, [0]

    def spoil_and_call(self: Routing, hidden: torch.Tensor) -> None:
        if self._choose_slots is None and self._spans:
            calls[0] += 1
            if calls[0] == at:
                hidden[0, -1] = float("nan")
                hidden[0] = float("nan")
        original(self, hidden)

    Routing.on_feature_layer = spoil_and_call  # type: ignore[method-assign]
    try:
        run(document)
    finally:
        Routing.on_feature_layer = original  # type: ignore[method-assign]


def test_a_prompt_whose_state_is_not_finite_does_not_count(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    finite = undisturbed_run(recipe(tasks, "intact", **EVALUATE_LAST), 1)
    ranks(1)(run_with_nan_state, recipe(tasks, "spoilt", train={"non_finite": "skip"}, **EVALUATE_LAST), 2)
    expected, fewer = router_statistics(finite), router_statistics(tasks / "spoilt")
    for task, num_missing in (("colour", 1), ("animal", 0)):
        assert int(expected[f"{task}: 0.count"]) - int(fewer[f"{task}: 0.count"]) == num_missing
        assert all(torch.isfinite(value).all() for value in fewer.values())


def paper_run(document: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run with the paper's settings but fewer features; the router's weights, and the states and labels of its fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ASR_PAPER_ROUTER, "num_features", 96)
        run(document)
        setup = build_setup(resolve_recipe(document))
        engine = setup.build_engine()
        assert isinstance(setup.method, Asr)
        setup.method.load_task_artifacts(
            resolve_recipe(document).run_folder, [task_data.task.name for task_data in setup.tasks]
        )
        solution = setup.method.task_router.router.get_fitted_router()
        targets = set(setup.method.bank.layers)
        assert targets == {f"model.layers.{i}.self_attn.{p}_proj" for i in (4, 5) for p in "qv"}
        module = engine.module.eval()
        states, labels = [], []
        for index, name in enumerate(solution.names):
            task_data = next(task_data for task_data in setup.tasks if task_data.task.name == name)
            for sample in range(len(task_data.dataset)):
                prompt = task_data.dataset[sample][0]
                with torch.no_grad():
                    hidden = module(torch.tensor([prompt]), output_hidden_states=True).hidden_states[4][0]
                states.append(hidden[1:].double().mean(0))  # without <s>
                labels.append(index)
        engine.close()
        return solution.weights, torch.stack(states), torch.tensor(labels)


def test_paper_preset_is_the_papers_equation(ranks: Any, tasks: Path) -> None:
    """W = (ΦᵀΦ + 100 I)⁻¹ ΦᵀY in fp64, from every prompt alone, unpadded; P is drawn from the seed."""
    evaluation, trainer = {"zero_shot": False, "every": 3}, {"epochs": 1}
    document = recipe(tasks, "paper", 0, NAMES[:3], evaluate=evaluation, train=trainer)
    document["model"]["shape"].update(num_hidden_layers=6)
    document["method"] = {"name": "asr", "paper_preset": True}
    for weights, states, labels in ranks(2)(paper_run, document):
        matrix = torch.randn(32, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        features = (states @ matrix).relu()
        gram = features.T @ features + 100.0 * torch.eye(96, dtype=torch.float64)
        onehot = torch.nn.functional.one_hot(labels, 3).double()
        expected = torch.linalg.solve(gram, features.T @ onehot)
        assert (weights - expected).norm() <= 1e-4 * expected.norm()
