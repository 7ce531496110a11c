"""What a course hands out with the assignment: configuration, data, checkpoints, screens."""
