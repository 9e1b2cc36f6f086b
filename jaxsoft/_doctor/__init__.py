"""The gradient doctor."""
