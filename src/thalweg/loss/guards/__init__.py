"""Guards against what makes a loss or its derivatives wrong: memory, precision, randomness."""
