"""From files and the command line to one checked, plain configuration. Nothing here imports torch."""
