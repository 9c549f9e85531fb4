"""The record of a forward pass: steps, checkpoints, the memory budget, storage, schedules."""
