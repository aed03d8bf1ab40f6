"""How a network is run on a machine: precision, device, memory, and what fits into it."""
