"""From a checkpoint to figures: model -> Embeddings -> ranks -> eval/*.json, and everything of a run -> report.html."""
