"""Random configurations of every function over classes, compared with float64 formulas that compute error bounds."""
