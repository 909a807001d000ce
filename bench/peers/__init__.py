"""The measured programs, one module each; all of them are called as commands."""
