"""From a checkpoint to figures: a split -> embeddings, or nats -> recall, accuracy, perplexity -> eval/*.json -> report.html."""
