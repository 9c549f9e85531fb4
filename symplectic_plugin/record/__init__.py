"""What a forward pass leaves for the backward pass: steps, checkpoints, the memory budget, storage, schedules."""
