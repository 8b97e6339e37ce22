"""Everything that is fuzzed, by name."""

from fuzz import blocks, convolution, normalisation, pointwise

PRIMITIVES = normalisation.TARGETS | convolution.TARGETS | pointwise.TARGETS
BLOCKS = blocks.TARGETS
