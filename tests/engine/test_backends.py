"""Backends elsewhere give what the local one gives; little is sent; what goes wrong says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from nnsight.intervention.serialization import dumps, loads
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import interp
from interp import Effects, Model, PromptPairs
from interp.engine import simulated
from interp.engine.backends import Local, make_backend
from interp.engine.ndif import Ndif
from interp.engine.remote import pack, requests
from interp.engine.simulated import Worker, current_worker
from interp.engine.trace import execute
from interp.errors import BackendError
from interp.models.layout import at
from tests.oracle.configs import prompts, tiny

FAMILIES = ("gpt2", "llama_gqa", "gemma2")
HERE = os.getpid()
PLAN = interp.grid(["resid_pre", "attn_out", "mlp_out"])


def pairs() -> PromptPairs:
    """Two pairs of different lengths, so that there is more than one block of prepared runs."""
    sides = [prompts(9, 2), prompts(7, 3, seed=1)]
    return PromptPairs([clean for clean, _ in sides], [other for _, other in sides], [20, 41], [33, 12])


def scaled(values: Tensor) -> Tensor:
    return values / 3


def own_metric(logits: Tensor, batch: Any) -> Tensor:
    """A user's metric, with a helper of its own module and items and attributes of the batch."""
    answers, clean = batch.answers, batch["clean_logits"]
    return scaled(logits.gather(1, answers[:, None])[:, 0]) + (logits - clean).norm(dim=-1)


def process(logits: Tensor, batch: Any) -> Tensor:
    """The number of the process that runs it."""
    return torch.full((len(logits),), float(os.getpid()))


def interp_is_there(logits: Tensor, batch: Any) -> Tensor:
    """1 where a module of interp is loaded."""
    return torch.full((len(logits),), float(any(name.split(".")[0] == "interp" for name in sys.modules)))


@pytest.fixture(scope="module")
def both() -> Any:
    """family -> (the model run here, the same model run by the worker)."""
    made: dict[str, tuple[Model, Model]] = {}

    def get(family: str) -> tuple[Model, Model]:
        if family not in made:
            hf, tokenizer = tiny(family)
            here = interp.load_model(hf, tokenizer)
            made[family] = (here, interp.load_model(hf, tokenizer, backend="simulated"))
        return made[family]

    return get


def same(found: Effects, expected: Effects) -> None:
    for one, other in ((found.values, expected.values), (found.clean, expected.clean)):
        np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-6)
    assert float(expected.values.std()) > 0.01


