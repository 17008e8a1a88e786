"""What docker/ and the compose files say is true of the code: flags, recipes, metrics, files; and they are hardened."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import student_trainer.main as student_door
from student_trainer.exporter import Exporter
from student_trainer.recipes import RECIPES
from teacher_server.config import Config
from teacher_server.metrics import Metrics
from typed import Page

ROOT = Path(__file__).resolve().parents[1]
COMPOSE, CPU, NODES = (ROOT / f"docker-compose{kind}.yml" for kind in ("", ".cpu", ".nodes"))
ENV = ROOT / ".env.example"
KUBERNETES = ROOT / "docker" / "k8s"
NOT_MANIFESTS = {"kustomization.yaml", "prometheus-adapter.yaml"}
DRAIN_S = Config(model="x").drain_s + 5  # what teacher_server.main promises


def interpolated(path: Path) -> dict[str, Any]:
    """A compose file as compose reads it where no variable is set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text())
    return yaml.safe_load(text.replace("$$", "$"))


SERVICES = interpolated(COMPOSE)["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
MANIFESTS = [
    (path.name, manifest)
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name not in NOT_MANIFESTS
    for manifest in yaml.safe_load_all(path.read_text())
]
BY_NAME = {(manifest["kind"], manifest["metadata"]["name"]): manifest for _, manifest in MANIFESTS}


def teacher_config(args: list[str]) -> Config:
    return tyro.cli(Config, args=args)


def pod_of(kind: str, name: str) -> dict[str, Any]:
    spec = BY_NAME[kind, name]["spec"]
    return spec if kind == "Pod" else spec["template"]["spec"]


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text.removesuffix("s"))


# --- images


def test_the_two_images_begin_with_the_same_layers():
    heads = []
    for name in ("teacher", "student"):
        text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
        head, _, _ = text[text.index("\nFROM ") :].partition("# ----")
        heads.append(head)
    assert heads[0] == heads[1]
    assert "FROM python:3.11-slim-bookworm\n" in heads[0]
    assert "requirements.lock" in heads[0]


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_an_image_copies_only_what_the_build_is_given_and_runs_as_nobody_special(name):
    lines = (ROOT / "docker" / f"{name}.Dockerfile").read_text().splitlines()
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert copied <= given
    assert all((ROOT / source).exists() for source in copied)
    assert [line for line in lines if line.startswith("USER")] == ["USER funmatch"]
    assert not any(line.startswith("ENTRYPOINT") and not line.startswith("ENTRYPOINT [") for line in lines)


# --- compose


@pytest.mark.parametrize("command", [["docker-compose"], ["docker", "compose"]])
def test_compose_accepts_the_files(command):
    there = shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False)
    if not there or there.returncode:
        pytest.skip(f"no {' '.join(command)} on this machine")
    for files in ([COMPOSE], [COMPOSE, CPU], [COMPOSE, CPU, NODES]):
        chosen = [part for file in files for part in ("-f", str(file))]
        run = subprocess.run([*command, *chosen, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def test_the_teacher_has_every_flag_that_compose_gives_it():
    config = teacher_config(shlex.split(SERVICES["teacher"]["command"]))
    assert config.tls_cert and config.tls_key and config.token_file and not config.insecure
    assert seconds(SERVICES["teacher"]["stop_grace_period"].split()[0]) > DRAIN_S


def test_the_student_has_every_setting_that_compose_gives_it():
    script, *args = shlex.split(SERVICES["student"]["command"])
    assert (ROOT / script).exists()
    config, _ = student_door.parse(args)
    assert config.teacher.addresses == ("dns:///teacher:50051",)
    assert config.teacher.tls_ca and config.teacher.token_file
    assert SERVICES["teacher-weights"]["environment"]["TEACHER_RECIPE"] in RECIPES


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_can_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service)
    assert service.get("user", "") not in ("root", "0")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "only the loopback"


def test_teachers_can_be_many():
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["teacher"])


def test_the_authority_s_key_is_seen_by_nobody_who_serves_or_learns():
    sees = {name: " ".join(SERVICES[name].get("volumes", [])) for name in OURS}
    assert [name for name in OURS if "/keys/authority" in sees[name]] == ["keys"]
    assert "student-keys" not in sees["teacher"]
    assert "teacher-keys" not in sees["student"]


def test_without_gpus_no_service_wants_nvidia_s_runtime_or_claims_a_gpu():
    override = interpolated(CPU)["services"]
    for name, service in SERVICES.items():
        wants = override.get(name, {}).get("runtime", service.get("runtime"))
        assert wants != "nvidia", name
    assert override["teacher"]["environment"]["FUNMATCH_CLAIM_GPU"] == ""
    assert SERVICES["teacher"]["environment"]["FUNMATCH_CLAIM_GPU"] == "/locks"
    assert "gpu-locks:/locks" in SERVICES["teacher"]["volumes"]


def test_the_example_of_settings_names_each_variable_with_its_default():
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text() + CPU.read_text() + NODES.read_text()))
    lines = [line for line in ENV.read_text().splitlines() if line and not line.startswith("#")]
    assert dict(line.split("=", 1) for line in lines) == used


# --- monitoring


def offered() -> set[str]:
    """The names of all series that a teacher and a student offer."""
    metrics = Metrics()
    metrics.loaded(
        model="m", fingerprint="f", precision="p", batch_rows=8, queue_rows=lambda: 0, queue_clients=lambda: 0,
        gpu_memory={"allocated": lambda: 0},
    )  # fmt: skip
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    line = dict.fromkeys(("loss", "images_per_s", "teacher_wait_s", "data_wait_s", "view_mismatch"), 1.0)
    with Exporter("127.0.0.1:0", 0, []) as exporter:
        exporter.step(1, line)
        for family in exporter.collect():
            names |= {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
    return names


DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "funmatch.json").read_text())


