"""The programs that are measured, one module each; all of them are called as commands."""
