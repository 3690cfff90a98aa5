"""mmpt: pretraining of multimodal foundation models. See README.md; the folders, read in order, are the path of the data."""
