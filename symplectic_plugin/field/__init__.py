"""The vector field f as one solve sees it: evaluations, what f holds, autograd graphs, cotangents, ambient state."""
