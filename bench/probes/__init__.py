"""Small programs that the benchmark runs as child processes."""
