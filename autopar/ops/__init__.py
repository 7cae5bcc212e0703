"""Operators of our own. Importing this package registers them with torch."""

from autopar.ops import attention as _attention
from autopar.ops import attention_dropout as _attention_dropout
from autopar.ops import cross_entropy as _cross_entropy
from autopar.ops import epilogues as _epilogues
from autopar.ops import experts as _experts
from autopar.ops import hub as _hub
from autopar.ops import padding as _padding
from autopar.ops import partial as _partial
from autopar.ops import pooling as _pooling
from autopar.ops import products as _products
from autopar.ops import random as _random
from autopar.ops import split_sums as _split_sums

__all__: list[str] = []

del _attention, _attention_dropout, _cross_entropy, _epilogues, _experts, _hub, _padding, _partial
del _pooling, _products, _random, _split_sums
