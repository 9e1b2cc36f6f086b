"""How a head of a linear layer is run: its arguments, tiles, devices and derivatives."""
