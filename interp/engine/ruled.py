"""A forward pass under backward rules (`interp.engine.rules`): every call that is not linear gives its own value and its rule.

What a model calls is seen by torch's function mode, so a rule is found from what is computed, whatever the module is called.
Two things are taken as a whole: activation modules, found by trying whether they act on single numbers, and experts.
Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import AuditError
from ..models.layout import Envoy
from .experts import Flips, Recorded, aligned, is_experts, mixed
from .rules import BILINEAR, LINEAR, QUOTIENTS, RULES
from .step_rules import Call, Ruled, projection

if TYPE_CHECKING:
    from .program import Program


class Rows:
    """Which rows of a batch are bases, and which rows are their other ends."""

    def __init__(self, count: int, base: Tensor, end: Tensor) -> None:
        self.count, self.pair = count, (self.evenly(base), self.evenly(end))

    def evenly(self, rows: Tensor) -> Envoy:
        """A slice where the rows stand evenly: what it gives is no copy."""
        steps = rows.diff().unique().tolist()
        if len(rows) == 1:
            return slice(int(rows[0]), int(rows[0]) + 1)
        if len(steps) == 1 and steps[0] > 0:
            return slice(int(rows[0]), int(rows[-1]) + 1, steps[0])
        return rows

    def by_row(self, x: Tensor) -> Tensor:
        """`[row, part of it, …]`: rows are the slowest axis of all that a model makes of them."""
        if not x.ndim or x.shape[0] % self.count:
            raise AuditError(f"a tensor {list(x.shape)} does not have its {self.count} rows first")
        return x.unflatten(0, (self.count, -1))

    def chosen(self, rows: Envoy, device: torch.device) -> Envoy:
        """Rows as an index of tensors on a device."""
        return rows if isinstance(rows, slice) else rows.to(device)

    def base(self, x: Tensor) -> Tensor:
        """A tensor at the bases, with its history."""
        return self.by_row(x)[self.chosen(self.pair[0], x.device)].flatten(0, 1)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor at the bases and at their other ends, without its history."""
        end = self.by_row(x.detach())[self.chosen(self.pair[1], x.device)].flatten(0, 1)
        return self.base(x.detach()), end

    def put(self, part: Tensor, shape: torch.Size) -> Tensor:
        """What stands at the bases as a tensor of all rows, 0 at the others."""
        whole = part.new_zeros(shape)
        by_row = self.by_row(whole)
        by_row[self.chosen(self.pair[0], part.device)] = part.unflatten(0, (-1, by_row.shape[1]))
        return whole


def surrogate_class() -> Envoy:
    """A step as autograd takes it. Made where it is used: a class of autograd's does not travel."""

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Envoy, ruled: Ruled, rows: Envoy, *inputs: Tensor) -> Tensor:
            # not `ruled`, whose output would then hold itself
            ctx.pull, ctx.rows, ctx.shapes = ruled.pull, rows, [x.shape for x in inputs]
            return ruled.out

        @staticmethod
        def backward(ctx: Envoy, gradient: Tensor) -> Envoy:
            made = ctx.pull(ctx.rows.base(gradient))
            return None, None, *(ctx.rows.put(part, shape) for part, shape in zip(made, ctx.shapes, strict=True))

    return Surrogate


def tensors(given: Envoy) -> Iterator[Tensor]:
    """Every tensor that a call gets or gives."""
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from tensors(one)


class Paused:
    """Steps without their rules."""

    def __init__(self, ruling: Envoy) -> None:
        self.ruling = ruling

    def __enter__(self) -> None:
        self.ruling.whole += 1

    def __exit__(self, *_: Envoy) -> None:
        self.ruling.whole -= 1


