"""What all stages use: files, tensors, a run's folder, processes and progress."""
