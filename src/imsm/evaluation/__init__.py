"""The measure of forgetting: tasks, metrics, evaluation of any checkpoint, and before held against after."""
