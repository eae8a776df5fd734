"""The journal: listeners are told of outermost experiments, and nothing else changes."""

from __future__ import annotations

import gc
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest

import interp
from interp.errors import InterpError
from interp.journal import Told, experiment, leave, listen

from .families import loaded, words

#: Public functions that work on a model or train; the rest of the public names are values, files, metrics, pictures.
EXPERIMENTS = (
    "ablate", "attribute", "attribution_graph", "causal_trace", "collect_activations", "comprehensive_activation_patching",
    "direct_effects", "discover", "evaluate_circuit", "evaluate_sae", "iterative_pruning", "load_model", "logit_lens", "patch",
    "path_patch", "run_circuit", "steer", "steering_vector", "train_sae",
)  # fmt: skip


class Ear:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def hear(self, told: Told) -> None:
        self.told.append(told)


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = Ear()
    listen(made)
    yield made
    leave(made)


@experiment
def inner(x: int, *, y: int = 2) -> int:
    """Adds."""
    return x + y


@experiment
def outer(x: int, fail: bool = False) -> int:
    """Calls another."""
    if fail:
        raise ValueError("first line\nthe last line")
    return inner(x) + inner(x, y=5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_public_methods_that_work_are_experiments(name: str) -> None:
    function = getattr(interp, name)
    assert inspect.unwrap(function) is not function, f"{name} tells no listener"
    assert function.__name__ == name and function.__doc__ and "return" in function.__annotations__
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))


def test_the_list_above_is_whole() -> None:
    functions = {name for name in interp.__all__ if inspect.isfunction(getattr(interp, name))}
    told = {name for name in functions if getattr(interp, name).__globals__["__name__"] == "interp.journal"}
    assert told == set(EXPERIMENTS)


def test_only_the_outermost_call_is_told(ear: Ear) -> None:
    assert outer(1) == 9 and inner(1, y=1) == 2
    assert [(told.name, told.summary, told.arguments) for told in ear.told] == [
        ("outer", "9", {"x": 1}),
        ("inner", "2", {"x": 1, "y": 1}),
    ]
    leave(ear)
    assert outer(1) == 9 and len(ear.told) == 2


def test_an_exception_is_told_in_its_last_line_and_not_kept(ear: Ear) -> None:
    class Big:
        pass

    @experiment
    def fails(big: Big) -> None:
        raise ValueError("first line\nthe last line")

    gc.disable()
    try:
        big = Big()
        gone = weakref.ref(big)
        with pytest.raises(ValueError, match="first line") as raised:
            fails(big)
        del big, raised
        assert (
            gone() is None
        )  # without a search for circles: tensors of a call that ran out of memory are freed at once
    finally:
        gc.enable()
    assert ear.told[0].error == "ValueError: the last line"
    with pytest.raises(ValueError):
        outer(1, fail=True)
    assert inner(1) == 3 and [told.name for told in ear.told] == ["fails", "outer", "inner"]
    with pytest.raises(TypeError, match="unexpected keyword"):
        inner(1, z=1)  # type: ignore[call-arg]
    assert "unexpected keyword" in ear.told[-1].error


def test_a_listener_that_fails_breaks_nothing(ear: Ear) -> None:
    class Deaf:
        def hear(self, told: Told) -> None:
            raise OSError("no room")

    deaf = Deaf()
    listen(deaf)
    try:
        with pytest.warns(UserWarning, match="a record of inner could not be kept: OSError: no room"):
            assert inner(1) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert inner(1) == 3
    finally:
        leave(deaf)
    assert len(ear.told) == 2


def test_what_cannot_be_described_breaks_nothing(ear: Ear) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    @experiment
    def odd(x: Odd) -> Odd:
        return x

    assert isinstance(odd(Odd()), Odd)
    assert "no words" in ear.told[0].error


def test_threads_are_heard_by_the_only_listener_and_by_their_own(ear: Ear) -> None:
    def work() -> None:
        inner(10)

    def with_its_own(other: Ear) -> None:
        listen(other)
        inner(20)
        leave(other)

    def go(function: object, *args: object) -> None:
        thread = threading.Thread(target=function, args=args)  # type: ignore[arg-type]
        thread.start()
        thread.join()

    go(work)
    assert [told.summary for told in ear.told] == ["12"]
    other = Ear()
    go(with_its_own, other)
    assert [told.summary for told in other.told] == ["22"] and len(ear.told) == 1
    listen(other)  # two that this thread began: both hear it; a thread that began none cannot know whose it is
    inner(1)
    go(work)
    leave(other)
    assert [told.summary for told in ear.told] == ["12", "3"] and len(other.told) == 2


def test_a_real_experiment_with_its_record(ear: Ear) -> None:
    model = loaded("gpt2")
    ear.told.clear()  # of the first test that loads it
    clean, corrupted = words(6, seed=1), words(6, seed=2)
    pairs = interp.PromptPairs(clean=clean, corrupted=corrupted, answers=[20], distractors=[33])
    effects = interp.patch(model, pairs, interp.grid("resid_post"), progress=False)
    assert [told.name for told in ear.told] == ["patch"]
    told = ear.told[0]
    assert told.provenance == effects.provenance and told.arguments["progress"] is False and told.seconds > 0
    assert told.summary.startswith("Effects(") and told.arguments["model"] == repr(model)
    with pytest.raises(InterpError):
        interp.patch(model, pairs, interp.grid("resid_post", layers=[99]))
    assert ear.told[1].error.startswith("SiteError: ")


def test_tables_of_xarray_are_told_with_their_sizes_and_facts(ear: Ear) -> None:
    model = loaded("gpt2")
    ear.told.clear()
    interp.lens.attention_patterns(model, words(6, seed=1)[0])
    (told,) = ear.told
    assert told.summary == "DataArray of layer 3 × head 4 × query 6 × key 6"
    assert told.provenance == {"model": model.name}


def test_warnings_still_point_to_the_callers_line() -> None:
    model = loaded("gpt2")
    same = words(6, 6, seed=1)
    other = words(6, seed=2)
    pairs = interp.PromptPairs(clean=same, corrupted=[same[0], other[0]], answers=[20, 20], distractors=[33, 33])
    with pytest.warns(UserWarning, match="are the same in pair 0") as seen:
        interp.attribute(model, pairs, interp.grid("resid_post"))
    assert [warning.filename for warning in seen if "are the same" in str(warning.message)] == [__file__]
