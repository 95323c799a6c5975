"""Where samples come from. A sample is a function of (seed, step, position), never of what was read before."""
