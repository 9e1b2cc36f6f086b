"""Random configurations of every function of classes, against float64 formulas with error bounds of their own."""
