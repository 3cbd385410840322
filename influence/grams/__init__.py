"""Exact gradients of parameters for every class and example, read off the autograd graph of a forward pass.

``parameters`` runs a chunk of examples: ``graph`` finds where the parameters enter, ``reverse`` sends the gradients of
all classes back, and the rules of ``linear``, ``convolution``, ``norm``, ``embedding`` and ``elementwise`` give those of
the parameters, of which ``gradients`` makes Grams or entries. A new operator is a ``rules.Rule`` in the file of its
family.
"""

from influence.grams import convolution, elementwise, embedding, linear, norm

__all__ = ["convolution", "elementwise", "embedding", "linear", "norm"]
