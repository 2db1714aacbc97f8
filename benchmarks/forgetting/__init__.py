"""What is forgotten by which method: one target task, what is retained of the rest, every baseline at its own best rate."""
