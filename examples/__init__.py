"""Programs that show zinfer at work."""
