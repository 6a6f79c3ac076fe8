"""Attacks that the sandbox must survive, as small programs run inside a job."""
