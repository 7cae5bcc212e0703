"""What is done to a traced program before Inductor sees it, in order:

    make_tables      small values that large ones read are made once
    make_sums        sums of large values that several kernels read, too
    pad_products     products of matrices get sizes that tensor cores take
    overlap          the order: collectives beside everything else
    keep_sums_apart  sums that a concatenation reads are buffers of their own

Each keeps the values.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autopar.compile.alignment import pad_products
from autopar.compile.concatenations import keep_sums_apart
from autopar.compile.overlap import overlap
from autopar.compile.tables import make_sums, make_tables


def prepare(module: fx.GraphModule, parameters: Collection[int]) -> fx.GraphModule:
    """Pre: flat ATen graph with fake values. parameters: positions of the inputs that are there
    before the step. Changes `module`, too."""
    made = make_sums(make_tables(module))
    return keep_sums_apart(overlap(pad_products(made), parameters))
