"""The Kubernetes manifests: Kubeflow's own models read them, and know every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.training.checkpoint import CheckpointConfig
from tests.support.hosts import REPOSITORY

FOLDER = REPOSITORY / "launch" / "kubernetes"


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return document


@pytest.mark.parametrize(
    ("file", "model"),
    [("runtime.yaml", "TrainerV1alpha1ClusterTrainingRuntime"), ("trainjob.yaml", "TrainerV1alpha1TrainJob")],
)
def test_kubeflow_reads_all_of_it(file: str, model: str) -> None:
    """The models of the API ignore unknown keys, so the parsed document is serialized again and compared."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    document = read(file)
    assert getattr(models, model).from_dict(document).to_dict() == document


def test_the_two_fit_together_and_the_ranks_get_their_time() -> None:
    runtime, job = read("runtime.yaml"), read("trainjob.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > CheckpointConfig().grace
    (container,) = pod["containers"]
    assert Path(container["command"][0]).name == "torchrun.sh"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    actions = {
        value: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {2: "FailJob", 75: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
