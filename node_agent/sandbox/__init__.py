"""One sandbox plan and what carries it out: the native sandbox (namespaces, cgroups, seccomp)."""
