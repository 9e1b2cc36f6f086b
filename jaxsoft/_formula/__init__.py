"""What is computed: the one formula, and the heads that are read from its statistics."""
