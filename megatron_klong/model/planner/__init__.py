"""Which layouts of a model fit into the memory of so many GPUs, why, and what to change: tools/plan_layout.py."""
