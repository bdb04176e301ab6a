"""What lies on the disk: videos, output directories, manifests, and the check of what is read."""
