"""The audit: is every tap of this model what it says it is? `model.audit()` or `python -m interp.audit NAME`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import AuditError, InterpError
from ..findings import AuditReport, Finding
from ..journal import experiment
from ..models.model import Model
from ..models.steady import steady
from ..views import View
from .afar import audit_from_afar
from .laws import check_laws
from .plain import plain_run
from .reads import check_reads as _read_findings
from .reads import read_all
from .runs import check_embed, check_identity, check_padding
from .views import check_views
from .writes import check_writes


def _prompt(model: Model, length: int, seed: int) -> list[int]:
    """Token ids that mean nothing, behind the model's own prefix; no more than the model has positions for."""
    length = min(length, model.n_positions or length)
    generator = torch.Generator().manual_seed(seed)
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    ids = torch.randint(0, model.vocab_size, (4 * length,), generator=generator).tolist()
    return [*model.prefix_ids, *[token for token in ids if token not in special]][:length]


def _local(model: Model) -> None:
    if any(parameter.is_meta for parameter in model.hf.parameters()):
        raise AuditError(f"the audit of {model.name} needs its weights here, but its module is on the meta device")


@contextmanager
def _row_on_trial(model: Model) -> Iterator[None]:
    """A row so wrong that no forward pass can follow it fails in many ways; they all mean one thing."""
    try:
        with steady(model):
            yield
    except InterpError:
        raise
    except Exception as error:
        raise AuditError(
            f"{model.name}: no forward pass can follow the row {model.family.name!r} of interp/models/families.py (paths "
            f"in forward order, sides, layouts): {type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        ) from error


def _refuse(model: Model, report: AuditReport) -> None:
    """Later uses of a site that failed are refused with the audit's reason; the logits themselves must hold."""
    model.refused.clear()
    model.refused.update({kind: f"the audit says: {reason}" for kind, reason in report.failed.items()})
    if "logits" in report.failed:
        raise AuditError(
            f"{model.name}: a traced run does not give the plain model's logits ({report.failed['logits']}); no experiment "
            f"on it can be trusted. Correct the row {model.family.name!r} in interp/models/families.py"
        )


@experiment
def audit(
    model: Model, *, length: int = 9, layers: Sequence[int] | None = None, views: Sequence[View] = ()
) -> AuditReport:
    """Prove the reads and writes of every kind of site at every layer, on the model itself.

    Args:
        length: tokens of the random prompts used.
        layers: layers whose writes are checked; all by default.
        views: views of one's own that are held to the laws of views, at their layers.

    Returns:
        AuditReport; kinds that failed are refused by later experiments on this model, with the reason.

    Raises:
        AuditError: the logits of a traced run differ from the plain model's, or no forward pass can follow its row.

    Where the weights are on a server, its reads and writes are checked there (`interp.audit.afar`); laws of edges and gradients,
    which ask single modules, need them here.
    """
    prompt, other = _prompt(model, length, 0), _prompt(model, length, 1)
    if not model.backend.weights_here:
        report = _report(model, audit_from_afar(model, prompt, other))
        _refuse(model, report)
        return report
    _local(model)
    with _row_on_trial(model):
        plain = plain_run(model, prompt, gradients=True)
        run, kinds, lost = read_all(model, prompt)
        findings: list[Finding] = [*lost, *_read_findings(model, prompt, plain, run, kinds)]
        for layer in range(model.n_layers) if layers is None else layers:
            findings += check_writes(model, prompt, other, layer, plain, kinds)
        findings += [*check_embed(model, prompt, plain), *check_identity(model, prompt, plain, kinds)]
        findings += [*check_padding(model, prompt), *check_laws(model, prompt, other, plain, run["reads"])]
        findings += check_views(model, prompt, plain, views)
    report = _report(model, findings)
    _refuse(model, report)
    return report


def check_reads(model: Model) -> AuditReport:
    """One short forward that checks all reads; `load_model` runs it. Sites that fail are refused, with a warning."""
    _local(model)
    prompt, other = _prompt(model, 5, 0), _prompt(model, 5, 1)
    with _row_on_trial(model):
        plain = plain_run(model, prompt, gradients=True)
        run, kinds, lost = read_all(model, prompt)
        findings = [*lost, *_read_findings(model, prompt, plain, run, kinds)]
        findings += check_laws(model, prompt, other, plain, run["reads"])
        report = _report(model, findings)
    _refuse(model, report)
    if report.failed:
        warnings.warn(
            f"{model.name}: these sites are not what the row {model.family.name!r} says and are refused: {report.failed}",
            stacklevel=4,
        )
    return report


def _report(model: Model, findings: Iterable[Finding]) -> AuditReport:
    return AuditReport(model.name, model.family.name, tuple(findings))
