"""The agent's suite in a guest with pure cgroup v2 and two NUMA nodes: `make test-vm`.

| file          | what                                                                        |
|---------------|-----------------------------------------------------------------------------|
| `parts.py`    | gets QEMU and a guest kernel from the distribution, where they are absent    |
| `guest.py`    | boots one guest over the host's own files and runs one command in it         |
| `init.sh`     | the guest's first process, until the command                                 |
| `__main__.py` | which tests; what is printed; exit codes                                     |
"""
