"""examples/kubernetes, without a cluster: manifests of the right shape, and their commands with stand-ins."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
PATIENCE = 300.0  # seconds; a busy machine starts processes slowly
# fields of the Kubernetes API (batch/v1, core/v1), the ones that the manifests use and their neighbours
FIELDS: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy", "template",
             "activeDeadlineSeconds", "ttlSecondsAfterFinished", "suspend"},
    "spec.podFailurePolicy": {"rules"},
    "spec.podFailurePolicy.rules": {"action", "onPodConditions", "onExitCodes"},
    "spec.podFailurePolicy.rules.onExitCodes": {"containerName", "operator", "values"},
    "spec.podFailurePolicy.rules.onPodConditions": {"type", "status"},
    "spec.template": {"metadata", "spec"},
    "spec.template.spec": {"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "tolerations",
                           "containers", "volumes", "serviceAccountName"},
    "spec.template.spec.tolerations": {"key", "operator", "value", "effect"},
    "spec.template.spec.containers": {"name", "image", "command", "args", "env", "resources", "volumeMounts"},
    "spec.template.spec.containers.env": {"name", "value", "valueFrom"},
    "spec.template.spec.containers.resources": {"requests", "limits"},
    "spec.template.spec.containers.volumeMounts": {"name", "mountPath", "readOnly"},
    "spec.template.spec.volumes": {"name", "persistentVolumeClaim", "emptyDir"},
    "spec.template.spec.volumes.persistentVolumeClaim": {"claimName", "readOnly"},
    "spec.template.spec.volumes.emptyDir": {"medium", "sizeLimit"},
}  # fmt: skip
FREE = ("metadata", "spec.template.spec.nodeSelector", "spec.template.spec.containers.resources.requests",
        "spec.template.spec.containers.resources.limits")  # fmt: skip


def manifest(name: str) -> dict[str, Any]:
    """A manifest as submit.sh sends it for iteration 3 of /data/run."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for key, value in {"RUN": "/data/run", "ITERATION": "3", "IMAGE": "rushes:1"}.items():
        text = text.replace(f"@{key}@", value)
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def unknown(value: Any, path: str = "") -> list[str]:
    """Fields that the API does not have."""
    if path in FREE:
        return []
    if isinstance(value, list):
        return [name for one in value for name in unknown(one, path)]
    if not isinstance(value, dict):
        return []
    inner = {name: f"{path}.{name}".lstrip(".") for name in value}
    wrong = [inner[name] for name in value if name not in FIELDS[path]]
    return wrong + [one for name, below in value.items() if name in FIELDS[path] for one in unknown(below, inner[name])]


@pytest.mark.parametrize("name", ["sample", "train"])
def test_a_manifest_has_the_shape_of_a_job(name: str) -> None:
    job = manifest(name)
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", f"rushes-{name}-3")
    assert unknown(job) == []
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what the API asks for beside a podFailurePolicy
    for rule in spec["podFailurePolicy"]["rules"]:
        assert len(rule) == 2  # an action and one condition
        assert rule["action"] in ("Ignore", "FailJob", "Count", "FailIndex")
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(one["value"], str) for one in container["env"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if name == "sample":
        assert spec["completionMode"] == "Indexed"
        assert f"$JOB_COMPLETION_INDEX/{spec['completions']} " in container["args"][0]
        assert gpus == 1
    else:
        assert {one["name"]: one["value"] for one in container["env"]}["GPUS"] == str(gpus)


def test_an_unknown_field_is_seen() -> None:
    job = manifest("sample")
    job["spec"]["template"]["spec"]["toleration"] = []
    assert unknown(job) == ["spec.template.spec.toleration"]


RUSHES = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
[ "$1" != --standalone ] || while [ "$1" != --no-python ]; do shift; done
trap 'exit 75' TERM
if [ "${WAIT:-}" = "$1" ] || [ "${WAIT:-}" = "${3:-}" ]; then touch "$CALLS.ready"; while :; do sleep 0.02; done; fi
[ "$1" != "${FAIL%%:*}" ] || exit "${FAIL##*:}"
"""


def pod(name: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The command of a manifest, with a `rushes` and a `torchrun` that only note what they are asked."""
    (folder / "bin").mkdir(exist_ok=True)
    for program in ("rushes", "torchrun"):
        (folder / "bin" / program).write_text(RUSHES)
        (folder / "bin" / program).chmod(0o755)
    (container,) = manifest(name)["spec"]["template"]["spec"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "5", "FAIL": ":0"}
    variables |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder / "calls")} | environment
    command = [*container["command"], *container["args"]]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(folder: Path) -> list[str]:
    """What was asked of the stand-ins."""
    return (folder / "calls").read_text().splitlines()


