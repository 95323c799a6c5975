"""Pure maths of rectified flow on tensors and arrays: no I/O, no recipes, no models.

One time axis everywhere: sigma = 1 is noise, sigma = 0 is data, and velocity = noise - data.
"""
