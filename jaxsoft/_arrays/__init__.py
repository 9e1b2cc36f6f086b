"""What is asked of arrays, whatever they mean: values, dtypes, the axis of the classes, the layout over devices."""
