"""Many runs of notebooks: on this machine, or on a cluster."""
