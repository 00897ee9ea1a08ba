"""The real parts that the demo starts: Ray, a SuperLink, a SuperNode for every owner, the coordinator, the service."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from lorafleet.coordinator.launch import toml_string
from lorafleet.demo.corpora import Corpora
from lorafleet.demo.processes import Processes, wait_for_line, wait_for_port
from lorafleet.demo.settings import TENANT, DemoSettings
from lorafleet.flower_commands import environment as flower_environment
from lorafleet.flower_commands import free_port, script

# Ray's default object store is 30 % of the memory; the demo's updates take a few megabytes.
OBJECT_STORE_BYTES = 200 * 2**20
# The service's default is what its 64 sequences could fill, 200 MB; the tenants here ask for a few lines at a time.
KV_TOKENS = 8192


class Ray:
    """A Ray of this run's own, which lives as long as this object and is joined by address."""

    def __init__(self, cpus: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        # A short path of its own: Ray's sockets live there, and a socket's path has at most 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="lf-ray-", ignore_cleanup_errors=True)
        context = ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._folder.name,
            # Loopback alone: whoever reaches Ray's ports can run code here.
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
        )
        self.address = str(context.address_info["gcs_address"])

    def stop(self) -> None:
        self._ray.shutdown()
        self._folder.cleanup()


def environment(home: Path, threads: int) -> dict[str, str]:
    """For every child: Flower offline, and as many threads as its share of the cores."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        **flower_environment(home),
        "OMP_NUM_THREADS": str(threads),
        # Many processes share the cores: a thread that spins at a barrier takes them from the others.
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives each thread a heap of its own, eight a core, and keeps what was freed there; two dozen processes.
        "MALLOC_ARENA_MAX": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }


def federation_toml(
    settings: DemoSettings, corpora: Corpora, *, registry: str, blobs: Path, ray: str, superlink: str
) -> str:
    """The file that ``lorafleet coordinator run`` takes; a real federation's looks the same."""
    agreed = settings.federation()
    training = agreed.training
    members = "\n".join(f"{toml_string(owner.name)} = {toml_string(owner.name)}" for owner in corpora.owners)
    return f"""# Written by the demo. `lorafleet coordinator run THIS_FILE` runs the federation on a SuperLink.
[federation]
tenant = {toml_string(TENANT)}
name = {toml_string(agreed.name)}
base = {toml_string(agreed.base)}
rounds = {agreed.rounds}
rule = {toml_string(agreed.rule)}
scheduler = {toml_string(agreed.scheduler)}
quorum = {agreed.quorum}
deadline_s = {agreed.deadline_s}
at_once = {agreed.at_once}
evaluate_last = {str(agreed.evaluate_last).lower()}
expert_rank = {agreed.expert_rank}
seed = {agreed.seed}

[training]
steps = {training.steps}
batch_size = {training.batch_size}
sequence_length = {training.sequence_length}
learning_rate = {training.learning_rate}

[coordinator]
registry = {toml_string(registry)}
blobs = {toml_string(str(blobs))}
ray_address = {toml_string(ray)}
superlink = {toml_string(superlink)}

# Member key = tenant
[members]
{members}
"""


def start_superlink(processes: Processes, child_environment: dict[str, str]) -> str:
    """A SuperLink on a free port of loopback; returns its address."""
    port = free_port()
    command = [script("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    process = processes.start("superlink", command, environment=child_environment)
    wait_for_port(port, process, "superlink", processes.log("superlink"))
    return f"127.0.0.1:{port}"


def start_supernodes(
    processes: Processes, superlink: str, settings: DemoSettings, corpora: Corpora, child_environment: dict[str, str]
) -> None:
    """One ``lorafleet client join`` an owner, with its own data, at its own rank."""
    for owner, rank in zip(corpora.owners, settings.ranks, strict=True):
        command = [
            script("lorafleet"), "client", "join", "--superlink", superlink, "--data", str(owner.folder),
            "--member", owner.name, "--rank", str(rank), "--base", settings.base, "--insecure",
            "--state", str(corpora.folder.with_name("members") / owner.name), "--no-probe",
        ]  # fmt: skip
        processes.start(f"supernode-{owner.name}", command, environment=child_environment)


def start_coordinator(
    processes: Processes, federation: Path, child_environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    command = [script("lorafleet"), "coordinator", "run", str(federation)]
    return processes.start("coordinator", command, environment=child_environment, may_end=True)


def start_service(
    processes: Processes,
    settings: DemoSettings,
    *,
    registry: str,
    blobs: Path,
    child_environment: dict[str, str],
    threads: int,
) -> subprocess.Popen[bytes]:
    """``lorafleet serve`` on a free port, which :func:`service_address` waits for."""
    command = [
        script("lorafleet"), "serve", "--base", settings.base, "--registry", registry, "--blobs", str(blobs),
        "--grpc", "127.0.0.1:0", "--http", "", "--dtype", "float32", "--threads", str(threads),
        "--kv-tokens", str(KV_TOKENS),
    ]  # fmt: skip
    return processes.start("service", command, environment=child_environment)


def service_address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the service prints once it listens; UnavailableError with its log's end where it does not."""
    return wait_for_line(log, r"listening grpc=(\S+:\d+)", process, "service")[1]
