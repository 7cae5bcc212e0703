"""A cast of a value to a narrower type and back is left out: Inductor would make it a copy.

    float32(bfloat16(x))  ->  x,    x float32 and made by a kernel, bfloat16(x) read by nobody else

It rounds no value within a kernel, so that these values stay as they would be. The gradient of an
embedding is one: Inductor sums it in float32, whatever the type of the rows.
"""

from __future__ import annotations

from torch import fx

from autopar.compile.nodes import CAST
from autopar.compile.tables import is_inlined


def drop_copies(module: fx.GraphModule) -> fx.GraphModule:
    """The same values to rounding, in place. Pre: flat ATen graph with fake values. O(nodes)."""
    graph = module.graph
    for back in graph.find_nodes(op="call_function", target=CAST):
        narrow = back.args[0]
        if narrow.target is not CAST or len(narrow.users) > 1:
            continue
        source = narrow.args[0]
        is_made = source.op == "call_function" and not is_inlined(source)
        wide, less = source.meta["val"].dtype, narrow.args[1]
        is_round_trip = back.args[1] == wide and wide.is_floating_point and less.is_floating_point
        if is_made and is_round_trip and wide.itemsize > less.itemsize:
            back.replace_all_uses_with(source)
            graph.erase_node(back)
            graph.erase_node(narrow)
    return module
