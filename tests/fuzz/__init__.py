"""Every parser of bytes that others wrote, fed with hostile bytes.

`make test` mutates real objects a few thousand times for each parser. `make soak` lets Atheris, which
follows the coverage, do it millions of times (`python -m tests.fuzz`).
"""
