"""How well a linear head on frozen memories tells a task's prompts from everything else, and what that depends on."""
