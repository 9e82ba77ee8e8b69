"""All cases: small ones, odd enough to meet every mask, and the shapes of models that are served."""

from tests.kernels import adapters, attention, dense, moe, recurrent, sampling

FAMILIES = (dense, adapters, attention, moe, recurrent, sampling)
SMALL = [case for family in FAMILIES for case in family.SMALL]
SERVED = [case for family in FAMILIES for case in family.SERVED]
