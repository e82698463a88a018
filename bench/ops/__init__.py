"""What is measured of each op, a module for each of :mod:`stem_fast.reference` that is fast."""

from bench.ops import adam, linear, lookup, loss, mixture

KERNELS = {**lookup.OPS, **mixture.OPS, **linear.OPS, **loss.OPS}
OPS = {**KERNELS, **adam.OPS}  # the latter have a results file of their own
