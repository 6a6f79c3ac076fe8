"""A whole cluster on one machine: broker, coordinators and agents as detached processes."""
