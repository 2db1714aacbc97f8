"""The verbs of the command line, one module each with `run(argv) -> exit status`; `imsm_cli` imports the chosen one."""
