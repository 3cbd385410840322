"""The networks of the companion: architectures, recipes, one training loop, published weights."""
