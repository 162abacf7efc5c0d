"""Records, predictions and timings enter; report.json, report.md, report.png and the model card leave."""
