"""Black-box tests: the installed command, real mounts and real programs, and nothing imported."""
