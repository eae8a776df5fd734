"""One exception per thing a user can get wrong. Each message names the object, its shape and the remedy.

Imports nothing: these classes also travel to a remote server.
"""


class InterpError(Exception):
    """Base of every error that `interp` raises on purpose."""


class SiteError(InterpError, ValueError):
    """A site that cannot be: unknown kind, or a layer, head, position or unit out of range."""


class SiteUnavailableError(SiteError):
    """A site that this architecture does not have, or that this backend cannot reach."""


class ArchitectureError(InterpError, ValueError):
    """A model whose architecture has no row in the table of families, and none could be inferred."""


class ModelNotFoundError(InterpError, FileNotFoundError):
    """No model under that name (no folder, no bundled name, not reachable on a hub), or only a part of one."""


class AuditError(InterpError, RuntimeError):
    """A tap of this model was shown to be wrong; experiments on it are refused."""


class PairsError(InterpError, ValueError):
    """Prompt pairs that do not fit together: counts, lengths, positions, empty prompts."""


class AnswerError(PairsError):
    """An answer or distractor that is not one token of this tokenizer."""


class PlanError(InterpError, ValueError):
    """A plan that cannot be run on this model and these pairs."""


class MetricError(InterpError, ValueError):
    """A metric that returned the wrong shape, a NaN, or needs something the pairs do not have."""


class EffectsError(InterpError, ValueError):
    """A record of effects that cannot be read, combined or normalised."""


class BackendError(InterpError, RuntimeError):
    """A backend that could not run a job: worker lost, server error, serialisation failure."""


class CheckpointError(InterpError, RuntimeError):
    """A checkpoint that belongs to another run, or cannot be written."""


class CircuitError(InterpError, ValueError):
    """A circuit or circuit file that does not fit this model, or is malformed."""


class PlotError(InterpError, RuntimeError):
    """A picture that cannot be drawn or saved."""


class TaskError(InterpError, ValueError):
    """A task that cannot build aligned prompts for this tokenizer, or a corpus that cannot be had."""


class PackageError(InterpError, ImportError):
    """A package that a room needs, and that is missing or broken."""


class TrackerError(InterpError, RuntimeError):
    """An experiment tracker that cannot be used as asked."""


class JobError(InterpError, RuntimeError):
    """A job that cannot be submitted, found, read or finished."""