@pytest.mark.parametrize("schedule", ["naive", "rows", "growing", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_equal_local(both: Any, family: str, schedule: str) -> None:
    here, there = both(family)
    plan = interp.grid(PLAN.components, layers=[1], positions=[3, -1]) if schedule == "naive" else PLAN
    for direction in ("noising", "denoising"):
        options: dict[str, Any] = {"direction": direction, "schedule": schedule, "max_tokens": 60}
        same(interp.patch(there, pairs(), plan, **options), interp.patch(here, pairs(), plan, **options))


def test_a_metric_of_the_users_own_travels(both: Any) -> None:
    here, there = both("gpt2")
    same(interp.patch(there, pairs(), PLAN, own_metric), interp.patch(here, pairs(), PLAN, own_metric))
    weight = 2.5
    closure = interp.patch(there, pairs(), PLAN, lambda logits, batch: weight * own_metric(logits, batch))
    plain = interp.patch(here, pairs(), PLAN, own_metric)
    np.testing.assert_allclose(closure.values.values, 2.5 * plain.values.values, rtol=1e-6)


def test_it_runs_in_one_other_process_without_interp(both: Any) -> None:
    _, there = both("gpt2")
    first = interp.patch(there, pairs(), PLAN, process).clean.values
    assert set(first) == {float(current_worker().process.pid)} and HERE not in first
    _, other = both("llama_gqa")
    assert set(interp.patch(other, pairs(), PLAN, process).clean.values) == set(first)
    assert set(interp.patch(there, pairs(), PLAN, interp_is_there).clean.values) == {0.0}


@pytest.mark.parametrize("schedule", [pytest.param("naive", marks=pytest.mark.slow), "rows", "growing", "prefix"])
def test_a_sweep_of_450_cells_is_small_on_the_wire(schedule: str) -> None:
    config = AutoConfig.for_model("gpt2", n_layer=12, n_embd=48, n_head=12, vocab_size=300, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    there = interp.load_model(AutoModelForCausalLM.from_config(config), backend="simulated")
    clean = list(range(10, 23))
    corrupted = [clean[0] + 50, *clean[1:]]
    one = PromptPairs([clean], [corrupted], [5], [6])
    effects = interp.patch(there, one, PLAN, schedule=schedule, max_tokens=450)  # as for GPT-2's width
    assert effects.values.size >= 450 and not np.isnan(effects.values).any()
    assert 5_000 < there.backend.sent <= 100_000
    assert 450 * 4 <= there.backend.received <= 10_000


def test_progress_is_reported_by_request_and_prepared_runs_go_along(both: Any) -> None:
    here, there = both("llama_gqa")
    expected = interp.patch(here, pairs(), PLAN, schedule="prefix", max_tokens=40)
    there.backend.limit, before = 200, there.backend.limit
    try:
        same(interp.patch(there, pairs(), PLAN, schedule="prefix", max_tokens=40), expected)
        assert there.backend.requests > 3
    finally:
        there.backend.limit = before


def test_requests_hold_every_program_once_and_what_it_uses() -> None:
    def program(**more: Any) -> dict[str, Any]:
        return {"scored": torch.arange(10), "inputs": {"input_ids": torch.zeros(1, 10)}, **more}

    use = {"use": 0}
    programs = [program(keep=[1]), *[program(**use)] * 5, program(), program(keep=[]), *[program(**use)] * 2]
    groups = requests(programs, 3 * 100)
    assert groups == [[0, 1, 2], [0, 3, 4], [0, 5, 6], [7, 8, 9]]
    assert requests(programs, 1) == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [6], [7, 8], [7, 9]]
    assert requests(programs, 10**9) == [list(range(10))]
    assert requests([], 1) == []
    mixed = [
        program(keep=[1]),
        program(**use),
        program(),
        program(**use),
    ]  # one between that uses nothing begins a request
    assert requests(mixed, 200) == [[0, 1], [2, 0, 3]]
    short = [{"scored": torch.arange(1), "inputs": {"input_ids": torch.zeros(1, 2)}}] * 100
    assert len(requests(short, 1000)) == 4  # many short forward passes are long too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.int32])
def test_tensors_arrive_as_they_were(dtype: torch.dtype) -> None:
    for numbers in ([], [[1, 0], [0, 1]], [-128, 127], [300, -5], [70000], 3):
        sent = torch.tensor(numbers).to(dtype)
        (arrived,) = loads(dumps(pack([sent])))
        assert arrived.dtype == dtype and torch.equal(arrived, sent)
    large = torch.tensor([2**40, -(2**40)])
    assert torch.equal(loads(dumps(pack(large))), large)


def test_what_is_sent_is_small_and_sent_once() -> None:
    big = torch.randn(1000, 1000, requires_grad=True)
    assert len(dumps(pack({"a": [big[0]]}))) < 4000 + 2000  # not what lies behind the view
    assert len(dumps(pack([torch.arange(100)]))) < 100 + 2000
    assert len(dumps(pack([big[0], {"b": (big, big)}, big]))) < 4_100_000
    assert pack({"a": (3, None, "x")}) == {"a": (3, None, "x")}


def gradients(model: Any, taps: Any, programs: Any, metric: Any, done: Any = None) -> list[Tensor]:
    """A backward pass: d logsumexp / d residual stream entering each block, norms `[layer, position]`."""
    layers = at(model, taps["layers"])
    with model.trace(**programs[0]["inputs"]):
        streams = [layers[0].input.requires_grad_(True)]
        streams += [layers[layer].input for layer in range(1, taps["n_layers"])]
        loss = model.output.logits[:, -1].logsumexp(-1).sum()
        found = nnsight.save(list(torch.autograd.grad(loss, streams)))
    norms = torch.stack(found)[:, 0].norm(dim=-1)
    if done is not None:
        done(0, norms)
    return [norms]


def sent(model: Any, function: Any, program: Any) -> list[Any]:
    """What a backend reports of one program."""
    results: list[Any] = []
    model.backend.run(model, [program], None, lambda _, result: results.append(result), function)
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_call_ships_any_function_with_gradients_too(both: Any, family: str) -> None:
    here, there = both(family)
    inputs = {"input_ids": torch.tensor([prompts(9)[0]])}
    expected, found = (
        sent(model, gradients, {"inputs": inputs, "scored": torch.zeros(1)})[0] for model in (here, there)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.shape == (3, 9) and float(expected[:, -1].min()) > 0
    assert there.backend.requests == 1 and there.backend.sent > 1000 and there.backend.received < 5000


def test_call_gives_back_activations(both: Any) -> None:
    from interp.engine.reading import read_program

    here, there = both("gpt2")
    program = read_program(here, [prompts(9)[0]], [(1, "z"), (2, "pattern")])
    for model in (here, there):
        (found,) = sent(model, execute, program)
        assert found["reads"][1, "z"].shape == (1, 9, 4, 8)
        torch.testing.assert_close(found["reads"][2, "pattern"].sum(-1), torch.ones(1, 4, 9))


def test_a_folder_is_loaded_by_the_worker_and_must_hold_these_weights(tmp_path: Path) -> None:
    hf, tokenizer = tiny("llama_gqa", seed=3)
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    there = interp.load_model(tmp_path, backend="simulated")
    same(interp.patch(there, pairs(), PLAN), interp.patch(interp.load_model(hf, tokenizer), pairs(), PLAN))
    with torch.no_grad():
        there.hf.model.layers[1].mlp.up_proj.weight *= 2
    with pytest.raises(BackendError, match=r"differs.*layers\.1\.mlp\.up_proj.*give load_model a module"):
        interp.patch(there, pairs(), PLAN)


def test_a_module_changed_in_memory_is_sent_again() -> None:
    hf, tokenizer = tiny("gpt2", seed=5)
    here, there = interp.load_model(hf, tokenizer), interp.load_model(hf, tokenizer, backend="simulated")
    before = interp.patch(there, pairs(), PLAN)
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight *= 2
    after = interp.patch(there, pairs(), PLAN)
    same(after, interp.patch(here, pairs(), PLAN))
    assert float(abs(after.clean - before.clean).max()) > 0.01


def test_a_metric_that_cannot_be_sent(both: Any) -> None:
    _, there = both("gpt2")
    lock = threading.Lock()

    def locked(logits: Tensor, batch: Any) -> Tensor:
        with lock:
            return logits[:, 0]

    with pytest.raises(BackendError, match=r"cannot be sent to a server.*lock.*plain function"):
        interp.patch(there, pairs(), PLAN, locked)
    interp.patch(there, pairs(), PLAN)


def test_an_error_over_there_comes_with_its_traceback(both: Any) -> None:
    _, there = both("gpt2")

    def fails(logits: Tensor, batch: Any) -> Tensor:
        if os.getpid() != HERE:
            raise ArithmeticError("seven is not eight")
        return logits[:, 0]

    def imports(logits: Tensor, batch: Any) -> Tensor:
        from interp.metrics import logit_diff

        return logit_diff(logits, batch)

    with pytest.raises(BackendError, match="ArithmeticError: seven is not eight") as caught:
        interp.patch(there, pairs(), PLAN, fails)
    assert "in fails" in str(caught.value) and "in execute" in str(caught.value)
    with pytest.raises(BackendError, match=r"'imports' imports 'interp' as it runs.*use torch alone"):
        interp.patch(there, pairs(), PLAN, imports)
    interp.patch(there, pairs(), PLAN)


def test_a_worker_that_dies_or_hangs_is_replaced(both: Any) -> None:
    here, there = both("gpt2")

    def dies(logits: Tensor, batch: Any) -> Tensor:
        if os.getpid() != HERE:
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            os._exit(3)
        return logits[:, 0]

    def hangs(logits: Tensor, batch: Any) -> Tensor:
        if os.getpid() != HERE:
            time.sleep(60)
        return logits[:, 0]

    old = current_worker().process.pid
    with pytest.raises(BackendError, match=r"status 3.*starts a new one[\s\S]*out of luck"):
        interp.patch(there, pairs(), PLAN, dies)
    same(interp.patch(there, pairs(), PLAN), interp.patch(here, pairs(), PLAN))
    worker = current_worker()
    assert worker.process.pid != old
    there.backend.timeout, before = 2.0, there.backend.timeout
    try:
        with pytest.raises(BackendError, match="did not answer within 2 s"):
            interp.patch(there, pairs(), PLAN, hangs)
    finally:
        there.backend.timeout = before
    assert not worker.alive


def test_the_worker_keeps_few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "MODELS", 2)
    made = [interp.load_model(*tiny("gpt2", seed=seed), backend="simulated") for seed in range(3)]
    first = [interp.patch(model, pairs(), PLAN).clean.values for model in made]
    assert len(current_worker().models) <= 2
    again = interp.patch(made[0], pairs(), PLAN).clean.values
    np.testing.assert_array_equal(again, first[0])
    assert not np.allclose(first[0], first[1])


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def test_closing_a_worker_ends_it_and_its_folder(worker: Worker) -> None:
    assert worker.alive and worker.log.exists()
    worker.close()
    assert worker.process.returncode is not None and not worker.log.exists()
    with pytest.raises(BackendError, match="worker process ended"):
        worker.ask("drop", 0, 10)


@pytest.mark.parametrize("end", ["", "import signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_worker_outlives_the_process_that_started_it(end: str) -> None:
    code = (
        "import os\nfrom interp.engine.simulated import current_worker\n"
        f"print(current_worker().process.pid, flush=True)\n{end}"
    )
    root = Path(interp.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=root)
    pid = int(ran.stdout)
    for _ in range(1200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} is still there")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    hf, tokenizer = tiny("llama_gqa")
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    there = interp.load_model(tmp_path, backend=address + "/")
    assert all(parameter.is_meta for parameter in there.hf.parameters())
    assert there.n_layers == 3 and there.n_kv_heads == 2
    with pytest.raises(BackendError, match=f"no connection to {address} .*refused.*not reached once"):
        interp.patch(there, pairs(), PLAN)


def test_backends_by_name() -> None:
    assert isinstance(make_backend("local", "x"), Local)
    assert make_backend("ndif", "x").host is None  # type: ignore[attr-defined]
    own = Ndif("http://127.0.0.1:1")
    assert make_backend(own, "x") is own
    with pytest.raises(BackendError, match=r"unknown backend 'cloud'.*'simulated'"):
        make_backend("cloud", "x")
    with pytest.raises(BackendError, match="in memory cannot run on a server"):
        interp.load_model(*tiny("gpt2"), backend="ndif")
