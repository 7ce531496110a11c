"""What common mistakes would give, by name, so that a failing test can say which one it looks like."""
