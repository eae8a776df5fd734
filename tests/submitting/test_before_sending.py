"""What is told before anything is sent: a server's status, what an experiment will take; and each refusal in one clear error."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import interp
from interp.engine import errand
from interp.errors import BackendError, PlanError, SiteError
from tests.ndif.deployment import make_tiny

from .stand_in import KILLED, StandIn
from .test_jobs import OPTIONS, PAIRS, PLAN

KEY = "nnsight.modeling.transformers.TransformersModel:{}"
#: What NDIF 0.1.2 answered, cut to what is read.
STATUS = {
    "deployments": {
        f"530db:{KEY}": {
            "application_state": "RUNNING", "deployment_level": "HOT", "dtype": "float32", "repo_id": "org/one", "revision": None,
            "n_params": 164416, "execution_timeout_seconds": 60,
        },
        f"b7a99:{KEY}": {
            "application_state": "RUNNING", "deployment_level": "WARM", "dtype": "bfloat16", "repo_id": "org/two",
            "revision": "main", "n_params": 134515008, "execution_timeout_seconds": None,
        },
    },
    "cluster": {"nodes": {"a": {"resources": {"gpu_details": [{"index": 0, "available_memory_bytes": 7380474649}]}}}},
}  # fmt: skip
ENVIRONMENT = {
    "python_version": "3.12.4 (main, May 9 2026) [GCC]",
    "packages": {"nnsight": "0.8.0", "transformers": "5.20.0", "torch": "2.13.0"},
}
TOLD: dict[str, Any] = {"/status": STATUS, "/env": ENVIRONMENT}


def telling(**answers: tuple[int, Any]) -> Callable[[Any], bool]:
    def fault(handler: Any) -> bool:
        code, said = answers.get(handler.path.strip("/"), (200, TOLD.get(handler.path)))
        if said is None:
            return False
        StandIn.reply(handler, code, said)
        return True

    return fault


def test_status_tells_versions_models_room_and_what_will_not_work(server: StandIn) -> None:
    server.fault = telling()
    status = interp.remote_status(server.host)
    assert status.versions["nnsight"][1] == "0.8.0" and status.versions["python"][1] == "3.12.4"
    assert [row[0] for row in status.models] == ["org/one", "org/two@main"]
    assert status.free == (7380474649,) and status.queue is None
    said = " ".join(status.problems)
    assert "transformers is" in said and "model.audit()" in said and "org/two is WARM" in said
    for text in (repr(status), status._repr_html_()):
        assert "org/one" in text and "7.4 GB" in text and "0.2 million" in text


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {"status": (503, {"detail": "Service temporarily unavailable: compute backend is reconnecting."})},
            r"503.*reconnecting",
        ),
        (
            {"status": (401, {"detail": "Missing or invalid API key."})},
            r"does not take this API key \(401.*NDIF_API_KEY",
        ),
        ({"status": (200, b"<html>hello</html>")}, "does not answer as an NDIF server does"),
        ({"status": (200, [1, 2])}, "does not answer as an NDIF server does"),
        ({"status": (404, {"detail": "Not Found"})}, r"no /status or /env"),
    ],
    ids=["away", "key", "page", "list", "none"],
)
def test_status_of_what_cannot_be_used(answers: dict[str, Any], said: str, server: StandIn) -> None:
    server.fault = telling(**answers)
    with pytest.raises(BackendError, match=said):
        interp.remote_status(server.host)


def test_addresses_that_are_none() -> None:
    for host in ("nonsense", "ftp://host"):
        with pytest.raises(BackendError, match="is no address of a server"):
            interp.remote_status(host)
    with pytest.raises(BackendError, match="no connection to"):
        interp.remote_status("http://127.0.0.1:9")


def test_the_public_server_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    with pytest.raises(BackendError, match=r"needs an API key, and there is none: set NDIF_API_KEY"):
        interp.remote_status("https://api.ndif.us")


REFUSALS = {
    "wrong key": (403, {"detail": "Invalid API key."}, r"does not take this API key \(403: Invalid API key\.\)"),
    "no key": (401, {"detail": "Missing or invalid API key. Please visit the login page."}, r"\(401: Missing.*NDIF_API_KEY"),
    "malformed key": (400, {"detail": "Malformed API key."}, r"refused the request \(400: Malformed API key"),
    "version skew": (
        400, {"detail": "Client nnsight version 0.8.1 is below the minimum supported 0.9.0."},
        r"does not take what this machine sends \(400.*minimum supported 0\.9\.0.*nnsight is .*remote_status",
    ),
    "too large": (413, {"detail": "Payload too large"}, r"refused the request \(413: Payload too large\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_clear_error(name: str, there: interp.Model, server: StandIn, tmp_path: Path) -> None:
    code, said, match = REFUSALS[name]
    posts = 0

    def fault(handler: Any) -> bool:
        nonlocal posts
        if handler.command != "POST":
            return False
        posts += 1
        handler.rfile.read(int(handler.headers["content-length"]))
        StandIn.reply(handler, code, said)
        return True

    server.fault = fault
    with pytest.raises(BackendError, match=match):
        interp.patch(there, PAIRS, PLAN, **OPTIONS)
    assert posts <= 4, "what is refused is not tried again"
    with pytest.raises(BackendError, match=match):
        interp.submit(interp.patch, there, PAIRS, PLAN, root=tmp_path, **OPTIONS).result(60)


def test_a_queue_that_is_full_is_waited_for_until_the_deadline(
    there: interp.Model, server: StandIn, tmp_path: Path
) -> None:
    def full(handler: Any) -> bool:
        if handler.command != "POST":
            return False
        handler.rfile.read(int(handler.headers["content-length"]))
        StandIn.reply(handler, 429, {"detail": "Too many requests."}, retry_after="0.1")
        return True

    server.fault = full
    there.backend.timeout = 0.4
    with pytest.raises(BackendError, match=r"no result within the time allowed: .*its queue is full \(429"):
        interp.patch(there, PAIRS, PLAN, **OPTIONS)
    with pytest.raises(BackendError, match=r"its queue is full \(429"):
        interp.submit(interp.patch, there, PAIRS, PLAN, deadline=0.4, root=tmp_path, **OPTIONS).result(60)


def test_a_model_that_the_server_cannot_run(there: interp.Model, server: StandIn) -> None:
    server.error = lambda id: (
        "Could not deploy this model. Repository Not Found: make sure you specified the correct `repo_id`."
    )
    with pytest.raises(BackendError, match=r"cannot run .*remote_status\('http.*Repository Not Found"):
        interp.patch(there, PAIRS, PLAN, **OPTIONS)


def test_too_long_for_the_server_is_run_in_parts(
    there: interp.Model, here: interp.Model, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends what takes long, or has no memory for it: smaller requests, the same numbers."""
    for said in ("Your job exceeded the execution timeout of 60.0s.", "torch.OutOfMemoryError: CUDA out of memory."):
        there.backend.limit, tries = 9600, []

        def error(id: str, said: str = said, tries: list[str] = tries) -> str | None:
            tries.append(id)
            return said if len(tries) == 1 else None

        server.error = error
        found = interp.patch(there, PAIRS, PLAN, schedule="growing")
        assert len(tries) > 2
        assert abs(found.values - interp.patch(here, PAIRS, PLAN, schedule="growing").values).max() < 1e-5


