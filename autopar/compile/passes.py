"""What is done to a traced program before Inductor sees it, in order:

    make_tables      small values that large ones read are made once
    make_sums        sums of large values that several kernels read, too
    remake_masks     where relus let gradients through is found by what is read anyway
    make_operands    operands of products lie in memory as the products read them
    drop_copies      a cast there and back of what a kernel made is left out
    pad_products     products of matrices get sizes that tensor cores take
    join_streams     what is added to a stream is added by the product that makes it
    sum_in_blocks    sums over rows, as of a bias' gradient, come with what they sum
    overlap          the order: collectives beside everything else
    keep_sums_apart  sums that a concatenation reads are buffers of their own
    overwrite_scores gradients of scores take the scores' memory
    widen_gradients  gradients of weights leave their product in the type that they are kept in
    leave_narrow     those of convolutions in the type in which they are made

Each keeps the values.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autopar.compile.alignment import pad_products
from autopar.compile.column_sums import sum_in_blocks
from autopar.compile.concatenations import keep_sums_apart
from autopar.compile.copies import drop_copies
from autopar.compile.gradients import leave_narrow, widen_gradients
from autopar.compile.losses import overwrite_scores
from autopar.compile.masks import remake_masks
from autopar.compile.overlap import overlap
from autopar.compile.streams import join_streams
from autopar.compile.tables import make_operands, make_sums, make_tables


def prepare(
    module: fx.GraphModule, parameters: Collection[int], gradients: Collection[int] = ()
) -> fx.GraphModule:
    """Pre: flat ATen graph with fake values. parameters: positions of the inputs that are there
    before the step; gradients: of results that may have another type and other strides. Changes
    `module`, too."""
    made = drop_copies(make_operands(remake_masks(make_sums(make_tables(module)))))
    made = overlap(sum_in_blocks(join_streams(pad_products(made))), parameters)
    made = widen_gradients(overwrite_scores(keep_sums_apart(made)))
    return leave_narrow(made, gradients)
