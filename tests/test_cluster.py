"""docs/deployment.md's Kubernetes part, typed where kubectl reaches a cluster: ten minutes with images that are there.

    .venv/bin/pytest -n0 -m containers tests/test_cluster.py

The cluster is one node, this machine, and pulls from a registry at localhost:5000. It needs no GPU: the node is said to
have some, and the programs find none. Not here: several nodes, and what enforces network policies.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_compose import engine
from typed import Page, clone, typed

REGISTRY = "localhost:5000"
TAG = f"test-{int(time.time())}"  # an image that a node has by name is not pulled again
FIRST_POD = "app=student,batch.kubernetes.io/job-completion-index=0"  # where the others meet
CLAIMS = {"data": "200Gi", "runs": "50Gi"}


def cluster() -> bool:
    if not shutil.which("kubectl") or subprocess.run(["kubectl", "get", "nodes"], capture_output=True).returncode:
        return False
    try:
        return bool(urllib.request.urlopen(f"http://{REGISTRY}/v2/", timeout=5))
    except OSError:
        return False


pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not engine() or not cluster(), reason=f"needs a Docker engine, {REGISTRY}, a Kubernetes cluster"
    ),
]


def kubectl(*arguments: str, given: str | None = None) -> str:
    run = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def volumes(tmp_path) -> Iterator[dict[str, Path]]:
    """What a cluster's keepers bring: volumes for the claims, here folders of this machine, and GPUs."""
    folders = {name: tmp_path / "volumes" / name for name in CLAIMS}
    made = []
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        shutil.chown(folder, 1000, 1000)
        made.append({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"funmatch-{name}"},
            "spec": {
                "capacity": {"storage": CLAIMS[name]}, "accessModes": ["ReadWriteMany"],
                "hostPath": {"path": str(folder)}, "claimRef": {"namespace": "funmatch", "name": name},
            },
        })  # fmt: skip
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
    (node,) = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    if "nvidia.com/gpu" not in node["status"]["capacity"]:
        gpus = {"nvidia.com/gpu": "16"}
        patch = json.dumps({"status": {"capacity": gpus, "allocatable": gpus}})
        kubectl("patch", "node", node["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch)
    kubectl("delete", "namespace", "funmatch", "--ignore-not-found")
    kubectl("delete", "persistentvolume", *(f"funmatch-{name}" for name in CLAIMS), "--ignore-not-found")
    kubectl("apply", "-f", "-", given=listed)
    yield folders
    kubectl("delete", "namespace", "funmatch", "--ignore-not-found")
    kubectl("delete", "-f", "-", given=listed)
    images = [f"{REGISTRY}/funmatch-{name}:{TAG}" for name in ("teacher", "student")]
    subprocess.run(["docker", "image", "rm", *images], capture_output=True)


def choose(manifests: Path) -> None:
    """What a reader puts into the files: names, here of small things, and what these need."""
    small = {'cpu: "16", memory: 32Gi', 'cpu: "8", memory: 16Gi', 'cpu: "4", memory: 4Gi', 'cpu: "1", memory: 2Gi'}
    choices = {
        "kustomization.yaml": [("newTag: latest", f"newName: {REGISTRY}/funmatch-teacher, newTag: {TAG}")],
        "storage.yaml": [("  accessModes", "  storageClassName: ''\n  accessModes")],
        "prepare.yaml": [("[flowers102, ", "[digits, ")],
        "teacher.yaml": [("bit:R152x2_T_flowers128", "/runs/teacher/model.safetensors")],
        "student.yaml": [("flowers102/funmatch/10k", "digits/demo"), ("--nproc-per-node=gpu", "--nproc-per-node=1")],
        "shell.yaml": [],
    }
    for name, pairs in choices.items():
        text = (manifests / name).read_text()
        for written, chosen in pairs:
            assert written in text, f"{name} has no {written}"
            text = text.replace(written, chosen)
        for request in small:
            text = text.replace(request, "cpu: 100m, memory: 100Mi")
        text = text.replace("image: funmatch-student:latest", f"image: {REGISTRY}/funmatch-student:{TAG}")
        (manifests / name).write_text(text)


def student_at_step(least: int) -> None:
    """Waits until the student has come so far."""
    deadline = time.monotonic() + 600
    while True:
        said = subprocess.run(
            ["kubectl", "-n", "funmatch", "logs", "--tail=5", "-l", FIRST_POD], capture_output=True, text=True
        )
        steps = re.findall(r'"message": "step=(\d+) ', said.stdout)
        if steps and int(steps[-1]) >= least:
            return
        assert time.monotonic() < deadline, kubectl("-n", "funmatch", "get", "pods") + said.stdout + said.stderr
        time.sleep(0.5)


def test_a_fleet_and_a_student_on_kubernetes_live_through_what_a_cluster_does_to_them(tmp_path, volumes):
    folder = clone(tmp_path / "funmatch")
    choose(folder / "docker" / "k8s")
    page = Page(
        "docs/deployment.md",
        {"registry.example": REGISTRY, "-teacher:1": f"-teacher:{TAG}", "-student:1": f"-student:{TAG}"},
    )
    typed(page.take("^docker (build|push)", 4), folder, 3000)
    typed(page.take("^sh docker/make_keys.sh|namespace.yaml|create secret", 4), folder, 60)
    typed(page.take("prepare", 2), folder, 900)
    python, run_dir = sys.executable, volumes["runs"] / "teacher"
    typed(
        [
            f"{python} student_trainer/main.py --recipe digits/demo_teacher --data {volumes['data']}/flowers102"
            f" --run-dir {run_dir} --device cpu",
            f"chown -R 1000:1000 {volumes['runs']}",
        ],
        folder, 900,
    )  # fmt: skip
    typed(page.take("apply -k|rollout status", 2), folder, 900)
    typed(page.take("student.yaml|job/student", 2), folder, 900)

    student_at_step(30)
    kubectl("-n", "funmatch", "scale", "deployment/teacher", "--replicas=3")
    kubectl("-n", "funmatch", "rollout", "restart", "deployment/teacher")
    student_at_step(120)
    kubectl("-n", "funmatch", "delete", "pod", "-l", "app=student,batch.kubernetes.io/job-completion-index=1")
    student_at_step(200)
    kubectl("-n", "funmatch", "delete", "pod", "-l", FIRST_POD)
    student_at_step(220)

    typed(page.take("^kubectl .* logs", 1), folder, 1200)
    kubectl("-n", "funmatch", "wait", "--for=condition=complete", "--timeout=5m", "job/student")
    typed(page.take("shell", 5), folder, 900)
    left = [line for line in page.left if line.startswith(("kubectl", "docker build", "docker push"))]
    assert not left
    summary = json.loads((folder / "flowers102" / "summary.json").read_text())
    assert summary["view_mismatch_max"] == 0
    assert summary["student_top1"] > 0.9
    assert (folder / "flowers102" / "report.html").is_file()
