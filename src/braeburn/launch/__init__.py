"""Starting runs of several processes: on this machine, or through the scheduler of a cluster."""
