"""What an audit finds: one `Finding` for each check at each layer, and the report of all."""

from __future__ import annotations

from dataclasses import dataclass

from .markup import table
from .sites import KINDS

#: What each law says, for reports and messages.
LAWS = {
    "senders": "what heads, MLPs and biases write adds up to the stream that each receiver reads",
    "receivers": "a projection is an affine map of what it reads, and an MLP receives its norm of the stream",
    "edge gradients": "the gradient by what a receiver reads is that of autograd through the model's own modules",
    "backward": "autograd runs through the model",
    "secant": "effects by slopes between two runs add up to the change of a metric",
    "relp": "relevance patching has a rule for each step",
    "head": "the final norm and the head give the logits, up to one factor and a softcap",
}


#: The columns of a report's table.
COLUMNS = ("site or law", "check", "layers", "worst/allowed", "verdict")


@dataclass(frozen=True)
class Finding:
    """One check at one layer: the largest error, what it may be there, and a note where there was nothing to prove."""

    kind: str
    what: str
    layer: int
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. `ok`, `failed` ({kind: reason}), `findings`; printing it gives a table by kind of site."""

    model: str
    family: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failed

    @property
    def failed(self) -> dict[str, str]:
        """Kinds of sites that failed, with the worst failure of each."""
        out: dict[str, str] = {}
        worst = sorted((f for f in self.findings if not f.ok), key=lambda f: -(f.error / (f.tolerance or 1e-30)))
        for finding in worst:
            said = f"{finding.what} at layer {finding.layer} is off by {finding.error:.3g} (allowed {finding.tolerance:.1g})"
            if finding.what != "law" and finding.note and finding.error == float("inf"):
                said = finding.note
            if finding.what == "law" and finding.kind in LAWS:
                said = f"it does not hold that {LAWS[finding.kind]} ({finding.note or said.removeprefix('law ')})"
            out.setdefault(finding.kind, said)
        return out

    def rows(self) -> list[tuple[str, str, int, float, str]]:
        """A line of the table for each kind and check: both, its layers, the worst error beside what is allowed, the verdict."""
        rows = []
        for kind in dict.fromkeys((*KINDS, *LAWS, *(finding.kind for finding in self.findings))):
            for what in ("read", "write", "self-patch", "padding", "law"):
                own = [finding for finding in self.findings if (finding.kind, finding.what) == (kind, what)]
                if not own:
                    continue
                worst = max(
                    finding.error / finding.tolerance if finding.tolerance else finding.error for finding in own
                )
                notes = sorted({finding.note for finding in own if finding.note})
                verdict = "ok" if all(finding.ok for finding in own) else "FAILED"
                layers = len({finding.layer for finding in own})
                rows.append((kind, what, layers, worst, verdict + (f"  note: {'; '.join(notes)}" if notes else "")))
        return rows

    @property
    def verdict(self) -> str:
        """The last line of the table."""
        return f"{len(self.findings)} checks, " + ("all passed" if self.ok else f"FAILED: {self.failed}")

    def __str__(self) -> str:
        rows = [
            f"{kind:<15}{what:<12}{layers:>7}{worst:>15.3f}  {said}" for kind, what, layers, worst, said in self.rows()
        ]
        head = [
            f"audit of {self.model} ({self.family})",
            f"{COLUMNS[0]:<15}{COLUMNS[1]:<12}{COLUMNS[2]:>7}{COLUMNS[3]:>15}  ",
        ]
        return "\n".join([*head, *rows, self.verdict])

    def __repr__(self) -> str:
        return f"AuditReport({self.model}, {self.family}: {self.verdict}); print it for the table"

    def _repr_html_(self) -> str:
        return table(COLUMNS, self.rows(), f"{self.model}, {self.family}: {self.verdict}")
