"""Storage of a repository's objects: the contract (`base`) and one module for each back end."""
