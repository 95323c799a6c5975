"""FLUX.1: schnell, dev, Flex.1-alpha, LibreFLUX, OpenFLUX, and what was cut from them."""
