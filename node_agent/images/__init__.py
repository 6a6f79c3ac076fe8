"""Images of jobs: what operators configure, OCI layouts unpacked, what this node can offer.

An image is hostile input (docs/isolation.md): it is read and unpacked by a process of its own
(`unpack`), and what that process says is all that the agent hears of it (ADR 0013).
"""
