"""The command line and everything that touches the shell, hosts and batch systems."""