class Ruling(TorchFunctionMode):
    """A forward pass under the rules of a method. A class: functions travel to a server without their decorators.

    Raises:
        AuditError: a step without a rule, by its name and its module's.
    """

    def __init__(self, method: str, model: Envoy, rows: Rows) -> None:
        TorchFunctionMode.__init__(self)  # super() finds no class where only the source has travelled
        self.method, self.rules, self.rows = method, RULES[method], rows
        self.root: Envoy = getattr(model, "_module", model)
        self.used: set[str] = set()  # the steps that took a rule
        self.adds_up = method.startswith("secant")
        self.whole = 0  # inside a module that is taken as one step
        self.handles: list[Envoy] = []
        self.wanting: list[Tensor] = []
        self.flips: Flips | None = None
        self.depth = 0

    def __enter__(self) -> Ruling:
        if not self.rules:
            return self
        self.depth += 1
        if self.depth == 1:
            self.surrogate = surrogate_class()
            self.wanting = [weight for weight in self.root.parameters() if weight.requires_grad]
            for weight in self.wanting:  # else a product with a weight would look like one of two activations
                weight.requires_grad_(False)
            known: dict[type, Envoy] = {}
            for module in self.root.modules():
                if type(module) not in known:
                    known[type(module)] = self.whole_of(module)
                if rule := known[type(module)]:
                    self.take(module, rule)
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: Envoy) -> None:
        if not self.rules:
            return
        TorchFunctionMode.__exit__(self, *error)
        self.depth -= 1
        if self.depth == 0:
            for handle in self.handles:
                handle.remove()
            for weight in self.wanting:
                weight.requires_grad_(True)
            self.handles.clear()

    def whole_of(self, module: Envoy) -> Envoy:
        """The rule of a kind of module that is one step; None for others."""
        if is_experts(module):
            return self.experts
        bare = next(module.parameters(), None) is None and next(module.buffers(), None) is None
        return self.activation if bare and acts_on_numbers(module) else None

    def of_metric(self) -> Envoy:
        """Run a metric under these rules where effects are to add up, and without them otherwise."""
        return self if self.adds_up or not self.rules else Paused(self)

    def take(self, module: Envoy, rule: Envoy) -> None:
        """Take a module as one step."""

        def begin(*_: Envoy) -> None:
            self.whole += 1

        def end(module: Envoy, args: tuple[Envoy, ...], kwargs: dict[str, Envoy], out: Envoy) -> Envoy:
            self.whole -= 1
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors([*args, *kwargs.values()]))
            if self.whole or not wanted:
                return out
            return rule(module, [*args, *kwargs.values()], out)

        self.handles.append(module.register_forward_pre_hook(begin))
        self.handles.append(module.register_forward_hook(end, with_kwargs=True))

    def __torch_function__(self, function: Envoy, types: Envoy, args: Envoy = (), kwargs: Envoy = None) -> Envoy:
        kwargs = kwargs or {}
        written = getattr(function, "__name__", str(function))
        name = written.strip("_")  # `mul` of x * y, of torch.mul, and of x.mul_
        if name in LINEAR or self.whole or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        live = [x for x in tensors([*args, *kwargs.values()]) if x.requires_grad]
        if name == "linear" and len(live) == 1 and live[0] is args[0]:
            return self.ruled(projection, Call(function, args, kwargs, self.rows))
        if not live or (len(live) == 1 and (name in BILINEAR or (name in QUOTIENTS and live[0] is args[0]))):
            return function(*args, **kwargs)
        if name == "gather":
            if self.flips is not None and self.flips.index is kwargs.get("index", args[-1]):
                return self.flips.taken(args[0])
            return function(*args, **kwargs)
        if name == "topk":
            return self.topk(function, args, kwargs)
        if written == f"{name}_" and hasattr(torch.Tensor, name):  # in place
            before = args[0].clone()  # what the rule keeps is not what is changed
            return args[0].copy_(
                self.__torch_function__(getattr(torch.Tensor, name), types, (before, *args[1:]), kwargs)
            )
        rule = self.rules.get(name)
        if rule is None:
            out = function(*args, **kwargs)
            if not any(x.requires_grad for x in tensors([out])):
                return out
            raise AuditError(f"{self.method!r} has no rule for {name} in {self.where()}; 'ig' and 'eap-ig' need none")
        self.used.add(name)
        return self.ruled(rule, Call(function, args, kwargs, self.rows))

    def ruled(self, rule: Envoy, call: Call) -> Envoy:
        """A step by its rule."""
        try:
            with Paused(self):
                made = rule(call)
        except AuditError as error:
            name = getattr(call.function, "__name__", "a step")
            raise AuditError(f"{self.method!r} has no rule for {name} in {self.where()}: {error}") from None
        if not made.inputs:
            return made.out
        if isinstance(self.rows, Recorded):
            return made.out.requires_grad_(True)  # so that the steps behind it are recorded too
        return self.surrogate.apply(made, self.rows, *made.inputs)

    def where(self) -> str:
        """The path of the module whose forward pass runs now."""
        names = {id(module): name for name, module in self.root.named_modules()}
        frame: Envoy = sys._getframe(1)
        while frame is not None:
            found = names.get(id(frame.f_locals.get("self")))
            if found:
                return found
            frame = frame.f_back
        return "the model's own forward pass, or the metric"

    def activation(self, module: Envoy, args: list[Envoy], out: Tensor) -> Tensor:
        """An activation as one function of single numbers."""
        return self.ruled(
            self.rules["tanh"], Call(type(module).forward.__get__(module), (args[0],), {}, self.rows, out)
        )

    def topk(self, function: Envoy, args: Envoy, kwargs: Envoy) -> Envoy:
        """The choice of experts: the other end's stand where the base has the same ones; where it changes is noted."""
        _, index = function(*args, **kwargs)
        if isinstance(self.rows, Rows):
            base, end = self.rows.ends(index)
            rows = self.rows.by_row(index)
            rows[self.rows.chosen(self.rows.pair[1], index.device)] = aligned(base, end).unflatten(
                0, (-1, rows.shape[1])
            )
            self.flips = Flips(args[0], index, self.rows)
            return torch.return_types.topk((self.flips.taken(args[0]), index))
        return torch.return_types.topk((args[0].gather(-1, index), index))

    def experts(self, module: Envoy, args: list[Envoy], out: Tensor) -> Tensor:
        """A layer of experts as one step, see `interp.engine.experts`."""
        flips, self.flips = self.flips, None
        return mixed(self, module, args[:3], out, flips)


def acts_on_numbers(module: Envoy) -> bool:
    """Whether a module without weights makes each number of its input by itself into one of its output, and is no identity."""
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    moved = x.clone()
    moved[1, 2] += 0.5
    try:
        with torch.no_grad():
            out, after = module(x), module(moved)
    except Exception:  # it wants other inputs, or none: whatever it says, it is no function of single numbers
        return False
    if not isinstance(out, Tensor) or out.shape != x.shape or torch.equal(out, x):
        return False
    changed = out != after
    return int(changed.sum()) <= 1 and (int(changed.sum()) == 0 or bool(changed[1, 2]))


def ruling(method: str, model: Envoy, program: Program) -> Ruling:
    """The rules for one program: each base row against the row at the other end of its segment."""
    rows = Rows(program["inputs"]["input_ids"].shape[0], program["gradient"].flatten(), program["until"].flatten())
    return Ruling(method, model, rows)
