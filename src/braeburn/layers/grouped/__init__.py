"""The product of rows and the matrix of their group, as an ordered list of back ends.

Rows of one group stand together, and each group has a matrix of its own, as the tokens that are
routed to an expert have that expert's. `grouped_product` takes the first back end that supports the
devices. All compute as many products as there are rows, give or take a block a group: no group has
a limit, and none is padded to the size of the largest.

Shapes are named by letters: M rows, E groups, D columns of a row, F columns of the result.
"""

from braeburn.layers.grouped.select import BACKENDS, Backend, grouped_product
from braeburn.layers.grouped.vectors import grouped_vectors

__all__ = ["BACKENDS", "Backend", "grouped_product", "grouped_vectors"]
