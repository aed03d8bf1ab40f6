"""What may be wrong with an audit beyond its numbers: its inputs, masked gradients, odd results."""
