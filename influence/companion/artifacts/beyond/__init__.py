"""Beyond both papers: where the metric tensor says more than the loss, by follow-ups and questions of our own."""
