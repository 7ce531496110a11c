"""What a course hands out beside the assignment: configuration, data, checkpoints, screens."""
