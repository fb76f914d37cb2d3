"""Base optimizers as differentiable, stateless update rules: one method, one file."""
