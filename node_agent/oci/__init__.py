"""The OCI backend: a launcher that runs each job through crun, runc or runsc (ADR 0009)."""
