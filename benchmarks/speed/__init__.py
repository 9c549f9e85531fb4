"""The time and memory of every way to get a gradient through a solve, side by side: `python -m benchmarks.speed`."""