def lost_on(way: str, written: Any, read: Any) -> list[str]:
    """Where something that was read and written again is not what it was."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [where for name in written for where in lost_on(f"{way}.{name}", written[name], read.get(name))]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [where for number, both in enumerate(zip(written, read, strict=True))
                for where in lost_on(f"{way}[{number}]", *both)]  # fmt: skip
    return [] if written == read else [way]


def through_grafana(dashboard: dict[str, Any]) -> dict[str, Any]:
    """Read into Grafana's own types of a dashboard, and written again."""
    plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_grafana_knows_every_field_of_the_dashboard():
    assert lost_on("", DASHBOARD, through_grafana(DASHBOARD)) == []
    wrong = {**DASHBOARD, "panels": [{**DASHBOARD["panels"][1], "gridpos": {}}], "titel": "funmatch"}
    assert lost_on("", wrong, through_grafana(wrong)) == [".panels[0].gridpos", ".titel"]


def test_dashboard_and_autoscaler_ask_only_for_what_there_is():
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    adapter = (KUBERNETES / "prometheus-adapter.yaml").read_text()
    made = yaml.safe_load(adapter)["rules"]["custom"][0]
    names = set(re.findall(r"funmatch_\w+", " ".join([*asked, made["seriesQuery"], made["metricsQuery"]])))
    assert len(names) > 20
    assert not names - offered()
    scaler = BY_NAME["HorizontalPodAutoscaler", "teacher"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert scaler == made["name"]["as"]


def test_prometheus_asks_at_the_ports_where_they_listen():
    teacher = teacher_config(shlex.split(SERVICES["teacher"]["command"]))
    student, _ = student_door.parse(shlex.split(SERVICES["student"]["command"])[1:])
    wanted = {"teacher": teacher.metrics_address, "student": student.metrics_address}
    for job in yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"]:
        (where,) = job["dns_sd_configs"]
        assert where["names"] == [job["job_name"]]
        assert wanted.pop(job["job_name"]) == f"0.0.0.0:{where['port']}"
    assert not wanted


# --- Kubernetes


@pytest.mark.parametrize(("file", "manifest"), MANIFESTS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_manifest_follows_kubernetes_own_schema(file, manifest):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_kustomization_names_files_that_are_there():
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert set(listed) | {"prepare.yaml", "student.yaml", "shell.yaml"} == {file for file, _ in MANIFESTS}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_builds_the_kustomization_and_makes_the_secrets_that_pods_mount(keys, tmp_path):
    """Without a cluster: what would be sent to it."""

    def kubectl(*arguments: str) -> list[dict[str, Any]]:
        run = subprocess.run(["kubectl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return list(yaml.safe_load_all(run.stdout))

    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    built = kubectl("kustomize", str(KUBERNETES))
    expected = [(manifest["kind"], manifest["metadata"]["name"]) for file, manifest in MANIFESTS if file in listed]
    assert sorted((one["kind"], one["metadata"]["name"]) for one in built) == sorted(expected)
    assert {one["metadata"]["namespace"] for one in built if one["kind"] != "Namespace"} == {"funmatch"}

    (tmp_path / "keys").symlink_to(keys)
    typed = Page("docs/deployment.md", {}).take("^kubectl -n funmatch create secret", 2)
    made = [kubectl(*shlex.split(line)[1:], "--dry-run=client", "-o", "yaml")[0] for line in typed]
    files = {secret["metadata"]["name"]: set(secret["data"]) for secret in made}
    for kind, name in (("Deployment", "teacher"), ("Job", "student")):
        pod = pod_of(kind, name)
        (secret,) = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        container = pod["containers"][0]
        (folder,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "keys"]
        assert files[secret] == set(re.findall(rf"{folder}/([\w.]+)", json.dumps(container)))  # by flags and by probes


def test_the_teacher_has_every_flag_that_its_pods_give_it():
    pod = pod_of("Deployment", "teacher")
    container = pod["containers"][0]
    config = teacher_config(container["args"])
    assert config.tls_cert and config.tls_key and config.token_file and not config.insecure
    pre_stop_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + DRAIN_S


def test_the_student_has_every_setting_that_its_pods_give_it():
    args = pod_of("Job", "student")["containers"][0]["args"]
    first = args.index("student_trainer/main.py")
    config, _ = student_door.parse(args[first + 1 :])
    (entry,) = config.teacher.addresses
    _, name, port = re.split(r"dns:///|:(?=\d+$)", entry)
    assert int(port) in [entry["port"] for entry in BY_NAME["Service", name]["spec"]["ports"]]
    pod = pod_of("Job", "student")
    assert f"--rdzv-endpoint=student-0.{pod['subdomain']}.$(NAMESPACE).svc.cluster.local:29500" in args
    assert f"--nnodes={BY_NAME['Job', 'student']['spec']['completions']}" in args
    assert BY_NAME["Service", pod["subdomain"]]["spec"]["publishNotReadyAddresses"]


@pytest.mark.parametrize(
    ("kind", "name"), [("Deployment", "teacher"), ("Job", "student"), ("Job", "prepare"), ("Pod", "shell")]
)
def test_a_pod_can_do_no_more_than_it_must(kind, name):
    pod = pod_of(kind, name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_headless_service_selects_its_pods(name):
    service = BY_NAME["Service", name]["spec"]
    assert service["clusterIP"] == "None"
    kind = "Deployment" if name == "teacher" else "Job"
    labels = BY_NAME[kind, name]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
