"""Task after task: what is left of each when the next ones have been learnt, by which method."""
