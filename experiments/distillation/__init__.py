"""A small language model that learns from labels, from what was stored of a larger one, and from its head."""
