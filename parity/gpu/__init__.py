"""`python -m parity.gpu`: the port on a GPU, proven and measured in eight minutes."""
