"""The manifests of a training job keep to its recipe."""

from pathlib import Path

from deploy.kubernetes.check import check
from manylora_registry.config import load_config
from manylora_trainer.recipe import Recipe
from tests.unit.kubernetes.conftest import Resources, only


def test_every_resource_is_what_its_schema_says(training: Resources) -> None:
    assert [problem for resource in training for problem in check(resource)] == []


def test_there_is_a_pod_for_each_worker_of_the_recipe(training: Resources, tmp_path: Path) -> None:
    job = only(training, "RayJob")
    file = tmp_path / "recipe.yaml"
    file.write_text(only(training, "ConfigMap", "manylora-recipe")["data"]["recipe.yaml"])
    recipe = load_config(file, Recipe)
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == recipe.workers.count
    [container] = group["template"]["spec"]["containers"]
    assert recipe.workers.cpus <= int(container["resources"]["limits"]["cpu"])
    # Of Ray's own finding, as the job runs in the cluster that it is to use.
    assert recipe.workers.address is None


def test_an_attempt_goes_on_where_the_last_one_ended(training: Resources) -> None:
    spec = only(training, "RayJob")["spec"]
    assert spec["backoffLimit"] > 0
    train, _, publish = spec["entrypoint"].partition(" && ")
    assert "manylora train /etc/manylora/recipe.yaml --run-dir /runs/$RUN --resume" in train
    assert publish.strip() == "manylora publish /runs/$RUN"
