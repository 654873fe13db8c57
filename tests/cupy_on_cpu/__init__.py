"""The real CuPy on a CPU: see README.md in this folder."""
