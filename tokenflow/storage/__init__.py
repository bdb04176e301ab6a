"""Files: videos, output directories, manifests."""
