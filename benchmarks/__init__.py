"""What a training step costs, in time and memory: `python -m benchmarks`, or `make bench`.

Contestants (`contestants.py`) train copies of one model (`tasks.py`) side by side: in every round each takes a block of
steps, in an order that turns, and what is reported is the ratio to the reference in the same round (`timing.py`).
Memory is counted in bytes of tensors that live at once (`memory.py`).
"""
