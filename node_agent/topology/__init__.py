"""What a node is made of: CPUs, NUMA domains and GPUs, read once and reported upward."""
