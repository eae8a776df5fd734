"""A deployment of NDIF on this machine, CPU and loopback only: made, started, hurt and stopped.

    python -m tests.ndif.deployment up|down|status|hub

Redis, an S3 of moto's, Ray, NDIF's controller and API, and a model actor (`actor.py`) for each model; the hub is `hub.py`. All of
it lies in `.ndif/` (INTERP_NDIF_WORK), the server's environment in `.ndif/venv` (INTERP_NDIF_VENV). Processes are stopped by the
sessions that were started here, never by name.
"""

from __future__ import annotations

import contextlib
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: What is deployed: a tiny random model, and the bundled real one.
TINY, REAL = "interp-tests/tiny", "interp-tests/smollm2-135m"
SERVICES = ("api", "ray", "s3", "redis", "hub")
#: Ports, counted from INTERP_NDIF_PORT.
HUB, REDIS, S3, CLIENT, HEAD, DASHBOARD, API = range(7)
TORCH, NDIF = "torch==2.13.0", "ndif==0.1.2"


class DeploymentError(Exception):
    """It cannot be made or started; says what is missing, or what the log says."""


class Deployment:
    """One deployment, up or not."""

    def __init__(self) -> None:
        self.work = Path(os.environ.get("INTERP_NDIF_WORK", ROOT / ".ndif")).absolute()
        self.venv = Path(os.environ.get("INTERP_NDIF_VENV", self.work / "venv")).absolute()
        self.first = int(os.environ.get("INTERP_NDIF_PORT", "18080"))
        self.logs, self.models, self.runs = self.work / "logs", self.work / "models", self.work / "runs.txt"

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
        done = self.venv / ".made"
        if not done.exists() and not (self.venv / "bin" / "ray").exists():
            print(f"making the server's environment in {self.venv.name} (1.2 GB, some minutes)", flush=True)
            subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
            pip = [self.venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, TORCH], check=True)
            subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
            subprocess.run([*pip, "--no-deps", "--ignore-requires-python", NDIF], check=True)
            done.touch()
        if not (self.models / TINY).exists():
            make_tiny(self.models / TINY)
        if not (self.models / REAL).exists():
            from interp.models.bundled import ensure_bundled

            shutil.copytree(ensure_bundled("smollm2-135m"), self.models / REAL)

    # started

    def environment(self) -> dict[str, str]:
        """What every service is told."""
        url = "http://127.0.0.1"
        return {
            **{name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")},
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1",
            "HF_ENDPOINT": self.hub, "HF_HOME": str(self.work / "hub"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.port(REDIS)}",
            "NDIF_OBJECT_STORE_URL": f"{url}:{self.port(S3)}", "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.port(CLIENT)}",
            "NDIF_API_PORT": str(self.port(API)), "NDIF_API_URL": self.host, "NDIF_HOME": str(self.work / "home"),
            "NDIF_HOST": f"{url}:1",  # a server that asks a server finds none
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "actor.CPUActor", "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0", "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": os.environ.get("NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS", "120"),
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
            "RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0", "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
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
        (self.logs / f"{name}.pid").write_text(str(process.pid))

    def wait(self, what: str, ready: Callable[[], object], seconds: float = 240) -> None:
        """Wait until something answers, as long as all that was started lives."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, ValueError):
                if ready():
                    return
            for file in self.logs.glob("*.pid"):
                if not alive(int(file.read_text())):
                    raise DeploymentError(f"{file.stem} ended:\n{self.tail(file.stem)}")
            if time.monotonic() > until:
                raise DeploymentError(f"{what} was not there after {seconds:.0f} s:\n{self.tail(what)}")
            time.sleep(0.2)

    def tail(self, name: str) -> str:
        """The end of a service's log."""
        file = self.logs / f"{name}.log"
        return "\n".join(file.read_text(errors="replace").splitlines()[-20:]) if file.exists() else "(no log)"

    def up(self, *models: str) -> None:
        """Make what is missing, start all, deploy the models (both, unless some are named)."""
        self.make()
        if self.is_up():
            return
        self.down()
        started = time.monotonic()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.runs.parent.mkdir(parents=True, exist_ok=True)
        self.runs.write_text("")
        self.spawn("hub", sys.executable, str(HERE / "hub.py"), str(self.models), str(self.port(HUB)))
        self.spawn(
            "redis",
            "redis-server",
            "--port",
            str(self.port(REDIS)),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        )
        self.spawn("s3", "moto_server", "-H", "127.0.0.1", "-p", str(self.port(S3)))
        self.wait("redis", lambda: listens(self.port(REDIS)))
        self.wait("s3", lambda: listens(self.port(S3)))
        pretended = {"head": 10, "cuda_memory_bytes": 8e9, "cpu_memory_bytes": 8e9}
        self.spawn(
            "ray", "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={self.port(HEAD)}",
            f"--ray-client-server-port={self.port(CLIENT)}", "--num-cpus=4", "--num-gpus=1",
            f"--resources={json.dumps({name: int(size) for name, size in pretended.items()})}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.port(DASHBOARD)}", "--min-worker-port=21000",
            "--max-worker-port=21999", "--object-store-memory=200000000", f"--temp-dir={self.ray_folder()}",
            "--disable-usage-stats",
        )  # fmt: skip
        self.wait(
            "ray",
            lambda: fetched(f"http://127.0.0.1:{self.port(DASHBOARD)}/api/version") and listens(self.port(CLIENT)),
        )
        self.run("controller", "python", "-m", "ndif.services.ray.deployments.controller.controller",
                 RAY_ADDRESS=f"127.0.0.1:{self.port(HEAD)}")  # fmt: skip
        self.start_api()
        for model in models or (TINY, REAL):
            self.run("deploy", "ndif", "deploy", model, "--task", "text-generation", "--pinned", "--redis-url",
                     f"redis://127.0.0.1:{self.port(REDIS)}")  # fmt: skip
        print(f"up after {time.monotonic() - started:.0f} s: {self.host}, hub {self.hub}", flush=True)

    def run(self, name: str, *command: str, **environment: str) -> None:
        """Run something of the server's to its end."""
        with (self.logs / f"{name}.log").open("ab") as log:
            done = subprocess.run(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment() | environment, cwd=self.logs,
                timeout=600, check=False,
            )  # fmt: skip
        if done.returncode:
            raise DeploymentError(f"{name} failed:\n{self.tail(name)}")

    def ray_folder(self) -> str:
        """Ray's own: its sockets lie there, whose paths must be short."""
        file = self.work / "ray.txt"
        if not file.exists() or not Path(file.read_text()).is_dir():
            file.write_text(tempfile.mkdtemp(prefix="ray-"))
        return file.read_text()

    def start_api(self, **environment: str) -> None:
        """Start the API and its dispatcher."""
        settings = self.logs / "nnsight.yaml"
        settings.write_text("APP: {PYMOUNT: false}\n")  # what it mounts on every object breaks newer anyio
        at = f"127.0.0.1:{self.port(API)}"
        self.spawn("api", "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf", "--bind", at,
                   "ndif.services.api.app:app", NNSIGHT_CONFIG=str(settings), **environment)  # fmt: skip
        self.wait("api", lambda: fetched(f"{self.host}/connected"))

    # asked

    def is_up(self) -> bool:
        """Whether it takes requests."""
        with contextlib.suppress(OSError):
            return bool(fetched(f"{self.host}/connected"))
        return False

    def executed(self, what: str = "ended") -> Counter[str]:
        """How often each request was run: to its end, or `what="began"`."""
        lines = [line.split() for line in self.runs.read_text().splitlines()]
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
        for pid in self.session("api"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.logs / "api.pid").unlink(missing_ok=True)

    def session(self, name: str) -> list[int]:
        """The processes of the session that a service was started in."""
        file = self.logs / f"{name}.pid"
        if not file.exists():
            return []
        said = subprocess.run(["ps", "-o", "pid=", "-s", file.read_text()], capture_output=True, text=True, check=False)
        return [int(pid) for pid in said.stdout.split()]

    def down(self) -> None:
        """Stop all that was started here."""
        for sign, seconds in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)):
            until = time.monotonic() + seconds
            for name in SERVICES:
                for pid in self.session(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sign)
            while any(self.session(name) for name in SERVICES) and time.monotonic() < until:
                time.sleep(0.2)
        for name in SERVICES:
            (self.logs / f"{name}.pid").unlink(missing_ok=True)
        folder = self.work / "ray.txt"
        if folder.exists():
            shutil.rmtree(folder.read_text(), ignore_errors=True)
            folder.unlink()


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


def alive(pid: int) -> bool:
    """Whether a process that was started here runs."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # one of ours that ended is not kept as a zombie
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def fetched(url: str) -> bool:
    """Whether an address gives something; OSError where it does not."""
    with urllib.request.urlopen(url, timeout=70) as answer:
        return answer.status == 200


def main() -> None:
    deployment = Deployment()
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word == "up":
        deployment.up(*sys.argv[2:])
        print(f"export HF_ENDPOINT={deployment.hub} INTERP_NDIF_HOST={deployment.host}")
    elif word == "down":
        deployment.down()
    elif word == "hub":
        print(deployment.hub)
    elif word == "status":
        print("up" if deployment.is_up() else "down", deployment.host)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except DeploymentError as error:
        sys.exit(str(error))
