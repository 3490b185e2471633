"""Number formats of weights, rows and scales, bit for bit, in plain torch."""
