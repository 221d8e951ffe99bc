"""The parts of the map-quality benchmark; ``python -m tests.benchmarks.map_quality`` runs them."""
