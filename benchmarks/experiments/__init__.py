"""The papers' experiments as commands: `python -m benchmarks.experiments.tabular`, and so on; see README.md here."""
