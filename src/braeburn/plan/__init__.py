"""What a run will do on a machine, known before it runs."""
