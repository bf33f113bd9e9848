"""The command line and everything in which both halves meet."""
