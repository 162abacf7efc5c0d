"""A model directory and a task's features enter; a trained, distilled or pruned model directory leaves."""
