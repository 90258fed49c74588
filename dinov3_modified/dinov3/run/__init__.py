"""Starting jobs (matches `dinov3.run`)."""
