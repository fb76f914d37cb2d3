"""Glue for the frameworks that run the training loop; each module needs an extra of its own and is imported by name."""
