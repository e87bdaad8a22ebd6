"""Many studies at once: one for each point of a grid of settings, each with its seeds."""
