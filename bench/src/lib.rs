//! Benchmarks against named peers; never a dependency of what ships.
