"""One file for each module, and one for how the modules lie to each other."""
