"""A neural language model whose head over a large vocabulary forms a few of its logits at a time."""