ROLLOUT = "rollout /data/run --iteration 3 --worker 5/8 --wait"
SCORE = "score /data/run --iteration 3 --worker 5/8 --wait"


@pytest.mark.parametrize(("code", "given", "expected"), [(0, 0, 2), (3, 0, 2), (75, 75, 1), (2, 2, 1), (1, 1, 1)])
def test_a_pod_samples_and_scores_its_part(code: int, given: int, expected: int, tmp_path: Path) -> None:
    process = pod("sample", tmp_path, FAIL=f"rollout:{code}")
    assert process.wait() == given, process.communicate()
    assert calls(tmp_path) == [ROLLOUT, SCORE][:expected]


@pytest.mark.parametrize(("name", "held"), [("sample", "rollout"), ("sample", "score"), ("train", "--no-python")])
def test_a_pod_that_is_evicted_asks_for_another_one(name: str, held: str, tmp_path: Path) -> None:
    process = pod(name, tmp_path, WAIT=held)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "calls.ready").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 75, process.communicate()


def test_a_pod_trains_on_its_gpus(tmp_path: Path) -> None:
    process = pod("train", tmp_path)
    assert process.wait() == 0, process.communicate()
    (asked,) = calls(tmp_path)
    assert asked.startswith("--standalone --nproc-per-node 8 ")
    assert asked.endswith(" --no-python rushes loop /data/run --iterations 4")


KUBECTL = """#!/usr/bin/env bash
echo "$1 ${3:-}" >> "$CALLS"
case $1 in
  apply) cat >> "$CALLS.yaml"; echo "---" >> "$CALLS.yaml" ;;
  get) [ "$3" != "${FAILS:-}" ] || { echo -n Failed; exit; }
    [ ! -e "$CALLS.$3" ] || echo -n SuccessCriteriaMet Complete  # not at the first look
    touch "$CALLS.$3" ;;
esac
"""


@pytest.mark.parametrize("fails", ["", "rushes-train-1"])
def test_iterations_are_queued_one_after_another(fails: str, tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "CALLS": str(tmp_path / "calls"), "FAILS": fails, "PAUSE": "0"}
    environment |= {"KUBECTL": str(tmp_path / "kubectl"), "IMAGE": "registry/rushes:1"}
    command = ["bash", str(FOLDER / "submit.sh"), "s3://bucket/run", "1", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    applied = [*yaml.safe_load_all((tmp_path / "calls.yaml").read_text())][:-1]
    names = [job["metadata"]["name"] for job in applied]
    assert applied[0]["spec"]["template"]["spec"]["containers"][0]["env"][0] == {
        "name": "RUN", "value": "s3://bucket/run"
    }  # fmt: skip
    if fails:
        assert result.returncode == 1
        assert "rushes-train-1 failed" in result.stderr
        assert names == ["rushes-sample-1", "rushes-train-1"]
    else:
        assert result.returncode == 0, result.stderr
        assert names == ["rushes-sample-1", "rushes-train-1", "rushes-sample-2", "rushes-train-2"]
