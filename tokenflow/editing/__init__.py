"""What the run scripts share."""
