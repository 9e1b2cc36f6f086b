"""Checks of arrays whatever they mean: values, dtypes, the class axis, sharding, types that exports store."""
