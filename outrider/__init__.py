"""What people and services use: SDK, CLI, the local cluster.

`from outrider import Client, Job` loads the SDK on first use, so that the CLI starts quickly.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.client.aio import AsyncClient
    from outrider.client.client import Client
    from outrider.client.errors import JobCancelledError, JobEndedError, JobFailedError
    from outrider.client.job import Job
    from outrider.local.cluster import LocalCluster, LocalOptions

__all__ = [
    "AsyncClient",
    "Client",
    "Job",
    "JobCancelledError",
    "JobEndedError",
    "JobFailedError",
    "LocalCluster",
    "LocalOptions",
]

_HOME = {
    "AsyncClient": "outrider.client.aio",
    "Client": "outrider.client.client",
    "Job": "outrider.client.job",
    "JobCancelledError": "outrider.client.errors",
    "JobEndedError": "outrider.client.errors",
    "JobFailedError": "outrider.client.errors",
    "LocalCluster": "outrider.local.cluster",
    "LocalOptions": "outrider.local.cluster",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
