"""What `earthprior export` writes: weights, a loader in one file, graphs of the features, and a model card."""
