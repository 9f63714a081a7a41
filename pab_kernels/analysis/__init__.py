"""What broadcasting costs in quality, measured and shown."""
