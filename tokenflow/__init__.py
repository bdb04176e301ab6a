"""What the scripts at the root share, in layers: see DESIGN.md's layout, or the list in README."""
