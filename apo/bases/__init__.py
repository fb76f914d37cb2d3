"""The seam between the shell and base optimizers: take the step, and return its pullback.

`base` says what a base optimizer owes the shell. `torch_optimizer` wraps a torch optimizer, with the momentum-free
`directions` of torch's own, and `linearity` to find out whether its step is proportional to its learning rate. `rule`
holds an update rule. `build` makes either from what the user gives.
"""
