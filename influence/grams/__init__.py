"""Exact gradients of parameters for every class and example, read off the autograd graph of a forward pass.

``parameters`` runs a chunk of examples: ``graph`` finds where the parameters enter, ``reverse`` sends the gradients of
all classes back, the rules of ``linear``, ``convolution``, ``norm``, ``embedding`` and ``elementwise`` give those of
the parameters, and ``gradients`` makes Grams or entries of them. A new operator is a ``rules.Rule`` in the file of its
family.
"""

from influence.grams import convolution, elementwise, embedding, linear, norm

__all__ = ["convolution", "elementwise", "embedding", "linear", "norm"]
