"""A neural language model whose head over a large vocabulary computes a few logits at a time."""
