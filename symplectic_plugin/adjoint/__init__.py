"""The backward pass: the autograd function of a solve, the sweep over its steps, recomputation, second derivatives."""
