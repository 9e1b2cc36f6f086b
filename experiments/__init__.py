"""Scripts that answer one question each: `python -m experiments` lists them."""
