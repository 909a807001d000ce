"""Small programs that the benchmark runs as children of their own."""
