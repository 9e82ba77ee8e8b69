"""Measures what each field of each route costs every process of a real server, over doubling sizes.

    python -m tests.linear_cost [--route /generate] [--largest BYTES] [--quick]

The fields are found in the types of the bodies, so a new field is measured without being named here.
"""
