"""Models assembled from mini_nn, and the studies that run them; used from a checkout."""
