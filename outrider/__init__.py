"""What people and services use: SDK, CLI, the local cluster."""
