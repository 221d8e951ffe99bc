"""One-line mutants of the package, and whether the tests notice: ``python -m tests.mutation``."""
