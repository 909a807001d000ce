"""What is stored, as bytes and as values: no input or output."""
