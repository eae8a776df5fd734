"""Jobs: methods that run on a server while this process does other things, or none at all.

A job is a call that is made again: from its file, after a kill, with every answer that came before taken from its ledger.
"""

from .job import Job, submit
from .listing import jobs
from .status import remote_status

__all__ = ["Job", "jobs", "remote_status", "submit"]
