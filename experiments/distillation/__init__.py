"""A small language model that learns from labels, from a larger model's stored top-k, and from its head."""
