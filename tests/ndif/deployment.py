"""A deployment of NDIF on this machine, CPU and loopback only: made, started, hurt and stopped.

    python -m tests.ndif.deployment up|down|status|hub [--model org/name ...] [--port N]

Redis, an S3 of moto's, Ray, NDIF's controller and API, and a model actor (`actor.py`) for each model; the hub is `hub.py`. All of
it lies in `.ndif/` (INTERP_NDIF_WORK), the server's environment in `.ndif/venv` (INTERP_NDIF_VENV), what runs in `state.json`.
Processes are stopped by the sessions that were started here, never by name. Ports: seven from 18080 on (`--port`,
INTERP_NDIF_PORT), and Ray's own. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: What is deployed: a tiny random model, and the bundled real one.
TINY, REAL = "interp-tests/tiny", "interp-tests/smollm2-135m"
SERVICES = ("api", "ray", "s3", "redis", "hub")
#: Ports, counted from the first.
HUB, REDIS, S3, CLIENT, HEAD, DASHBOARD, API = range(7)
TORCH, NDIF = "torch==2.13.0", "ndif==0.1.2"
BOOT = Path("/proc/sys/kernel/random/boot_id")
#: What of the caller's environment the server is not told: it has a hub, and needs no key.
WITHHELD = {
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "NDIF_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_ADDRESS",
}


class DeploymentError(Exception):
    """It cannot be made or started; says what is missing, or what the log says."""


class Deployment:
    """One deployment, up or not."""

    def __init__(self, port: int | None = None) -> None:
        self.work = Path(os.environ.get("INTERP_NDIF_WORK", ROOT / ".ndif")).absolute()
        self.venv = Path(os.environ.get("INTERP_NDIF_VENV", self.work / "venv")).absolute()
        self.logs, self.models, self.runs = self.work / "logs", self.work / "models", self.work / "runs.txt"
        self.first = int(port or os.environ.get("INTERP_NDIF_PORT") or self.state().get("port", 18080))

    def state(self) -> dict[str, Any]:
        """What runs: the first port, Ray's folder, and pid and birth of each service; nothing after a reboot."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.work / "state.json").read_text())
            if state["boot"] == BOOT.read_text():
                return state
        return {}

    def note(self, **changes: Any) -> None:
        """Add to the state."""
        file = self.work / "state.json"
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"boot": BOOT.read_text(), "port": self.first, **self.state(), **changes}, indent=1))
        new.replace(file)

    def services(self) -> dict[str, list[int]]:
        """Pid and birth of every service that was started and not stopped."""
        return self.state().get("services", {})

    def port(self, which: int) -> int:
        return self.first + which

    @property
    def host(self) -> str:
        """The address of the API."""
        return f"http://127.0.0.1:{self.port(API)}"

    @property
    def hub(self) -> str:
        """The address of the hub, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port(HUB)}"

    # made

    def make(self) -> None:
        """The server's environment, and the models; what is there is kept."""
        if shutil.which("redis-server") is None:
            raise DeploymentError("redis-server is missing: apt-get install redis-server")
        if not (self.venv / "bin" / "ndif").exists():  # what is installed last
            print(f"making the server's environment in {self.venv} (1.2 GB, some minutes)", flush=True)
            pip = [str(self.venv / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            for command in (
                [sys.executable, "-m", "venv", str(self.venv)],  # interp's own Python: 3.11 or newer
                [*pip, TORCH],
                [*pip, "-r", str(HERE / "requirements.txt")],
                [*pip, "--no-deps", "--ignore-requires-python", NDIF],
            ):
                if subprocess.run(command, check=False).returncode:
                    raise DeploymentError(f"the server's environment could not be made: {' '.join(command)}")
        self.folder(TINY, make_tiny)
        self.folder(REAL, copy_real)

    def folder(self, model: str, make: Callable[[Path], object]) -> None:
        """A model's folder, made in one step: half a folder is never taken for one."""
        if not (self.models / model).exists():
            (self.models / model).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.models) as half:
                make(Path(half) / "made")
                (Path(half) / "made").rename(self.models / model)

    # started

    def environment(self) -> dict[str, str]:
        """What every service is told; the caller's settings (NDIF_*) stand before ours, addresses do not."""
        url = "http://127.0.0.1"
        ours = {
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "actor.CPUActor", "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0", "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "120",
        }  # fmt: skip
        return {
            **ours, **{name: value for name, value in os.environ.items() if name not in WITHHELD},
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1",
            "HF_ENDPOINT": self.hub, "HF_HOME": str(self.work / "hub"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.port(REDIS)}",
            "NDIF_OBJECT_STORE_URL": f"{url}:{self.port(S3)}", "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.port(CLIENT)}",
            "NDIF_API_PORT": str(self.port(API)), "NDIF_API_URL": self.host, "NDIF_HOME": str(self.work / "home"),
            "NDIF_HOST": f"{url}:1",  # a server that asks a server finds none
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
            "RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0", "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else it takes 127.0.0.1 for the machine's address, and listens there
            "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2", "INTERP_NDIF_RUNS": str(self.runs),
        }  # fmt: skip

    def spawn(self, name: str, *command: str, **environment: str) -> None:
        """Start a service in a session of its own."""
        self.logs.mkdir(parents=True, exist_ok=True)
        told = self.environment() | environment
        if name == "ray":
            told.pop("CUDA_VISIBLE_DEVICES")  # it counts GPUs by it
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=told,
                cwd=self.logs,
                start_new_session=True,
            )
        self.note(services={**self.services(), name: [process.pid, birth(process.pid)]})

    def wait(self, what: str, ready: Callable[[], object], seconds: float = 240) -> None:
        """Wait until something answers, as long as all that was started lives."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ready():
                    return
            for name, (pid, born) in self.services().items():
                if birth(pid) != born:
                    raise DeploymentError(f"{name} ended; {self.tail(name)}")
            if time.monotonic() > until:
                raise DeploymentError(f"{what} was not there after {seconds:.0f} s; {self.tail(what)}")
            time.sleep(0.2)

    def tail(self, name: str) -> str:
        """The end of a service's log."""
        file = self.logs / f"{name}.log"
        lines = file.read_text(errors="replace").splitlines()[-20:] if file.exists() else []
        return "\n".join([f"the end of {file}:", *lines])

    def up(self, *models: str) -> None:
        """Make what is missing, start all, deploy the models (both, unless some are named)."""
        self.make()
        for model in models:
            if not (self.models / model / "config.json").exists():
                raise DeploymentError(f"no model {model}: put what save_pretrained writes into {self.models / model}")
        if self.is_up():
            self.deploy(*models)
            return
        began = time.monotonic()
        self.down()
        try:
            self.start()
            self.deploy(*models or (TINY, REAL))
        except BaseException:
            self.down()  # the logs stay
            raise
        print(f"up after {time.monotonic() - began:.0f} s: {self.host}, hub {self.hub}", flush=True)

    def deploy(self, *models: str) -> None:
        """Have a model's actor made; what is deployed stays so."""
        for model in models:
            self.run("deploy", "ndif", "deploy", model, "--task", "text-generation", "--pinned", "--redis-url",
                     f"redis://127.0.0.1:{self.port(REDIS)}")  # fmt: skip

    def start(self) -> None:
        """Start all services, in the order in which they need each other."""
        for which in range(7):
            with contextlib.suppress(OSError):
                if listens(self.port(which)):
                    raise DeploymentError(
                        f"port {self.port(which)} is taken: choose seven others, --port or INTERP_NDIF_PORT"
                    )
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.runs.write_text("")
        self.spawn("hub", sys.executable, str(HERE / "hub.py"), str(self.models), str(self.port(HUB)))
        self.spawn("redis", "redis-server", "--port", str(self.port(REDIS)), "--bind", "127.0.0.1", "--save", "",
                   "--appendonly", "no")  # fmt: skip
        self.spawn("s3", "moto_server", "-H", "127.0.0.1", "-p", str(self.port(S3)))
        self.wait("hub", lambda: listens(self.port(HUB)))
        self.wait("redis", lambda: listens(self.port(REDIS)))
        self.wait("s3", lambda: listens(self.port(S3)))
        ray = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets lie there, whose paths must be short
        self.note(ray=ray)
        pretended = {"head": 10, "cuda_memory_bytes": 8e9, "cpu_memory_bytes": 8e9}
        self.spawn(
            "ray", "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={self.port(HEAD)}",
            f"--ray-client-server-port={self.port(CLIENT)}", "--num-cpus=4", "--num-gpus=1",
            f"--resources={json.dumps({name: int(size) for name, size in pretended.items()})}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.port(DASHBOARD)}", "--min-worker-port=21000",
            "--max-worker-port=21999", "--object-store-memory=200000000", f"--temp-dir={ray}",
            "--disable-usage-stats",
        )  # fmt: skip
        self.wait(
            "ray",
            lambda: fetched(f"http://127.0.0.1:{self.port(DASHBOARD)}/api/version") and listens(self.port(CLIENT)),
        )
        self.run("controller", "python", "-m", "ndif.services.ray.deployments.controller.controller",
                 RAY_ADDRESS=f"127.0.0.1:{self.port(HEAD)}")  # fmt: skip
        self.start_api()

    def run(self, name: str, *command: str, **environment: str) -> None:
        """Run something of the server's to its end."""
        with (self.logs / f"{name}.log").open("ab") as log:
            try:
                subprocess.run(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment() | environment,
                    cwd=self.logs, timeout=600, check=True,
                )  # fmt: skip
            except subprocess.SubprocessError:
                raise DeploymentError(f"{name} failed, or took more than 600 s; {self.tail(name)}") from None

    def start_api(self, **environment: str) -> None:
        """Start the API and its dispatcher, with settings of their own (NDIF_MIN_NNSIGHT_VERSION="99.0")."""
        if self.session("api"):
            raise DeploymentError("the API runs: kill_api first")
        settings = self.logs / "nnsight.yaml"
        settings.write_text("APP: {PYMOUNT: false}\n")  # what it mounts on every object breaks newer anyio
        at = f"127.0.0.1:{self.port(API)}"
        self.spawn("api", "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf", "--bind", at,
                   "ndif.services.api.app:app", NNSIGHT_CONFIG=str(settings), **environment)  # fmt: skip
        self.wait("api", lambda: fetched(f"{self.host}/connected"))

    # asked

    def is_up(self) -> bool:
        """Whether it takes requests: what was started from this work folder, at these ports."""
        if not all(self.session(name) for name in SERVICES) or self.state()["port"] != self.first:
            return False
        with contextlib.suppress(OSError, http.client.HTTPException):
            return fetched(f"{self.host}/connected")
        return False

    def executed(self, what: str = "ended") -> Counter[str]:
        """How often each request was run: to its end, or `what="began"`."""
        lines = [line.split() for line in self.runs.read_text().splitlines()] if self.runs.exists() else []
        return Counter(line[0] for line in lines if line[1] == what)

    # hurt

    def actors(self) -> list[int]:
        """The processes of the model actors, of the Ray that was started here."""
        found = []
        for pid in self.session("ray"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::CPUActor"):
                    found.append(pid)
        return found

    def kill_actor(self) -> int:
        """SIGKILL to every model actor; how many there were."""
        pids = self.actors()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def kill_api(self) -> None:
        """SIGKILL to the API and its dispatcher."""
        self.signal("api", signal.SIGKILL)
        while self.session("api"):  # also what was forked meanwhile; the port is free behind it
            time.sleep(0.05)
            self.signal("api", signal.SIGKILL)
        self.note(services={name: said for name, said in self.services().items() if name != "api"})

    def session(self, name: str) -> list[int]:
        """The processes of the session that a service was started in."""
        pid, born = self.services().get(name, (0, 0))
        if not pid or birth(pid) not in (born, None):  # never started, or the number is another process's by now
            return []
        return [other for other in numbers() if session_of(other) == pid]

    def signal(self, name: str, sign: int) -> None:
        """A signal to every process of a service."""
        for pid in self.session(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)

    def down(self) -> None:
        """Stop all that was started here."""
        for sign, seconds in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
            until = time.monotonic() + seconds
            for name in SERVICES:
                self.signal(name, sign)
            while any(self.session(name) for name in SERVICES) and time.monotonic() < until:
                time.sleep(0.2)
        if left := [pid for name in SERVICES for pid in self.session(name)]:
            raise DeploymentError(f"processes that do not end: {left}")
        if folder := self.state().get("ray"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.work / "state.json").unlink(missing_ok=True)


def copy_real(folder: Path) -> None:
    """The bundled model's files."""
    from interp.models.bundled import ensure_bundled

    shutil.copytree(ensure_bundled("smollm2-135m"), folder)


def make_tiny(folder: Path) -> None:
    """A random model of four layers with grouped queries, and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, **{f"w{number}": number for number in range(1, 128)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)


def numbers() -> list[int]:
    """The processes of this machine."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def facts(pid: int) -> list[str] | None:
    """What Linux says of a process from its third field (its state) on; None for one that is gone or a zombie."""
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return found if found[0] != "Z" else None
    return None


def session_of(pid: int) -> int | None:
    """A process's session."""
    return int(found[3]) if (found := facts(pid)) else None


def birth(pid: int) -> int | None:
    """When a service began, in ticks since the boot: with its number, a name that no other process has."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # one that we started and that ended is not kept as a zombie
    return int(found[19]) if (found := facts(pid)) else None


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def fetched(url: str) -> bool:
    """Whether an address gives something; OSError where it does not. Never through a proxy."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=70) as answer:
        return answer.status == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=["up", "down", "status", "hub"], help="hub: its address, for HF_ENDPOINT")
    parser.add_argument("--model", nargs="+", action="extend", default=[], help="what to deploy (both, unless named)")
    parser.add_argument("--port", type=int, help="the first of seven ports")
    options = parser.parse_args()
    deployment = Deployment(options.port)
    if options.word == "up":
        deployment.up(*options.model)
        print(f"export HF_ENDPOINT={deployment.hub} INTERP_NDIF_HOST={deployment.host}")
    elif options.word == "down":
        deployment.down()
    elif options.word == "hub":
        print(deployment.hub)
    else:
        print(
            "up" if deployment.is_up() else "down", deployment.host, f"hub {deployment.hub}", f"logs {deployment.logs}"
        )
        for name, (pid, _) in deployment.services().items():
            print(f"{name}: session {pid}, {len(deployment.session(name))} processes")


if __name__ == "__main__":
    try:
        main()
    except DeploymentError as error:
        sys.exit(str(error))
