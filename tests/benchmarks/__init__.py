"""Speed and memory of mini_nn beside PyTorch, HIPS autograd and MyGrad.

``python -m tests.benchmarks [NAME ...] [--json]``; see ``__main__`` for how it measures.
"""