def test_a_key_in_what_the_server_says_is_not_repeated(there: interp.Model, server: StandIn, monkeypatch: Any) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret-456")
    there.backend._wire = None
    server.error = lambda id: "RuntimeError: your key secret-456 is odd"
    with pytest.raises(BackendError, match="your key … is odd"):
        interp.patch(there, PAIRS, PLAN, **OPTIONS)


@pytest.mark.parametrize("kind", ["garbage", "half", "pickle", "huge"])
def test_an_answer_that_is_none(kind: str, there: interp.Model, server: StandIn, tmp_path: Path) -> None:
    """Garbage, half of an answer, a pickle that would run code, too much: an error, and nothing is run."""
    from tests.engine.test_answers import TRAP, Trap, saved, sprung

    TRAP.clear()
    there.backend.largest = 2**20
    half = b"\x28\xb5\x2f\xfd" + b"\x00" * 10

    def fault(handler: Any) -> bool:
        if not handler.path.startswith("/result/"):
            return False
        if kind != "huge":
            StandIn.reply(
                handler, 200, {"garbage": b"what?", "half": half, "pickle": saved({"result": Trap(sprung, "x")})}[kind]
            )
            return True
        handler.send_response(200)
        handler.send_header("content-length", str(2**31))
        handler.end_headers()
        for _ in range(2**15):  # 2 GB, if anybody takes it
            handler.wfile.write(bytes(2**16))
        return True

    server.fault = fault
    with pytest.raises(BackendError, match="the answer of the server was not read"):
        interp.patch(there, PAIRS, PLAN, **OPTIONS)
    assert not TRAP


def test_an_estimate_is_what_is_sent(there: interp.Model, here: interp.Model, server: StandIn) -> None:
    there.backend.limit = 200
    told = there.estimate(PLAN, PAIRS, **OPTIONS)
    assert not server.told, "nothing was sent"
    interp.patch(there, PAIRS, PLAN, **OPTIONS)
    backend = there.backend
    assert told.requests == backend.requests > 1
    assert abs(told.bytes_up - backend.sent) < 0.1 * backend.sent
    assert abs(told.bytes_down - backend.received) < 0.3 * backend.received
    assert told.cells == 6 * 2 * 7 and told.weights == sum(p.numel() * 4 for p in here.hf.parameters())
    assert "patched runs: 84" in repr(told) and "requests" in told._repr_html_()
    with pytest.raises(PlanError, match="runs in this process"):
        here.estimate(PLAN, PAIRS)
    with pytest.raises(SiteError, match="layer 9"):
        there.estimate(interp.grid("z", layers=[9]), PAIRS)


def test_a_model_of_405_billion_weights_is_planned_here(tmp_path: Path) -> None:
    """From a configuration alone, on meta weights: plan, estimate, sizes of requests."""
    make_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    transformers.LlamaConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, max_position_embeddings=131072, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    model = interp.load_model(tmp_path, backend="http://127.0.0.1:9")
    told = model.estimate(interp.grid(["resid_pre", "attn_out", "mlp_out"]), PAIRS)
    print(f"{time.monotonic() - started:.1f} s; {told}")
    assert 3 * 126 * 6 < told.cells <= 3 * 126 * 7 * 6 and told.requests > 5
    assert told.largest < 200_000 and told.bytes_up < 10_000_000
    assert 8.1e11 < told.weights < 8.2e11
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4_000_000, "kB"


def test_what_was_killed_is_an_excuse_and_a_traceback_is_none() -> None:
    assert any(excuse in KILLED.lower() for excuse in errand.EXCUSES)
    assert json.dumps(STATUS)
