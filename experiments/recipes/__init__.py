"""Losses that others ship as kernels of their own, each a few lines over this library's heads."""
