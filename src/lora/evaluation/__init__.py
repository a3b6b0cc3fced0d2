"""How good a model's answers are: scores, FinLoRA's tasks by name, base and adapter and merged side by side."""
