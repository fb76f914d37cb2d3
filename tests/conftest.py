"""Settings for every test."""

from hypothesis import settings

# The same examples on every run, and no deadline: a busy machine is no bug.
settings.register_profile("apo", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("apo")
