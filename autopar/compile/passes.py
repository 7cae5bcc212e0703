"""What is done to a traced program before Inductor sees it, in order:

    make_tables      small values that large ones read are made once
    make_sums        sums of large values that several kernels read, too
    pad_products     products of matrices get sizes that tensor cores take
    overlap          the order: collectives beside everything else

Each keeps the values.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autopar.compile.alignment import pad_products
from autopar.compile.overlap import overlap
from autopar.compile.tables import make_sums, make_tables


def prepare(module: fx.GraphModule, parameters: Collection[int]) -> fx.GraphModule:
    """Pre: flat ATen graph with fake values. parameters: positions of the inputs that are there
    before the step. Changes `module`, too."""
    return overlap(pad_products(make_sums(make_tables(module))), parameters)
